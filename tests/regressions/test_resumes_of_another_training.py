"""A run went on from a checkpoint of other settings or data without a word, and of other batches at the wrong place in the epoch."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from hubert_eff.errors import UserError

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

from fairseq.data.iterators import EpochBatchIterator, GroupedIterator  # noqa: E402
from fairseq.logging import metrics  # noqa: E402
from fairseq.trainer import Trainer  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402

from fairseq_plugins.runtime import resuming  # noqa: E402

from ..helpers.paths import ROOT  # noqa: E402
from ..helpers.pretraining import CONFIGS, make_data, make_task  # noqa: E402
from ..helpers.processes import Training  # noqa: E402

SECONDS = {"train": [0.6 + 0.05 * i for i in range(16)], "valid": [1.0]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("resuming") / "data", SECONDS)


def trainer_of(data: Path, *changes: str) -> Trainer:
    metrics.reset()
    task, cfg = make_task(data, "lr_scheduler.total_num_update=${optimization.max_update}", *changes)
    model = task.build_model(cfg.model)
    task.load_dataset("valid")
    return Trainer(cfg, task, model, task.build_criterion(cfg.criterion))


@pytest.fixture(scope="module")
def saved(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "checkpoint_last.pt"
    trainer = trainer_of(data, "model.quant=none")
    trainer.load_checkpoint(str(path))  # none is there; what every run does first
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(str(path), {"train_iterator": {"epoch": 1, "version": 2, "iterations_in_epoch": 0}})
    return path


# -- settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("optimization.lr=[0.0001]",), "optimization.lr=[0.006], now [0.0001]:"),
        (("common.seed=2", "model.dropout=0.2"), "common.seed=1, now 2; model.dropout=0.1, now 0.2:"),
        (("model.encoder_layers=3",), "model.encoder_layers=2, now 3:"),
        (
            ("criterion.pred_nomask_weight=0.0", "task.min_sample_size=9000", "lr_scheduler.warmup_updates=21"),
            "task.min_sample_size=8000, now 9000; criterion.pred_nomask_weight=1.0, now 0.0; lr_scheduler.warmup_updates=20, now 21:",
        ),
    ],
)
def test_other_settings_are_refused(changes: Any, said: str, data: Path, saved: Path) -> None:
    with pytest.raises(UserError) as caught:
        trainer_of(data, *changes).load_checkpoint(str(saved))
    message = str(caught.value)
    assert f"{saved} belongs to another training, with {said} give another checkpoint.save_dir" in message and "\n" not in message
    assert "task.resume_changed=true" in message


def test_what_may_change_is_logged(data: Path, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer_of(
        data, "optimization.max_update=900", "checkpoint.save_interval_updates=7", "dataset.num_workers=0", "dataset.max_tokens=64000",
        "checkpoint.save_dir=/elsewhere/run", "common.log_interval=3", "optimization.update_freq=[2]",
    ).load_checkpoint(str(saved))  # fmt: skip
    (line,) = [r.message for r in caplog.records if "was made with other settings: " in r.message]
    assert sorted(line.partition("settings: ")[2].split("; ")) == [
        'checkpoint.save_dir="checkpoints/debug", now "run"', "checkpoint.save_interval_updates=125, now 7",
        "common.log_interval=50, now 3", "dataset.max_tokens=512000, now 64000", "dataset.num_workers=1, now 0",
        "optimization.max_update=750, now 900", "optimization.update_freq=[1], now [2]",
    ]  # fmt: skip


def test_changed_settings_are_taken_where_that_is_asked_for(data: Path, saved: Path) -> None:
    trainer = trainer_of(data, "optimizer.weight_decay=0.1", "optimizer.adam_betas='(0.5,0.6)'", "task.resume_changed=true")
    trainer.load_checkpoint(str(saved))
    (group,) = trainer.optimizer.param_groups
    assert group["weight_decay"] == 0.1 and tuple(group["betas"]) == (0.5, 0.6)  # fairseq keeps those of the checkpoint
    with pytest.raises(UserError, match="does not fit the model, criterion, optimizer or precision"):
        trainer_of(data, "model.encoder_layers=3", "task.resume_changed=true").load_checkpoint(str(saved))
    trainer_of(data, "common.seed=2").load_checkpoint(str(saved), reset_optimizer=True)  # not to go on: to start from its weights


def test_data_are_known_by_what_they_hold(data: Path, saved: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    table = (moved / "train.tsv").read_text()
    (moved / "train.tsv").write_text(f"{moved}/audio\n{table.partition(chr(10))[2]}")
    trainer_of(moved).load_checkpoint(str(saved))
    (moved / "train.km").write_text((moved / "train.km").read_text()[::-1].strip() + "\n")
    with pytest.raises(UserError, match="belongs to another training, with another train.km: "):
        trainer_of(moved).load_checkpoint(str(saved))
    shutil.copy(data / "train.km", moved)
    rows = table.splitlines()
    (moved / "train.tsv").write_text("\n".join([rows[0], rows[2], rows[1], *rows[3:]]) + "\n")
    with pytest.raises(UserError, match="belongs to another training, with another train.tsv: "):
        trainer_of(moved).load_checkpoint(str(saved))


def test_settings_of_groups_and_of_encoders_in_text_count() -> None:
    before = {
        "optimizer": {"groups": {"scales": {"optimizer": {"lr": [1]}, "lr_scheduler": {"total_num_update": 5}}}},
        "model": {"encoder_config": '{"dropout": 0.1, "compile_blocks": false}', "dropout": 0.1}, "optimization": {"max_update": 5},
    }  # fmt: skip
    now = {
        "optimizer": {"groups": {"scales": {"optimizer": {"lr": [2]}, "lr_scheduler": {"total_num_update": 6}}}},
        "model": {"encoder_config": '{"dropout": 0.2, "compile_blocks": true}', "dropout": 0.2}, "optimization": {"max_update": 6},
    }  # fmt: skip
    found = resuming.differences(before, now)
    assert found == {
        "optimizer.groups.scales.optimizer.lr": ([1], [2]), "model.dropout": (0.1, 0.2),
        "model.encoder_config.compile_blocks": (False, True), "optimization.max_update": (5, 6),
    }  # fmt: skip
    assert [key for key in found if resuming.is_binding(key)] == ["optimizer.groups.scales.optimizer.lr", "model.dropout"]


# -- batches -------------------------------------------------------------------------------------------------------------


def iterator(data: Path, max_tokens: int, ranks: int = 1, rank: int = 0) -> EpochBatchIterator:
    task, _ = make_task(data)
    task.load_dataset("train")
    return task.get_batch_iterator(task.dataset("train"), max_tokens=max_tokens, num_shards=ranks, shard_id=rank, seed=1)


def utterances(batches: Any, count: int | None = None) -> list[int]:
    return [int(i) for _, batch in zip(range(count or 10_000), batches) if batch for i in batch["id"]]


@pytest.mark.parametrize(("before", "now"), [(60_000, 30_000), (30_000, 100_000), (100_000, 60_000)])
def test_an_epoch_is_finished_in_batches_of_another_size(before: int, now: int, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = iterator(data, before)
    done = utterances(first.next_epoch_itr(), 2)
    second = iterator(data, now)
    second.load_state_dict(first.state_dict())
    assert f"in epoch 1, {len(done)} of 16 utterances are done, the others follow" in caplog.text
    epoch = second.next_epoch_itr()
    some = utterances(epoch, 1)
    # stopped once more, and gone on from: as it is, and on two ranks with batches of a third size
    third, state = iterator(data, now), second.state_dict()
    third.load_state_dict(state)
    rest = utterances(third.next_epoch_itr())
    assert sorted(done + some + rest) == list(range(16)) and rest == utterances(epoch)
    ranks = [iterator(data, 45_000, ranks=2, rank=rank) for rank in range(2)]
    for one in ranks:
        one.load_state_dict(state)
    last = [i for one in ranks if one.epoch == 1 for i in utterances(one.next_epoch_itr())]
    assert sorted(done + some + last) == list(range(16))
    if third.end_of_epoch():
        assert sorted(utterances(third.next_epoch_itr())) == list(range(16)) and third.epoch == 2
    assert "before" not in third.state_dict()


def test_the_same_batches_go_on_as_they_were(data: Path) -> None:
    whole = utterances(iterator(data, 60_000).next_epoch_itr())
    first, second = iterator(data, 60_000), iterator(data, 60_000)
    done = utterances(first.next_epoch_itr(), 2)
    second.load_state_dict(torch.load(_file(first.state_dict()), weights_only=True))
    assert done + utterances(second.next_epoch_itr()) == whole


def _file(state: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_a_checkpoint_of_an_earlier_version_that_is_past_the_end_begins_the_next_epoch(data: Path) -> None:
    late = iterator(data, 16_000 * 16)
    late.load_state_dict({"version": 2, "epoch": 3, "iterations_in_epoch": 9, "shuffle": True, "num_shards": 1})
    assert sorted(utterances(late.next_epoch_itr())) == list(range(16)) and late.epoch == 4


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("batches", "done", "group"), [(11, 5, 4), (11, 4, 3), (11, 8, 2), (9, 0, 2), (7, 6, 4)])
def test_no_batch_is_left_when_those_of_an_update_are_counted(batches: int, done: int, group: int, skip: bool) -> None:
    each = [[i] for i in range(batches)]
    epoch = EpochBatchIterator(torch.utils.data.TensorDataset(torch.arange(batches)), len, each, seed=3)
    if done:
        epoch.load_state_dict({"version": 2, "epoch": 1, "iterations_in_epoch": done, "shuffle": True})
    groups = GroupedIterator(epoch.next_epoch_itr(), group, skip_remainder_batch=skip)
    found = [len(chunk) for chunk in groups]
    left = batches - done
    assert sum(found) == (left // group * group if skip else left) and set(found[:-1]) <= {group}
    assert not groups.has_next() and epoch.end_of_epoch()


# -- sweeps --------------------------------------------------------------------------------------------------------------


def test_a_job_is_known_also_in_a_process_that_fairseq_has_spawned(tmp_path: Path) -> None:
    assert not HydraConfig.initialized()
    log = tmp_path / "hydra_train.log"
    cfg = OmegaConf.create({"job_logging_cfg": {"handlers": {"file": {"filename": str(log)}}}})
    assert resuming._job_number(cfg) is None
    (tmp_path / ".hydra").mkdir()
    for mode, word, number in (
        ("MULTIRUN", "checkpoint.save_dir=a", 3), ("RUN", "checkpoint.save_dir=a", None),
        ("MULTIRUN", "checkpoint.save_dir=a-${hydra:job.num}", None),
    ):  # fmt: skip
        hydra = {"mode": mode, "job": {"num": 3}, "overrides": {"task": [word, "common.seed=2"]}}
        OmegaConf.save(OmegaConf.create({"hydra": hydra}), tmp_path / ".hydra" / "hydra.yaml")
        assert resuming._job_number(cfg) == number
    assert resuming._job_number(OmegaConf.create({})) is None


@pytest.mark.long
def test_each_job_of_a_sweep_trains_in_a_folder_of_its_own(data: Path, tmp_path: Path) -> None:
    arguments = (
        "-m", "--config-dir", str(CONFIGS), "--config-name", "debug", f"common.user_dir={ROOT / 'fairseq_plugins'}", f"task.data={data}",
        f"task.label_dir={data}", f"checkpoint.save_dir={tmp_path / 'sweep'}", f"hydra.sweep.dir={tmp_path / 'hydra'}",
        "optimization.max_update=1", "dataset.num_workers=0", "optimization.lr=[0.006],[0.0001]",
    )  # fmt: skip
    done = Training(*arguments).end()
    assert done.returncode == 0, done.stderr
    rates = [torch.load(tmp_path / "sweep" / n / "checkpoint_best.pt")["cfg"]["optimization"]["lr"] for n in "01"]
    assert rates == [[0.006], [0.0001]]
    assert all("checkpoint_best.pt" in (tmp_path / "sweep" / n / "hydra_train.log").read_text() for n in "01")
    assert not list((tmp_path / "sweep").glob("*.pt"))
