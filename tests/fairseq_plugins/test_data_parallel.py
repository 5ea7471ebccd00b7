"""Two ranks compute what one does: gradients, statistics, masks, and the rest of an epoch that another number of ranks began."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

from fairseq import checkpoint_utils  # noqa: E402
from fairseq.data.iterators import GroupedIterator  # noqa: E402
from fairseq.logging import metrics  # noqa: E402
from fairseq.trainer import Trainer  # noqa: E402

import fairseq_plugins  # noqa: E402, F401

from ..helpers.pretraining import make_data, make_task  # noqa: E402

RANKS = 2
ENCODERS = {
    "transformer": ("transformer_debug", []),
    "conformer with BatchNorm": ("debug", ["model.block_norm=batch_norm"]),
    "fusionformer": ("fusionformer_debug", []),
}
BACKENDS = ("legacy_ddp", "pytorch_ddp")
# what is random per process, or a mean over a rank's own batch, as fairseq's feature penalty is
PLAIN = [
    "model.dropout=0", "model.attention_dropout=0", "model.activation_dropout=0", "model.encoder_layerdrop=0",
    "criterion.loss_weights=null", "optimization.clip_norm=0", "dataset.num_workers=0", "task.max_sample_size=null",
    "task.random_crop=false",
]  # fmt: skip
# utterances of each rank, of other lengths and numbers; in the second update rank 1 has none, in the third neither has
UPDATES = [([0, 1], [2, 3, 4]), ([5, 0], []), ([], [])]


def make_trainer(data: Path, config: str, ranks: int, *changes: str) -> Trainer:
    """A trainer of `ranks` processes, the same weights in all."""
    metrics.reset()
    torch.manual_seed(0)
    task, cfg = make_task(data, *PLAIN, f"distributed_training.distributed_world_size={ranks}", *changes, config=config)
    task.load_dataset("train")
    return Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))


def updates(data: Path, encoder: str, backend: str, ranks: int, rank: int) -> list[dict[str, Tensor]]:
    """Gradients and buffers after each of `UPDATES`, the learning rate being 0."""
    config, keys = ENCODERS[encoder]
    trainer = make_trainer(data, config, ranks, *keys, f"distributed_training.ddp_backend={backend}", "optimization.lr=[0.0]")
    dataset = trainer.task.dataset("train")
    trainer.reset_dummy_batch(dataset.collater([dataset[3]]))
    found = []
    for parts in UPDATES:
        numbers = parts[rank] if ranks > 1 else [i for part in parts for i in part]
        with metrics.aggregate("train"):
            trainer.train_step([dataset.collater([dataset[i] for i in numbers])])
        core = trainer.get_model()
        values = {name: parameter.grad for name, parameter in core.named_parameters()}
        found.append({name: value.clone() for name, value in (*values.items(), *core.named_buffers()) if value.is_floating_point()})
    return found


def finish_epoch(data: Path, start: Path, out: Path, ranks: int, update_freq: int, count: int) -> dict[str, Any]:
    """Go on from a checkpoint (or begin) for `count` updates, and save to `out`; what the model is then."""
    trainer = make_trainer(
        data, "transformer_debug", ranks, f"checkpoint.save_dir={out}", f"checkpoint.restore_file={start}", "optimizer.adam_eps=1.0",
        "optimization.lr=[1.0]", "lr_scheduler.warmup_updates=0", "dataset.batch_size=1", "distributed_training.ddp_backend=pytorch_ddp",
    )  # fmt: skip
    _, epoch = checkpoint_utils.load_checkpoint(trainer.cfg.checkpoint, trainer)
    trainer.begin_epoch(epoch.epoch)
    for _, batches in zip(range(count), GroupedIterator(epoch.next_epoch_itr(), update_freq)):
        with metrics.aggregate("train"):
            trainer.train_step(batches)
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch, None)
    return {"updates": trainer.get_num_updates(), "weights": {k: v.clone() for k, v in trainer.get_model().state_dict().items()}}


def work(rank: int, data: Path, folder: Path, port: int) -> None:
    """What one of the two ranks does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=RANKS, rank=rank)
    found = {(encoder, backend): updates(data, encoder, backend, RANKS, rank) for encoder in ENCODERS for backend in BACKENDS}
    ended = finish_epoch(data, folder / "begun" / "checkpoint_last.pt", folder / "both", RANKS, 1, 2)
    torch.save({"updates": found, "ended": ended}, folder / f"rank{rank}.pt")
    dist.barrier()


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two sets of tensors, relative to each tensor's largest value; those before a BatchNorm can be near 0."""
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max() / other[key].abs().max().clamp(min=1e-2)) for key in one)


@pytest.mark.long
def test_two_ranks_compute_what_one_does_on_the_joint_batch(tmp_path: Path) -> None:
    lengths = [0.8, 2.0, 1.1, 0.9, 1.7, 1.3, 1.0, 1.2, 1.5]
    data = make_data(tmp_path / "data", {"train": lengths, "valid": [1.0]})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # one rank begins the epoch of nine batches, two go on, one ends it: as if one rank with two batches per update had gone on
    finish_epoch(data, tmp_path / "none.pt", tmp_path / "begun", 1, 1, 4)
    both = mp.spawn(work, (data, tmp_path, port), nprocs=RANKS, join=False)
    expected = {encoder: updates(data, encoder, "legacy_ddp", 1, 0) for encoder in ENCODERS}
    alone = finish_epoch(data, tmp_path / "begun" / "checkpoint_last.pt", tmp_path / "alone", 1, 2, 2)
    while not both.join():
        pass
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS)]
    for encoder, whole in expected.items():
        for backend in BACKENDS:
            for rank in ranks:
                for update, values in enumerate(rank["updates"][encoder, backend]):
                    assert largest_difference(values, whole[update]) < 5e-5, (encoder, backend, update)
    for rank in ranks:
        assert rank["ended"]["updates"] == alone["updates"] == 6
        assert largest_difference(rank["ended"]["weights"], alone["weights"]) < 1e-5
    last = [finish_epoch(data, tmp_path / name / "checkpoint_last.pt", tmp_path / "last", 1, 2, 9) for name in ("both", "alone")]
    assert [end["updates"] for end in last] == [7, 7]
    assert largest_difference(last[0]["weights"], last[1]["weights"]) < 1e-5
    begun = torch.load(tmp_path / "begun" / "checkpoint_last.pt")["model"]
    assert largest_difference(begun, last[0]["weights"]) > 1e-3  # the updates did something
