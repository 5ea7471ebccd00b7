"""Configurations of binarized models as fairseq completes them, a teacher, and what a training of one is made of."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest

import hubert_eff

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

from fairseq.dataclass.initialize import hydra_init  # noqa: E402
from fairseq.tasks import setup_task  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from .checkpoints import checkpoint  # noqa: E402
from .paths import ROOT  # noqa: E402
from .pretraining import CLASSES, completed  # noqa: E402

CONFIGS = ROOT / "configs"


@functools.cache
def by_hydra(group: str, name: str) -> Any:
    hydra_init(name)
    with initialize_config_dir(str(CONFIGS / group), version_base="1.1"):
        given = ["criterion.teacher=T"] if name.endswith("_distill") else []
        return compose(name, ["common.user_dir=DIR", "task.data=DIR", "task.label_dir=DIR", *given])


def composed(group: str, name: str, *overrides: str) -> Any:
    """A configuration with some keys changed, as fairseq completes it."""
    cfg = copy.deepcopy(by_hydra(group, name))
    OmegaConf.set_struct(cfg, False)
    return completed(OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(overrides))))


def teacher(data: Path, **keys: Any) -> Path:
    given = {"num_classes": (CLASSES + 4,), "label_rate": 100.0, "normalize": True, **keys}
    name = "-".join(map(str, given.values()))
    return checkpoint(hubert_eff.build("conformer-debug", **given), data / f"{name}.pt")


def parts(data: Path, *overrides: str, name: str = "debug_distill") -> tuple[Any, Any, Any, dict[str, Any]]:
    """Configuration, model, criterion and a batch."""
    cfg = composed("quantize", name, f"task.data={data}", f"task.label_dir={data}", *overrides)
    task = setup_task(cfg.task)
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    return cfg, model, criterion, dataset.collater([dataset[0], dataset[1]])
