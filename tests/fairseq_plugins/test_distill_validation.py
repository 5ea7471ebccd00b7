"""The loss of a distillation's validation is that of all its frames: batches of any size come to the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hubert_eff
from hubert_eff.models.hubert import HubertModel
from hubert_eff.models.output import HubertOutput

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

from fairseq.dataclass.initialize import hydra_init  # noqa: E402
from fairseq.logging import metrics  # noqa: E402
from fairseq.tasks import setup_task  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from ..helpers.checkpoints import checkpoint  # noqa: E402
from ..helpers.paths import ROOT  # noqa: E402
from ..helpers.pretraining import CLASSES, completed, make_data  # noqa: E402

LENGTHS = [0.6, 0.75, 1.9, 1.2, 2.6, 0.64]
MASKED = {"pred_masked_weight": 0.0, "pred_nomask_weight": 0.0, "codebook_weight": 0.5, "codebook_nomask_weight": 0.0, "hidden_weight": 2.0}


class Uneven(nn.Module):
    """A student that is the farther from its teacher the higher the number of the utterance."""

    def __init__(self, model: HubertModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> HubertOutput:
        output: HubertOutput = self.model(**inputs)
        assert output.states is not None
        output.states = [state + 0.2 * inputs["sample_ids"].view(-1, 1, 1) for state in output.states]
        return output


@pytest.mark.parametrize("normalize", [False, True])
def test_the_loss_is_that_of_any_batch(normalize: bool, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", {"train": [1.0], "valid": LENGTHS})
    teacher = checkpoint(hubert_eff.build("conformer-debug", (CLASSES + 4,), label_rate=100.0, normalize=True), tmp_path / "teacher.pt")
    hydra_init("debug_distill")
    with initialize_config_dir(str(ROOT / "configs" / "quantize"), version_base="1.1"):
        given = ["common.user_dir=DIR", f"task.data={data}", f"task.label_dir={data}", f"criterion.teacher={teacher}"]
        cfg = copy.deepcopy(compose("debug_distill", given))
    OmegaConf.set_struct(cfg, False)
    cfg = completed(OmegaConf.merge(cfg, {"task": {"init_from": None}, "criterion": {"hidden_normalize": normalize, **MASKED}}))
    task = setup_task(cfg.task)
    torch.manual_seed(1)
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    task.load_dataset("valid")
    dataset: Any = task.dataset("valid")
    items = [dataset[i] for i in range(len(LENGTHS))]
    model.train()(**dataset.collater(items)["net_input"], features_only=True)  # scales
    student = Uneven(model).eval()

    def validated(size: int) -> dict[str, float]:
        metrics.reset()
        with metrics.aggregate("valid") as found, torch.no_grad():
            for first in range(0, len(items), size):
                _, _, log = criterion(student, dataset.collater(items[first : first + size]))
                criterion.reduce_metrics([log])
        values = found.get_smoothed_values()
        return {key: values[key] for key in ("loss", "loss_kl", "hidden_mse", "correct_t_0")}

    expected = validated(1)
    assert expected["hidden_mse"] > 0.01
    assert expected["loss"] == pytest.approx(0.5 * expected["loss_kl"] + 2 * expected["hidden_mse"] / 0.6931, rel=0.02, abs=0.01)
    for size in (2, 4, 6):
        assert validated(size) == pytest.approx(expected, rel=2e-3, abs=2e-3), size
