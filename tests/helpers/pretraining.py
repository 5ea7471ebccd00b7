"""A pre-training task of fairseq over made-up data, configurations as hydra composes them, and runs of fairseq-hydra-train."""

from __future__ import annotations

import copy
import functools
import json
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import hubert_eff

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
from fairseq.dataclass.configs import FairseqConfig  # noqa: E402
from fairseq.dataclass.initialize import add_defaults, hydra_init  # noqa: E402
from fairseq.tasks import setup_task  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

import fairseq_plugins  # noqa: E402, F401

from .paths import ROOT  # noqa: E402
from .processes import Training  # noqa: E402

CONFIGS = ROOT / "configs" / "pretrain"
CLASSES = 5


def make_data(folder: Path, seconds: dict[str, list[float]], rate: int = 100) -> Path:
    """Noise with class labels at `rate`, as `hubert-eff manifest` and `labels` would write them."""
    rng = np.random.default_rng(0)
    (folder / "audio").mkdir(parents=True)
    for split, lengths in seconds.items():
        rows, labels = [str(folder / "audio")], []
        for i, length in enumerate(lengths):
            samples = int(length * 16_000)
            soundfile.write(folder / "audio" / f"{split}{i}.wav", rng.normal(0, 0.1, samples), 16_000)
            rows.append(f"{split}{i}.wav\t{samples}")
            labels.append(" ".join(map(str, rng.integers(0, CLASSES, (samples - 400) * rate // 16_000 + 1))))
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")
        (folder / f"{split}.km").write_text("\n".join(labels) + "\n")
    (folder / "dict.km.txt").write_text("".join(f"{i} 1\n" for i in range(CLASSES)))
    return folder


@functools.cache
def by_hydra(name: str, *overrides: str) -> Any:
    """A configuration as hydra composes it for fairseq-hydra-train."""
    hydra_init(name)
    with initialize_config_dir(str(CONFIGS), version_base="1.1"):
        return compose(name, overrides=["common.user_dir=unused", "task.data=DIR", "task.label_dir=DIR", *overrides])


def completed(cfg: Any) -> Any:
    """What fairseq makes of it: resolved, completed by fairseq's dataclasses."""
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    add_defaults(cfg)
    return cfg


def composed(name: str, *overrides: str) -> Any:
    return completed(by_hydra(name, *overrides))


def make_task(data: Path, *changes: str, config: str = "debug") -> Any:
    """The task of a configuration with some keys changed, and the whole configuration."""
    cfg = copy.deepcopy(by_hydra(config))
    OmegaConf.set_struct(cfg, False)
    cfg = completed(OmegaConf.merge(cfg, OmegaConf.from_dotlist([f"task.data={data}", f"task.label_dir={data}", *changes])))
    return setup_task(cfg.task), cfg


def start(data: Path, save_dir: Path, *overrides: str) -> Training:
    """A run of debug.yaml: three batches per epoch, crops, one loading process, every update logged as JSON."""
    return Training(
        "--config-dir", str(ROOT / "configs" / "pretrain"), "--config-name", "debug",
        f"common.user_dir={ROOT / 'fairseq_plugins'}", f"task.data={data}", f"task.label_dir={data}",
        f"checkpoint.save_dir={save_dir}", "common.log_format=json", "common.log_interval=1", "task.pad_audio=false",
        "dataset.max_tokens=64000", "optimization.max_update=8", *overrides,
    )  # fmt: skip


def run(data: Path, save_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The run to its end."""
    return start(data, save_dir, *overrides).end()


def two_ranks(data: Path, save_dir: Path, *overrides: str) -> list[Training]:
    """The run on two ranks that meet at a free port, one process each, without a GPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = [
        "dataset.max_tokens=32000", "distributed_training.distributed_world_size=2", "distributed_training.distributed_backend=gloo",
        "distributed_training.distributed_no_spawn=true", f"distributed_training.distributed_init_method=tcp://127.0.0.1:{port}",
    ]  # fmt: skip
    return [start(data, save_dir, *shared, *overrides, f"distributed_training.distributed_rank={rank}") for rank in range(2)]


def logged(output: str, key: str = "loss") -> dict[int, float]:
    """Value of a key of the training log by update."""
    values = {}
    for line in output.splitlines():
        record = re.search(r"\{.*\}$", line)
        if record and "[train_inner]" in line:
            entry = json.loads(record[0])
            values[int(entry["num_updates"])] = float(entry[key])
    return values


def update_made(update: int) -> Callable[[str], bool]:
    """Whether a line of the log says that `update` has been made."""
    return lambda line: "[train_inner]" in line and f'"num_updates": "{update}"' in line


def weights(save_dir: Path) -> dict[str, torch.Tensor]:
    return hubert_eff.load(save_dir / "checkpoint_last.pt").state_dict()


def fairseq_config(*changes: str) -> DictConfig:
    base = OmegaConf.structured(FairseqConfig)
    OmegaConf.set_struct(base, False)
    sections = {"optimizer": {"_name": "scaled_adam"}, "lr_scheduler": {"_name": "eden"}, "optimization": {"lr": [0.045]}}
    return OmegaConf.merge(base, sections, OmegaConf.from_dotlist(list(changes)))
