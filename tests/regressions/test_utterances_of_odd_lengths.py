"""Recordings longer than a batch ended pre-training in a traceback, and utterances of one frame in advice that was wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hubert_eff.errors import UserError

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

from fairseq_plugins.data.checks import estimated_rate  # noqa: E402

from ..helpers.finetuning import make_data as make_spoken  # noqa: E402
from ..helpers.finetuning import make_task as make_finetuning  # noqa: E402
from ..helpers.pretraining import make_data, make_task  # noqa: E402


def batches(task: Any, max_tokens: int) -> list[Any]:
    return list(task.get_batch_iterator(task.dataset("train"), max_tokens=max_tokens, seed=1).next_epoch_itr())


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("limit", [32_000, None])
def test_a_recording_longer_than_a_batch_is_cropped(padded: bool, limit: int | None, tmp_path: Path, caplog: Any) -> None:
    data = make_data(tmp_path / "data", {"train": [1.0, 5.0, 1.5, 3.0], "valid": [5.0]})
    keys = (f"task.pad_audio={str(padded).lower()}", f"task.max_sample_size={limit or 'null'}", "dataset.max_tokens=48000")
    task, _ = make_task(data, *keys)
    task.load_dataset("train")
    found = batches(task, 48_000)
    assert sorted(int(i) for batch in found for i in batch["id"]) == [0, 1, 2, 3]
    assert all(batch["net_input"]["source"].numel() <= 48_000 for batch in found)
    longest = max(batch["net_input"]["source"].size(1) for batch in found)
    assert longest == (limit or 48_000)
    said = [record.message for record in caplog.records if "longer than a batch" in record.message]
    assert len(said) == (limit is None)
    if said:
        assert said[0].startswith("train: 1 of 4 utterances are longer than a batch (dataset.max_tokens=48000) and cropped")
        assert "'train1.wav' of 80000 samples" in said[0]


def test_limits_below_one_frame_are_refused(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", {"train": [1.0], "valid": [1.0]})
    for key in ("dataset.max_tokens", "task.max_sample_size"):
        with pytest.raises(UserError, match=f"{key}=399 samples are too few for one frame, which needs 400"):
            make_task(data, f"{key}=399")[0].load_dataset("train")
    make_task(data, "dataset.max_tokens=400")[0].load_dataset("train")


def test_utterances_without_a_frame_are_left_out(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", {"train": [1.0, 0.0249, 0.5], "valid": [0.02]})
    for labels in (data / "train.km", data / "valid.km"):
        labels.write_text("\n".join(line or "0" for line in labels.read_text().split("\n")[:-1]) + "\n")
    task, _ = make_task(data, "task.min_sample_size=null")
    task.load_dataset("train")
    assert task.dataset("train").audio_names == ["train0.wav", "train2.wav"]
    with pytest.raises(UserError, match="none of its 1 utterances"):
        task.load_dataset("valid")


def test_utterances_of_one_frame_are_taken_as_they_are(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", {"train": [0.025] * 6, "valid": [0.03]})
    task, cfg = make_task(data, "task.min_sample_size=null", "model.dropout=0")
    model = task.build_model(cfg.model)
    task.load_dataset("train")
    (batch,) = batches(task, 48_000)
    loss, count, _ = task.build_criterion(cfg.criterion)(model, batch)
    assert count == 6 and bool(torch.isfinite(loss))


def test_the_rate_of_labels_is_told_by_utterances_that_are_long_enough() -> None:
    for rate in (50, 100):
        for seconds in (0.2, 0.31, 1.0, 17.0):
            samples = [int(seconds * 16_000) + 37 * i for i in range(20)]
            assert estimated_rate([(n - 400) * rate // 16_000 + 1 for n in samples], samples) == rate
            assert estimated_rate([n * rate // 16_000 for n in samples], samples) == rate
    assert estimated_rate([1] * 8, [400] * 8) == 0
    assert estimated_rate([1] * 8 + [98], [400] * 8 + [16_000]) == 100


@pytest.mark.parametrize(("tokens", "kept"), [(17_000, [0]), (16_000 * 9, [0, 1, 2, 3, 4]), (900, None)])
def test_a_transcribed_recording_longer_than_a_batch_is_left_out_and_named(
    tokens: int, kept: list[int] | None, tmp_path: Path, caplog: Any
) -> None:
    data = make_spoken(tmp_path / "data", {"train": ["one", "two", "ten", "two two", "one"], "valid": ["one"]})
    task, cfg = make_finetuning(
        "debug", f"task.data={data}", "model.w2v_path=null", "model.preset=conformer-debug", f"dataset.max_tokens={tokens}"
    )
    task.build_model(cfg.model)
    if kept is None:
        with pytest.raises(UserError, match=r"5 of 5 utterances are longer than a batch may be \(dataset.max_tokens=900 samples\)"):
            task.load_dataset("train")
        return
    task.load_dataset("train")
    assert task.dataset("train").kept == kept
    assert caplog.text.count("utterances are longer than a batch may be") == (len(kept) < 5)
