"""Fine-tuning tasks of fairseq over made-up data."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
from fairseq.dataclass.initialize import add_defaults, hydra_init  # noqa: E402
from fairseq.tasks import setup_task  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

import fairseq_plugins  # noqa: E402, F401

from .paths import ROOT  # noqa: E402

CONFIGS = ROOT / "configs" / "finetune"
TEXTS = ["one two", "two", "no one", "two two", "ten"]


def make_data(folder: Path, texts: dict[str, list[str]]) -> Path:
    """Noise of 1 to 1.4 s with transcripts, as `hubert-eff manifest` writes them."""
    rng = np.random.default_rng(0)
    (folder / "audio").mkdir(parents=True)
    parts = ["utterance\tstart\tend\tsource\ttranscript"]
    for split, said in texts.items():
        rows = [str(folder / "audio")]
        for i, text in enumerate(said):
            name, samples = f"{split}{i}.wav", 16_000 + 1600 * i
            soundfile.write(folder / "audio" / name, rng.normal(0, 0.1, samples), 16_000)
            rows.append(f"{name}\t{samples}")
            parts += [f"{name}\t0\t1\t{name}\t{word}" for word in text.split()]
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    (folder / "parts.tsv").write_text("\n".join(parts) + "\n")
    return folder


@functools.cache
def by_hydra(name: str) -> Any:
    hydra_init(name)
    with initialize_config_dir(str(CONFIGS), version_base="1.1"):
        return compose(name, overrides=["common.user_dir=unused", "task.data=DIR", "model.w2v_path=FILE"])


def make_task(name: str, *changes: str) -> Any:
    """The task of a configuration with some keys changed, and the whole configuration."""
    cfg = copy.deepcopy(by_hydra(name))
    OmegaConf.set_struct(cfg, False)
    cfg = OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(changes)))
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    add_defaults(cfg)
    return setup_task(cfg.task), cfg
