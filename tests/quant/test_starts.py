"""Starting from a model of other classes: encoder and extractor are taken over, codebooks are new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.quant.distill import CODEBOOKS, start_from


def build(classes: tuple[int, ...] = (7,), seed: int = 0, preset: str = "conformer-debug", **keys: Any) -> Any:
    torch.manual_seed(seed)
    return hubert_eff.build(preset, classes, **keys)


def taken(student: Any, before: dict[str, torch.Tensor], source: Any) -> tuple[set[str], set[str]]:
    """Names of the tensors that are now the source's, and of those that are as before."""
    state, theirs = student.state_dict(), source.state_dict()
    same = {name for name in state if name in theirs and state[name].shape == theirs[name].shape and torch.equal(state[name], theirs[name])}
    return same, {name for name in state if torch.equal(state[name], before[name])}


@pytest.mark.parametrize("encoder", hubert_eff.list_encoders())
@pytest.mark.parametrize("classes", [(500,), (7, 5), ()])
def test_other_classes_have_new_codebooks(encoder: str, classes: tuple[int, ...]) -> None:
    source, student = build(classes, preset=f"{encoder}-debug"), build((9,), 1, f"{encoder}-debug")
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    said = start_from(student, source)
    same, kept = taken(student, before, source)
    codebooks = {name for name in before if name.startswith(CODEBOOKS)}
    assert {"final_proj.weight", "label_embs_concat"} <= codebooks <= kept and same == set(before) - codebooks
    count = sum(before[name].numel() for name in same)
    of_source = list(classes) or "none"
    assert said == f"{len(same)} tensors ({count:,} numbers) are taken over, codebooks of [9] classes are new (the source has {of_source})"
    assert student(torch.randn(2, 8000), [torch.zeros(2, 24, dtype=torch.long)])["logits_m"][0].shape[-1] == 9


def test_codebooks_of_as_many_classes_come_along_unless_they_shall_not() -> None:
    source = build()
    for new in (False, True):
        student = build(seed=1)
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        said = start_from(student, source, new)
        assert ("label_embs_concat" in taken(student, before, source)[0]) != new
        assert said.endswith("codebooks of [7] classes are new (the source has [7])" if new else "codebooks of [7] classes too")


def test_a_binarized_student_may_have_other_classes_than_its_source() -> None:
    source, student = build((5,)), build(quant="w1a1")
    start_from(student, source)
    assert torch.equal(student.encoder.layers[0].ffn1.w_1.weight, source.encoder.layers[0].ffn1.w_1.weight)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"encoder_attention_heads": 2}, "the source has another encoder_attention_heads: set model.encoder_attention_heads=2"),
        ({"normalize": True}, "the source has another normalize: set task.normalize=true"),
        ({"conv_feature_layers": "[(32,10,5)]+[(32,3,2)]*4+[(32,2,1)]+[(32,2,4)]"}, "set model.conv_feature_layers=.*(32,2,4)"),
    ],
)
def test_settings_that_no_shape_shows(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        start_from(build(), build(**keys))
    assert all(part in str(caught.value) for part in message.split(".*"))


def test_files_for_inference_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is fused for inference"):
        start_from(build(), hubert_eff.fuse(build()))
    source = build(quant="w1a1").train()
    source(torch.randn(1, 8000), mask=False, features_only=True)
    hubert_eff.export(source.eval(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="it is packed for inference"):
        start_from(build(quant="w1a1"), hubert_eff.load(tmp_path / "model.safetensors"))
