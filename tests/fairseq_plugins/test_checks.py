"""Bad data and settings, each refused in one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from hubert_eff.errors import UserError

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
from fairseq.tasks import setup_task  # noqa: E402

import fairseq_plugins  # noqa: E402, F401

from ..helpers.pretraining import composed, make_task  # noqa: E402

# -- checks --------------------------------------------------------------------------------------------------------------


def edit(path: Path, change: Any) -> None:
    path.write_text(change(path.read_text()))


BAD_DATA = {
    "one label line short": (
        lambda d: edit(d / "train.km", lambda t: "\n".join(t.splitlines()[:-1]) + "\n"),
        "has 4 lines for the 5 utterances",
    ),
    "class beyond the dictionary": (
        lambda d: edit(d / "train.km", lambda t: t.replace(" 4", " 77", 1)),
        "line 1: class 77 is not among the 5",
    ),
    "labels of another length": (
        lambda d: edit(d / "train.km", lambda t: "\n".join([*t.splitlines()[:-1], "0 1 2 " * 40])),
        r"train.km line 5: 120 labels \(1.20 s",
    ),
    "no manifest": (lambda d: (d / "train.tsv").unlink(), "no manifest .*train.tsv"),
    "no labels": (lambda d: (d / "train.km").unlink(), "no labels .*train.km"),
    "no dictionary": (lambda d: (d / "dict.km.txt").unlink(), "no dictionary .*dict.km.txt"),
    "bad dictionary": (lambda d: (d / "dict.km.txt").write_text("0\n"), "not a fairseq dictionary"),
    "no audio": (lambda d: (d / "audio" / "train3.wav").unlink(), "1 of 5 audio files are missing .*first train3.wav"),
    "other audio": (lambda d: soundfile.write(d / "audio" / "train0.wav", np.zeros(99), 16_000), "99 samples, not 16000"),
    "other rate": (lambda d: soundfile.write(d / "audio" / "train0.wav", np.zeros(16_000), 8_000), "8000 Hz"),
    "damaged audio": (lambda d: (d / "audio" / "train0.wav").write_bytes(b""), "cannot be read as audio"),
    "empty manifest": (lambda d: edit(d / "train.tsv", lambda t: t.splitlines()[0] + "\n"), "lists no utterance"),
    "malformed manifest": (lambda d: edit(d / "train.tsv", lambda t: t.replace("\t", " ")), "line 2: expected a path, a tab"),
    "recorded rate": (
        lambda d: (d / "labels.json").write_text('{"rate": 50, "source": "layer 6"}'),
        "made at 50 per second from layer 6",
    ),
    "recorded clusters": (
        lambda d: (d / "labels.json").write_text('{"rate": 100, "k": 7, "source": "mfcc"}'),
        "labels.json has 7 clusters, but the dictionary beside it has 5 classes",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_clear_line(case: str, data: Path) -> None:
    damage, message = BAD_DATA[case]
    damage(data)
    with pytest.raises(UserError, match=message) as error:
        task, _ = make_task(data)
        task.load_dataset("train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.label_rate=50", "about 100 per second: set task.label_rate=100"),
        ("task.label_rate=-1", "labels come at a fixed rate"),
        ("task.min_sample_size=90000", "none of its 5 utterances"),
        ("task.data=nowhere", "nowhere is not a directory"),
        ("task.label_dir=nowhere", "nowhere is not a directory"),
        ("task.fine_tuning=true", "fine_tuning"),
        ("common.fp16=true", "needs a GPU"),
        ("model.depthwise_kernel_size=15", "unknown key of hubert_conformer .* did you mean 'depthwise_conv_kernel_size'"),
        ("optimizer.weight_decy=0.1", "did you mean 'weight_decay'"),
        ("model.encoder_layers=many", "hubert_conformer: encoder_layers: .*could not be converted to Integer"),
        ("model.pos_enc_type=[rel_pos]", "hubert_conformer: pos_enc_type: "),
    ],
)
def test_bad_setting_is_one_clear_line(override: str, message: str, data: Path) -> None:
    with pytest.raises(UserError, match=message):
        task, _ = make_task(data, override)
        task.load_dataset("train")


def test_a_task_from_a_checkpoint_needs_no_data() -> None:
    assert setup_task(composed("debug", "task.data=nowhere", "common.fp16=true").task, from_checkpoint=True)


def test_a_loss_that_is_not_finite_names_update_and_utterances(data: Path) -> None:
    task, cfg = make_task(data)
    task.last_batch = torch.arange(11)
    task.check_finite("the loss", torch.tensor(3.0), 5)
    with pytest.raises(FloatingPointError, match="stopped at update 5: the loss is nan .*utterances 0, 1, 2, 3, 4, 5, 6, 7 and 3 more"):
        task.check_finite("the loss", torch.tensor(math.nan), 5)
