"""The criterion: exact values over ranks and intervals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hubert_eff.errors import UserError

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
from fairseq.logging import metrics  # noqa: E402

import fairseq_plugins  # noqa: E402, F401
from fairseq_plugins.criterions.hubert_eff import HubertEffCriterion, perplexity  # noqa: E402

# -- criterion -----------------------------------------------------------------------------------------------------------


class FixedOutput(torch.nn.Module):
    """Stands where a model stands: returns outputs made up beforehand."""

    def __init__(self, outputs: list[dict[str, Any]]) -> None:
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, target_list: Any, **_: Any) -> dict[str, Any]:
        return next(self.outputs)


NOISE = {"source": torch.zeros(2, 16_000), "padding_mask": torch.arange(16_000)[None] >= torch.tensor([[16_000], [8_000]])}  # 1.5 s


def made_up(masked: int, unmasked: int, classes: int = 7) -> dict[str, Any]:
    return {
        "logits_m": [torch.randn(masked, classes)], "targets_m": [torch.randint(0, 3, (masked,))],
        "logits_u": [torch.randn(unmasked, classes)], "targets_u": [torch.randint(0, classes, (unmasked,))],
        "features_pen": torch.rand(()),
    }  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_criterion_values_are_exact_over_an_interval(ranks: int) -> None:
    outputs = [made_up(11, 5), made_up(3, 8), made_up(30, 2), made_up(6, 6)]
    criterion = HubertEffCriterion(None, 1.0, 0.5, [10.0], ["features_pen"])
    model, sample = FixedOutput(outputs), {"target_list": None, "net_input": NOISE, "id": torch.arange(2)}
    results = [criterion(model, sample) for _ in outputs]
    metrics.reset()
    with metrics.aggregate("interval") as interval:
        for i in range(0, len(results), ranks):
            criterion.reduce_metrics([log for _, _, log in results[i : i + ranks]])
    logged = interval.get_smoothed_values()
    for output, (loss, sample_size, _) in zip(outputs, results):
        ce_m, ce_u = (F.cross_entropy(output[f"logits_{p}"][0], output[f"targets_{p}"][0], reduction="sum") for p in "mu")
        assert sample_size == output["targets_m"][0].numel() + output["targets_u"][0].numel()
        torch.testing.assert_close(loss, ce_m + 0.5 * ce_u + 10 * output["features_pen"] * sample_size)
    assert all(float(log["audio_seconds"]) == 1.5 for _, _, log in results) and logged["audio_per_s"] > 0 and logged["mem_gb"] > 0
    frames = sum(size for _, size, _ in results)
    assert logged["loss"] == pytest.approx(float(sum(loss for loss, _, _ in results)) / frames / math.log(2), abs=1e-3)
    targets = torch.cat([o["targets_m"][0] for o in outputs])
    codes = torch.cat([o["logits_m"][0].argmax(-1) for o in outputs])
    assert logged["correct_m_0"] == pytest.approx((codes == targets).double().mean().item(), abs=1e-4)
    assert logged["majority_m_0"] == pytest.approx(targets.bincount().max().item() / targets.numel(), abs=1e-4)
    share = codes.bincount().double() / codes.numel()
    assert logged["code_ppl_0"] == pytest.approx(math.prod(float(p) ** -float(p) for p in share if p > 0), abs=1e-2)
    assert not any(key.startswith("_") for key in logged)
    restored = json.loads(json.dumps(logged))  # plain numbers: any progress format can print them
    assert restored == logged


def test_meters_survive_a_checkpoint(tmp_path: Path) -> None:
    criterion = HubertEffCriterion(None, 1.0, 0.0)
    _, _, log = criterion(FixedOutput([made_up(9, 4)]), {"target_list": None, "net_input": NOISE, "id": torch.arange(1)})
    metrics.reset()
    with metrics.aggregate("interval"):
        criterion.reduce_metrics([log])
    before = metrics.get_smoothed_values("interval")
    torch.save(metrics.state_dict(), tmp_path / "meters.pt")
    metrics.load_state_dict(torch.load(tmp_path / "meters.pt", weights_only=True))
    with metrics.aggregate("interval"):
        criterion.reduce_metrics([{key: value * 0 for key, value in log.items()}])
    after = metrics.get_smoothed_values("interval")
    for key in ("correct_m_0", "majority_m_0", "code_ppl_0", "label_ppl_0"):
        assert after[key] == before[key]


def test_perplexity_of_known_histograms() -> None:
    assert perplexity(torch.tensor([5, 5, 5, 5])) == pytest.approx(4)
    assert perplexity(torch.tensor([0, 9, 0])) == pytest.approx(1)


def test_criterion_refuses_a_loss_on_frames_that_the_model_skips() -> None:
    output = {**made_up(3, 3), "logits_m": None, "targets_m": None}
    with pytest.raises(UserError, match="skip_masked"):
        HubertEffCriterion(None, 1.0, 0.0)(FixedOutput([output]), {"target_list": None, "net_input": {}, "id": torch.arange(1)})
