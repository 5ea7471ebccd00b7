"""Compiled blocks: what they compute is what plain blocks compute, and a shape is compiled once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.layers import compiling, sparse
from hubert_eff.layers.flex import compiled_flex

KEYS = {"num_classes": (5,), "dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The graphs that dynamo hands over, run as they are."""
    seen: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    torch.compiler.reset()
    compiling.compiled_call.cache_clear()
    yield seen
    compiling.compiled_call.cache_clear()


def pair(preset: str, **keys: Any) -> list[Any]:
    """A plain model and one with compiled blocks, of the same weights."""
    plain = hubert_eff.build(preset, **KEYS, **keys)
    compiled = hubert_eff.build(preset, **KEYS, **keys, compile_blocks=True)
    compiled.load_state_dict(plain.state_dict())
    return [plain, compiled]


def step(model: Any, wav: Tensor, padding: Tensor | None = None) -> list[Tensor]:
    """Loss, gradients and buffers after a forward and backward pass."""
    model.zero_grad()
    target = torch.arange(200).remainder(5).expand(len(wav), -1)
    out = model(wav, [target], padding)
    loss = F.cross_entropy(out["logits_m"][0], out["targets_m"][0])
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def test_a_shape_is_compiled_once_for_all_blocks(graphs: list[Any]) -> None:
    models, wav = pair("transformer-debug", encoder_layers=3, encoder_layerdrop=0.3), 0.1 * torch.randn(2, 6720)
    assert set(models[0].state_dict()) == set(models[1].state_dict())
    for update in range(3):  # LayerDrop keeps other blocks each time
        for model in models:
            model.set_num_updates(update)
        for a, b in zip(*(step(model, wav) for model in models), strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1
    step(models[1], wav[:, :4160])
    assert len(graphs) == 2
    models[1].eval().hidden_states(wav[:, :5000])  # evaluation has all lengths
    copy.deepcopy(models[1]).hidden_states(wav)
    assert len(graphs) == 2


def test_compiled_blocks_are_recomputed(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    models = pair("conformer-debug", checkpoint_activations=True)
    wav, padding = 0.1 * torch.randn(2, 6720), torch.zeros(2, 6720, dtype=torch.bool)
    padding[1, 4000:] = True
    for a, b in zip(*(step(model, wav, padding) for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_flex_attention_is_called_between_compiled_parts(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention runs without a GPU too, uncompiled and slowly."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    calls: list[int] = []

    def kernel(*args: Any, **keys: Any) -> Tensor:
        calls.append(1)
        return flex(*args, **keys)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", lambda _: kernel)
        compiled_flex.cache_clear()
        plain, compiled = pair("sparseformer-debug", sparse_stride=32, flex_attention=True)
    monkeypatch.setattr(sparse, "takes_flex", lambda q: True)
    wav = 0.1 * torch.randn(2, 6720)
    expected = plain.hidden_states(wav)[0][-1]
    assert len(calls) == 2
    torch.testing.assert_close(compiled.hidden_states(wav)[0][-1], expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 4 and len(graphs) > 1
    compiled_flex.cache_clear()


@pytest.mark.parametrize(("preset", "reason"), [("zipformer-debug", "Zipformer"), ("conformer-debug+w1a1", "binarized")])
def test_what_cannot_be_compiled_is_refused(preset: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"compile_blocks=true: .*{reason}"):
        hubert_eff.build(preset, compile_blocks=True)
