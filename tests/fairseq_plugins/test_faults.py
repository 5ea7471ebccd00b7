"""What goes wrong while training runs: a full disk, files that vanish or are damaged, another number of ranks."""

from __future__ import annotations

import errno
import math
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from hubert_eff.errors import UserError

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

from fairseq import checkpoint_utils  # noqa: E402
from fairseq.data.iterators import EpochBatchIterator  # noqa: E402
from fairseq.file_io import PathManager  # noqa: E402
from fairseq.logging import metrics  # noqa: E402
from fairseq.trainer import Trainer  # noqa: E402

import fairseq_plugins  # noqa: E402, F401
from fairseq_plugins.runtime import resuming, stopping  # noqa: E402
from fairseq_plugins.tasks.safe import MAX_EMPTY, check_run  # noqa: E402

from ..helpers.pretraining import make_data, make_task  # noqa: E402

# -- checkpoints ---------------------------------------------------------------------------------------------------------


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what a disk that is nearly full does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("training", [False, True])
def test_without_room_the_checkpoint_before_stays_whole(
    training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stopping, "in_training_run", lambda: training)
    path = tmp_path / "checkpoint_last.pt"
    checkpoint_utils.torch_persistent_save({"model": torch.zeros(50_000)}, str(path))
    with room_for(100_000), pytest.raises(SystemExit if training else (OSError, RuntimeError)) as ended:
        checkpoint_utils.torch_persistent_save({"model": torch.ones(50_000)}, str(path))
    assert os.listdir(tmp_path) == ["checkpoint_last.pt"]
    assert torch.equal(torch.load(path)["model"], torch.zeros(50_000))
    if training:
        assert ended.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"fairseq-hydra-train: stopped: {path} cannot be written (File too large)")


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_under_a_second_name_is_whole_and_its_own(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: str) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    first, last = str(tmp_path / "checkpoint_1_2.pt"), str(tmp_path / "checkpoint_last.pt")
    (tmp_path / "checkpoint_last.pt.tmp").write_bytes(b"half")  # of a run of an earlier version that was killed
    checkpoint_utils.verify_checkpoint_directory(str(tmp_path))
    for value in (1.0, 2.0):
        checkpoint_utils.torch_persistent_save({"model": torch.tensor(value)}, first)
        assert PathManager.copy(first, last, overwrite=True)
        assert torch.load(last)["model"] == value and os.path.samefile(first, last) == links
    checkpoint_utils.torch_persistent_save({"model": torch.tensor(3.0)}, first)
    assert torch.load(last)["model"] == 2.0
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_1_2.pt", "checkpoint_last.pt"]


class Hostile:
    """What a pickle runs when it is loaded without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_checkpoint_with_code_is_refused_as_init_from_and_runs_nothing(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", {"train": [1.0], "valid": [1.0]})
    torch.save({"model": {}, "cfg": Hostile(tmp_path / "ran")}, tmp_path / "hostile.pt")
    task, cfg = make_task(data, f"task.init_from={tmp_path / 'hostile.pt'}")
    with pytest.raises(UserError, match="task.init_from=.*hostile.pt is refused: it holds pickled code"):
        task.build_model(cfg.model)
    assert not (tmp_path / "ran").exists()


def test_a_finished_run_makes_no_update_more(monkeypatch: pytest.MonkeyPatch) -> None:
    training = ModuleType("fairseq_cli.train")  # the real one would make this process a training run
    training.train = lambda cfg, trainer, *rest: "trained"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fairseq_cli.train", training)
    resuming.leave_finished_runs()
    trainer = SimpleNamespace(get_num_updates=lambda: 5)
    for wanted, outcome in ((5, ([None], True)), (4, ([None], True)), (6, "trained"), (0, "trained")):
        cfg = SimpleNamespace(optimization=SimpleNamespace(max_update=wanted))
        assert training.train(cfg, trainer, None, None) == outcome  # type: ignore[attr-defined]


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run cannot be made: Not a directory"):
        checkpoint_utils.verify_checkpoint_directory(str(tmp_path / "file" / "run"))
    checkpoint_utils.verify_checkpoint_directory(str(tmp_path / "new" / "run"))
    assert os.listdir(tmp_path / "new" / "run") == []


# -- audio ---------------------------------------------------------------------------------------------------------------


def damage(folder: Path, what: str, name: str = "train2.wav") -> str:
    """Do something to one file of the corpus; what is said about it then."""
    file = folder / "audio" / name
    if what == "vanished":
        file.unlink()
        return "cannot be read as audio"
    if what == "truncated":
        wav, rate = soundfile.read(file)
        soundfile.write(file, wav, rate, format="FLAC")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        return "cannot be read as audio|samples, not"
    if what == "shorter":
        wav, rate = soundfile.read(file)
        soundfile.write(file, wav[:-100], rate)
        return "samples, not 24000 as its manifest says"
    soundfile.write(file, np.full(24_000, np.nan), 16_000, subtype="FLOAT")
    return "holds samples that are not finite"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data", {"train": [1.0, 2.0, 1.5, 2.0, 2.0, 1.2], "valid": [1.0, 1.1]})


@pytest.mark.parametrize("what", ["vanished", "truncated", "shorter", "not finite"])
def test_files_that_go_bad_while_training_runs_are_named_and_stop_it_or_are_skipped(
    what: str, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for kind in ("stop", "skip"):
        task, _ = make_task(data, f"task.bad_audio={kind}", "task.normalize=false")
        if kind == "stop":
            task.load_dataset("train")
            dataset, said = task.dataset("train"), damage(data, what)
        batch = dataset.collater([dataset[i] for i in (1, 2, 3)])
        assert batch["id"].tolist() == [1, 3] and len(batch["target_list"][0]) == 2
        if kind == "stop":
            with pytest.raises(UserError, match=f"train2.wav .*({said}).*task.bad_audio=skip"):
                task.note_unreadable(batch)
        else:
            task.note_unreadable(batch)
            task.note_unreadable(batch)
            (record,) = [r for r in caplog.records if "left out" in r.message]
            assert "train2.wav" in record.message and "(1 so far)" in record.message


@pytest.mark.parametrize("normalize", [False, True])
def test_samples_that_are_no_audio_are_named_rather_than_normalized_to_silence(normalize: bool, data: Path) -> None:
    task, _ = make_task(data, f"task.normalize={str(normalize).lower()}")
    task.load_dataset("train")
    samples = np.full(24_000, 0.1, np.float32)
    samples[77] = 1e38
    soundfile.write(data / "audio" / "train2.wav", samples, 16_000, subtype="FLOAT")
    assert "not finite or not audio" in task.dataset("train")[2]["unreadable"]


def test_checks_before_training_let_bad_files_pass_where_they_are_skipped(data: Path) -> None:
    damage(data, "vanished")
    damage(data, "shorter", "train4.wav")
    task, _ = make_task(data)
    with pytest.raises(UserError, match="1 of 6 audio files are missing"):
        task.load_dataset("train")
    task, _ = make_task(data, "task.bad_audio=skip")
    task.load_dataset("train")
    for file in (data / "audio").glob("train*"):
        file.unlink()
    with pytest.raises(UserError, match="6 of 6 audio files are missing"):
        task.load_dataset("train")


@pytest.fixture
def trainer(data: Path) -> Trainer:
    """A trainer of a Conformer with BatchNorm whose task skips bad files."""
    metrics.reset()
    task, cfg = make_task(
        data, "task.bad_audio=skip", "model.block_norm=batch_norm", "model.dropout=0", "model.attention_dropout=0",
        "optimizer.weight_decay=0",
    )  # fmt: skip
    task.load_dataset("train")
    made = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
    dataset = task.dataset("train")
    made.reset_dummy_batch(dataset.collater([dataset[0]]))
    made.lr_step_update()
    return made


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_a_batch_without_readable_files_counts_for_nothing(trainer: Trainer, data: Path) -> None:
    dataset = trainer.task.dataset("train")
    damage(data, "vanished")
    empty = dataset.collater([dataset[2]])
    assert list(empty) == ["unreadable"]
    before = state(trainer)
    with metrics.aggregate("train"):
        trainer.train_step([empty])
    assert trainer.get_num_updates() == 1  # no gradient, but the schedule goes on
    after = state(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    # beside another batch it does not change the update
    with metrics.aggregate("train"):
        trainer.train_step([empty, dataset.collater([dataset[0], dataset[1]])])
    assert trainer.task.empty == 0
    gradients = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.load_state_dict(before)
    trainer.set_num_updates(1)
    with metrics.aggregate("train"):
        trainer.train_step([dataset.collater([dataset[0], dataset[1]])])
    for one, other in zip(gradients, trainer.model.parameters()):
        torch.testing.assert_close(one, other.grad, rtol=1e-4, atol=1e-6)


def test_too_many_batches_without_readable_files_stop_the_run(trainer: Trainer, data: Path) -> None:
    dataset = trainer.task.dataset("train")
    damage(data, "vanished")
    empty = dataset.collater([dataset[2]])
    with metrics.aggregate("train"):
        for _ in range(MAX_EMPTY - 1):
            trainer.train_step([empty])
        with pytest.raises(UserError, match=rf"{MAX_EMPTY} batch.* in a row without a file that can be read, the last one .*train2.wav"):
            trainer.train_step([empty])
    trainer.reset_dummy_batch(empty)
    with pytest.raises(UserError, match="without a file that can be read"):
        trainer.train_step([empty])


def test_updates_without_a_finite_gradient_are_left_out_up_to_a_number_in_a_row(
    trainer: Trainer, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "in_training_run", lambda: True)  # elsewhere fairseq catches the error, and trains once more
    dataset = trainer.task.dataset("train")

    def update(value: float) -> None:
        batch = dataset.collater([dataset[0], dataset[1]])
        with metrics.aggregate("train"), monkeypatch.context() as patched:
            plain = trainer.criterion.forward

            def scaled(*args: Any) -> Any:
                loss, *rest = plain(*args)
                return loss * value, *rest

            patched.setattr(trainer.criterion, "forward", scaled)
            trainer.train_step([batch])

    def weights() -> dict[str, torch.Tensor]:
        return {name: weight.clone() for name, weight in trainer.model.named_parameters()}

    trainer.task.cfg.bad_updates = 2
    before = weights()
    update(math.nan), update(math.inf)
    assert trainer.get_num_updates() == 2 and all(torch.equal(before[name], weight) for name, weight in weights().items())
    said = [record.message for record in caplog.records if "task.bad_updates=2" in record.message]
    assert len(said) == 2 and "1 in a row" in said[0] and "2 in a row" in said[1]
    update(1.0)
    assert not torch.equal(before["mask_emb"], trainer.model.mask_emb) and all(torch.isfinite(w).all() for w in weights().values())
    update(math.nan), update(math.nan)
    with pytest.raises(SystemExit):
        update(math.nan)
    assert "stopped at update 5: the gradient norm is nan" in capsys.readouterr().err
    # running statistics that are not finite would stay so
    trainer.task.skipped = 0
    dict(trainer.model.named_buffers())["encoder.layers.0.conv_module.batch_norm.running_mean"].fill_(math.nan)
    with pytest.raises(SystemExit):
        update(math.nan)


# -- another number of ranks ----------------------------------------------------------------------------------------------


def epoch_iterator(ranks: int, rank: int, batches: int = 11) -> EpochBatchIterator:
    dataset = torch.utils.data.TensorDataset(torch.arange(batches))
    each = [[i] for i in range(batches)]
    return EpochBatchIterator(dataset, lambda samples: [int(x) for (x,) in samples], each, seed=3, num_shards=ranks, shard_id=rank)


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2), (1, 4), (4, 3), (2, 2)])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_an_epoch_is_finished_by_another_number_of_ranks(before: int, now: int, steps: int, caplog: pytest.LogCaptureFixture) -> None:
    def batches(iterators: list[EpochBatchIterator], count: int | None = None) -> list[int]:
        found: list[int] = []
        for iterator in iterators:
            epoch = iterator.next_epoch_itr()
            found += [batch[0] for _, batch in zip(range(count or len(epoch)), epoch) if batch]
        return found

    ranks = [epoch_iterator(before, rank) for rank in range(before)]
    steps = min(steps, len(ranks[0]) - 1)
    first = batches(ranks, steps)
    saved = ranks[0].state_dict()
    others = [epoch_iterator(now, rank) for rank in range(now)]
    for iterator in others:
        iterator.load_state_dict(saved)
    rest = batches(others)
    again = steps * before % now
    assert set(first) | set(rest) == set(range(11))
    assert len(first) + len(rest) == 11 + again
    said = [r.message for r in caplog.records if "go on from a checkpoint" in r.message]
    assert len(said) == (before != now)
    if said:
        assert f"{now} rank(s) go on from a checkpoint of {before}: in epoch 1, {steps * before} of 11 batches are done" in said[0]
        assert ("once more" in said[0]) == bool(again)


def test_a_checkpoint_that_does_not_say_its_number_of_ranks_is_taken_for_one_of_as_many() -> None:
    iterator: Any = epoch_iterator(2, 0)
    iterator.load_state_dict({"version": 2, "epoch": 1, "iterations_in_epoch": 2, "shuffle": True})
    assert iterator.iterations_in_epoch == 2


@pytest.mark.parametrize("half", ["fp16", "amp"])
def test_updates_are_left_out_by_one_side_only(half: str) -> None:
    cfg = SimpleNamespace(trends_interval=0, trends_input="batch", bad_updates=2, bad_audio="stop", cpu=True, fp16=False, amp=False)
    setattr(cfg, half, True)
    with pytest.raises(UserError, match="task.bad_updates=2 is for float32 and bf16"):
        check_run(cfg)
