"""Learning from a teacher, what to watch in a binarized model, and the stages W32A32 -> W1A2 -> W1A1."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.errors import StepFailed, UserError
from hubert_eff.models.hubert import HubertModel
from hubert_eff.quant import Quantizer
from hubert_eff.quant.distill import check_teacher, codebook_divergence, hidden_distances, start_from
from hubert_eff.quant.functional import FLOOR
from hubert_eff.quant.monitor import Monitor, scales
from hubert_eff.recipes import base
from hubert_eff.recipes.binarize import Binarization

from ..helpers.checkpoints import checkpoint
from ..helpers.paths import ROOT

QUANTIZE = ROOT / "configs" / "quantize"


CLASSES = 7


def build(preset: str = "conformer-debug", **keys: Any) -> HubertModel:
    return hubert_eff.build(preset, (CLASSES,), dropout=0.0, attention_dropout=0.0, **keys)


def batch() -> dict[str, torch.Tensor]:
    """Two rows of noise, the second padded."""
    generator = torch.Generator().manual_seed(3)
    padding = torch.zeros(2, 12_000, dtype=torch.bool)
    padding[1, 7_000:] = True
    return {"source": torch.randn(2, 12_000, generator=generator), "padding_mask": padding, "sample_ids": torch.tensor([5, 8])}


# -- losses ----------------------------------------------------------------------------------------------------------------


def test_codebook_divergence_is_kl_summed_over_frames_and_its_gradient_that_of_soft_cross_entropy() -> None:
    ours, theirs = torch.randn(5, CLASSES, requires_grad=True), torch.randn(5, CLASSES)
    p, q = theirs.softmax(-1), ours.softmax(-1)
    loss = codebook_divergence([ours, ours], [theirs, theirs])
    assert torch.allclose(loss, 2 * (p * (p / q).log()).sum(), atol=1e-5)
    (gradient,) = torch.autograd.grad(loss, ours)
    assert torch.allclose(gradient, 2 * (q - p), atol=1e-6)
    assert codebook_divergence([theirs], [theirs]).item() == 0.0


def test_hidden_distances_are_of_each_utterance_without_padding_and_can_be_divided_by_the_teachers_variance() -> None:
    ours, theirs, valid = torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.ones(2, 6, dtype=torch.bool)
    valid[1, 4:] = False
    expected = torch.stack([(ours[0] - theirs[0]).square().mean(), (ours[1, :4] - theirs[1, :4]).square().mean()])
    variance = torch.stack([theirs[0].var(unbiased=False), theirs[1, :4].var(unbiased=False)])
    ours[1, 4:] = 1e3
    found = hidden_distances([ours, theirs], [theirs, theirs], valid)
    assert torch.allclose(found, torch.stack((expected, torch.zeros(2)), 1))
    assert torch.allclose(hidden_distances([ours], [theirs], valid, normalize=True)[:, 0], expected / variance)
    assert torch.allclose(hidden_distances([ours[:, :4]], [theirs[:, :4]], None)[1], expected[1])
    assert hidden_distances([ours], [theirs], torch.zeros_like(valid)).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"encoder_layers": 3}, "layers 3, the student's 2"),
        ({"encoder_embed_dim": 32}, "width .* 32, the student's 64"),
        ({"label_rate": 100.0}, "label rate .* 100.0, the student's 50.0"),
        ({"normalize": True}, "normalization"),
        ({"valid_frames": "fairseq"}, "rule for padding"),
        ({"conv_feature_layers": "[(32,10,5)] + [(32,3,2)] * 3 + [(32,4,2)] + [(32,2,2)] * 2"}, "samples under a frame"),
    ],
)
def test_a_teacher_that_does_not_match_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_teacher(build(**keys), build())
    assert "\n" not in str(caught.value)


def test_a_teacher_with_other_codebooks_is_refused() -> None:
    with pytest.raises(UserError, match=r"codebooks .* \[5\], the student's \[7\]"):
        check_teacher(hubert_eff.build("conformer-debug", (5,)), build())


# -- starts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", hubert_eff.list_encoders())
def test_each_stage_starts_from_the_one_before_and_w1a1_inherits_scales(encoder: str) -> None:
    teacher, half, student = build(f"{encoder}-debug"), build(f"{encoder}-debug", quant="w1a2"), build(f"{encoder}-debug", quant="w1a1")
    start_from(half, teacher)
    assert all(torch.equal(half.state_dict()[name], value) for name, value in teacher.state_dict().items())
    fresh = [m for m in half.modules() if isinstance(m, Quantizer) and m.scale.item() == 1.0]
    assert fresh and not any(m.initialized for m in fresh)
    half.train()(**batch(), features_only=True)
    start_from(student, half)
    assert all(torch.equal(student.state_dict()[name], value) for name, value in half.state_dict().items())
    assert all(m.initialized and m._ready for m in student.modules() if isinstance(m, Quantizer))


def test_starts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="encoder transformer cannot start"):
        start_from(build("transformer-debug"), build())
    with pytest.raises(UserError, match="float model cannot start from a binarized one"):
        start_from(build(), build(quant="w1a2"))
    with pytest.raises(UserError, match="quant_policy"):
        start_from(build(quant="w1a1"), build(quant="w1a2", quant_policy="paper"))
    with pytest.raises(UserError, match="quant_policy"):
        start_from(build(quant="w1a1", quant_policy="paper"), build(quant="w1a2", quant_policy='{"feed_forward": "float"}'))
    with pytest.raises(UserError, match="sizes must agree"):
        start_from(build(), build(encoder_ffn_embed_dim=96))


def test_masks_can_be_those_of_another_model() -> None:
    student, teacher = build(seed=1, mask_channel_prob=0.3).train(), build(seed=9, encoder_layerdrop=1.0).eval()
    student.set_num_updates(4)
    output = student(**batch(), return_states=True)
    taught = teacher(batch()["source"], padding_mask=batch()["padding_mask"], masks=output["masks"], return_states=True)
    assert output["masks"][1] is not None and output["mask_indices"].any()
    assert torch.equal(taught["mask_indices"], output["mask_indices"])
    assert len(output["states"]) == 3 and torch.equal(output["states"][-1], output["x"])
    again = copy.deepcopy(student).eval()
    again.load_state_dict(teacher.state_dict())
    own = again(batch()["source"], padding_mask=batch()["padding_mask"], masks=output["masks"])
    assert torch.allclose(own["x"], taught["x"], atol=1e-6)  # nothing but the masks is the student's


# -- monitor ---------------------------------------------------------------------------------------------------------------


def test_monitor_counts_what_is_saturated_and_dead() -> None:
    model = build(quant="w1a1")
    monitor = Monitor(model)
    quantizer = model.encoder.layers[0].ffn1.w_1.input
    name = next(key for key, value in monitor.quantizers.items() if value is quantizer)
    quantizer._ready = True
    with monitor.watching():
        x = torch.zeros(1, 4, 64)
        x[..., 0] = torch.tensor([2.0, -2.0, 0.5, -0.5])  # two of four beyond the scale, 1; the other channels never change their sign
        quantizer.masked(x, None)
        quantizer.masked(x + 9.0, torch.zeros(1, 4, 1, dtype=torch.bool))  # padding only: no element, and no channel that is alive
    monitor.before_update()
    with torch.no_grad():
        weight = model.encoder.layers[0].ffn1.w_1.weight
        weight.neg_()
    health = monitor.after_update()
    assert health.saturated[name] == pytest.approx(2 / (4 * 64))
    assert health.dead[name] == pytest.approx((63 + 64) / 128)
    assert health.flipped[name.removesuffix(".input")] == 1.0
    assert sorted(health.flipped.values())[-2] == 0.0
    assert 0 < health.by_block()["flipped_0"] < 1 and health.by_block()["flipped_1"] == 0.0
    assert "most flipped 100.0% (encoder.layers.0.ffn1.w_1)" in health.worst()
    assert quantizer.watch is None


def test_monitor_counts_queries_that_attend_to_nothing() -> None:
    model = build("transformer-debug", quant="w1a1").train()
    monitor = Monitor(model)
    with monitor.watching():
        model(**batch())
    monitor.before_update()
    dead = monitor.after_update().dead
    (before,) = [share for name, share in dead.items() if "layers.0" in name and name.endswith("probabilities.quantizer")]
    assert 0.0 <= before < 0.5
    for quantizer in (m for n, m in model.named_modules() if n.endswith("probabilities.quantizer")):
        nn.init.constant_(quantizer.scale, 1e3)  # a threshold that no probability reaches
    with monitor.watching():
        model(**batch())
    monitor.before_update()
    dead = monitor.after_update().dead
    assert [share for name, share in dead.items() if name.endswith("probabilities.quantizer")] == [1.0, 1.0]


@pytest.mark.parametrize("encoder", hubert_eff.list_encoders())
@pytest.mark.parametrize("quant", ["w1a1", "w1a2"])
def test_monitor_sees_every_quantizer_of_every_encoder(encoder: str, quant: str) -> None:
    model = build(f"{encoder}-debug", quant=quant).train()
    monitor = Monitor(model)
    with monitor.watching():
        model(**batch())
    monitor.before_update()
    health = monitor.after_update()
    assert set(health.saturated) == set(health.dead) == set(monitor.quantizers)
    assert all(0.0 <= share <= 1.0 for values in vars(health).values() for share in values.values())
    assert set(health.flipped.values()) == {0.0}
    assert len(scales(model)) == len(monitor.quantizers)


def test_a_scale_at_its_floor_is_told_once() -> None:
    model = build(quant="w1a1")
    monitor = Monitor(model)
    assert monitor.collapsed() == []
    quantizer = model.encoder.layers[1].self_attn.out_proj.input
    nn.init.constant_(quantizer.scale, FLOOR / 2)
    assert monitor.collapsed() == ["encoder.layers.1.self_attn.out_proj.input"]
    assert monitor.collapsed() == []


# -- stages ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the recipe looks for before it starts."""
    for name in ("train.tsv", "valid.tsv", "dict.km.txt"):
        (tmp_path / name).write_text("x\n")
    return tmp_path


class FakeRuns:
    """Stands in for fairseq-hydra-train: leaves a checkpoint and a log behind, or fails in one stage."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stages: list[str] = []
        self.commands: list[list[str]] = []
        self.failing = ""
        monkeypatch.setattr(base, "run_command", self.run)

    def run(self, words: Sequence[object]) -> int:
        words = [str(word) for word in words]
        (target,) = [Path(word.partition("=")[2]) for word in words if word.startswith("checkpoint.save_dir=")]
        self.stages.append(target.name)
        self.commands.append(words)
        if target.name == self.failing:
            return 143
        (target / "checkpoint_best.pt").write_bytes(b"")
        figures = "loss 1.5 | correct_m_0 0.4 | majority_m_0 0.1 | code_ppl_0 9 | label_ppl_0 10 | num_updates 5"
        (target / "train.log").write_text(f"valid: epoch 001 | valid on 'valid' subset | {figures}\n")
        return 0


def make(folder: Path, **keys: Any) -> Binarization:
    return Binarization(folder, folder, folder / "out", **keys)


def test_recipe_chains_the_stages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = FakeRuns(monkeypatch)
    figures = make(folder, updates=[3, 2, 1], policy="paper", overrides=["dataset.num_workers=0"]).run()
    assert runs.stages == list(figures) == ["float", "w1a2", "w1a1"]
    assert figures["w1a1"]["accuracy"] == 0.4 and figures["w1a1"]["updates"] == 5
    first, second, third = (set(words) for words in runs.commands)
    assert {"debug", "optimization.max_update=3"} <= first and not any("criterion.teacher" in word for word in first)
    assert {"debug_distill", "model.quant=w1a2", "model.quant_policy=paper", "optimization.max_update=2"} <= second
    assert f"criterion.teacher={folder / 'out' / 'float' / 'checkpoint_best.pt'}" in second
    assert {f"criterion.teacher={folder / 'out' / 'w1a2' / 'checkpoint_best.pt'}", "model.quant=w1a1"} <= third
    assert all("dataset.num_workers=0" in words for words in runs.commands)


def test_recipe_prints_whole_paths(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    FakeRuns(monkeypatch)
    out = folder / ("a-folder-with-a-long-name-" * 4) / "out"
    assert main(["binarize-recipe", str(folder), str(folder), "--out", str(out), "--updates", "3", "2", "1"]) == 0
    printed = capsys.readouterr().out
    assert all(str(out / stage / "checkpoint_best.pt") in printed for stage in ("float", "w1a2", "w1a1"))


def test_recipe_goes_on_at_the_stage_it_stopped_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = FakeRuns(monkeypatch)
    runs.failing = "w1a2"
    with pytest.raises(StepFailed, match="'w1a2' ended with exit code 143") as failure:
        make(folder).run()
    assert failure.value.code == 143
    runs.stages, runs.failing = [], ""
    figures = make(folder).run()
    assert runs.stages == ["w1a2", "w1a1"] and list(figures) == ["float", "w1a2", "w1a1"]
    with pytest.raises(UserError, match="policy=default, not paper: take another --out"):
        make(folder, policy="paper").run()


def test_recipe_keeps_what_a_policy_file_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = FakeRuns(monkeypatch)
    policy = folder / "mine.yaml"
    policy.write_text("feed_forward: float")
    make(folder, policy=str(policy)).run()
    assert f"model.quant_policy={folder / 'out' / 'policy.yaml'}" in runs.commands[1]
    assert json.loads((folder / "out" / "policy.yaml").read_text()) == {"feed_forward": "float"}
    policy.write_text("feed_forward: binary")
    with pytest.raises(UserError, match="take another --out"):
        make(folder, policy=str(policy)).run()


def test_recipe_takes_a_teacher_for_the_first_stages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = FakeRuns(monkeypatch)
    for quant, stages in (("none", ["w1a2", "w1a1"]), ("w1a2", ["w1a1"])):
        teacher = checkpoint(build(quant=quant, label_rate=100.0, normalize=True), folder / f"{quant}.pt")
        runs.stages, runs.commands = [], []
        Binarization(folder, folder, folder / quant, teacher=teacher).run()
        assert runs.stages == stages and f"criterion.teacher={teacher}" in runs.commands[0]
    binary, export = checkpoint(build(quant="w1a1"), folder / "w1a1.pt"), folder / "export.safetensors"
    hubert_eff.export(build(label_rate=100.0, normalize=True), export)
    for teacher, message in ((binary, "at one bit already"), (export, "no codebooks, which exports leave out")):
        with pytest.raises(UserError, match=message):
            make(folder, teacher=teacher).run()
    with pytest.raises(UserError, match="encoder transformer cannot start"):
        make(folder, teacher=folder / "none.pt", config="transformer_debug").run()


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"config": "debgu"}, "'debgu' - did you mean 'debug'"),
        ({"updates": [1, 2]}, "one positive number for each of the stages float, w1a2, w1a1"),
        ({"updates": [1, 0, 2]}, "one positive number"),
        ({"policy": "papr"}, "unknown policy 'papr'"),
        ({"policy": '{"modules": {"encoder.layers.7": "float"}}'}, "unknown module in the policy 'encoder.layers.7'"),
        ({"overrides": ["lr"]}, "expected SECTION.KEY=VALUE"),
        ({"overrides": ["model.quant=w1a2"]}, "the recipe decides model.quant itself"),
        ({"overrides": ["model.encoder_layrs=3"]}, "did you mean 'model.encoder_layers'"),
        ({"teacher": Path("nowhere.pt")}, "no checkpoint at .*nowhere.pt"),
        ({"data": Path("nowhere")}, "nowhere holds no train.tsv"),
        ({"labels": Path("nowhere")}, "nowhere holds no labels"),
    ],
)
def test_recipe_refuses_bad_input_before_any_work(
    folder: Path, keys: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = FakeRuns(monkeypatch)
    with pytest.raises(UserError, match=message) as caught:
        Binarization(**{"data": folder, "labels": folder, "out": folder / "out", **keys}).run()
    assert "\n" not in str(caught.value) and runs.stages == [] and not (folder / "out").exists()
