"""A training step in bfloat16: all weights in it, as with common.bf16=true, or float weights under autocast."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import hubert_eff


def loss_of(model: torch.nn.Module, wav: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    target = torch.arange(200).remainder(5).expand(len(wav), -1)
    out = model(wav, [target], padding)
    assert out["logits_m"][0].dtype == torch.float32  # cosines over temperature decide between near classes
    return F.cross_entropy(out["logits_m"][0], out["targets_m"][0]) + out["features_pen"]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", ["weights", "autocast"])
@pytest.mark.parametrize("encoder", hubert_eff.list_encoders())
def test_a_step_in_bfloat16(encoder: str, mode: str, padded: bool) -> None:
    keys = {"num_classes": (5,), "dropout": 0.1, "attention_dropout": 0.1, "encoder_layerdrop": 0.0}
    model = hubert_eff.build(f"{encoder}-debug", **keys)
    exact = hubert_eff.build(f"{encoder}-debug", **keys)
    exact.load_state_dict(model.state_dict())
    wav, padding = 0.1 * torch.randn(2, 6720), torch.zeros(2, 6720, dtype=torch.bool)
    padding[1, 4000:] = True
    if mode == "weights":
        model.bfloat16()
        loss = loss_of(model, wav.bfloat16(), padding if padded else None)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, wav, padding if padded else None)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert {n for n, p in model.named_parameters() if p.grad is None} <= {"mask_emb"}
    with torch.no_grad():
        reference = [m.eval().hidden_states(wav.to(m.mask_emb.dtype), padding)[0][-1].float() for m in (exact, model)]
    assert F.cosine_similarity(reference[0][0], reference[1][0]).mean() > 0.99
