"""Finds the place in an epoch where a resumed run continues, whatever its numbers of ranks and batch sizes.

Each function is one patch and says why; `apply` makes them all.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fairseq.data import iterators
from fairseq.data.iterators import CountingIterator, EpochBatchIterator
from torch import Tensor

logger = logging.getLogger(__name__)
Batches = Sequence[Sequence[int]]


def apply() -> None:
    """Make all patches."""
    finish_epochs()
    group_what_is_left()


class _Rest:
    """The rest of an epoch: batches of the utterances that are not in `before`, bool, one per utterance."""

    def __init__(self, iterator: EpochBatchIterator, epoch: int, before: np.ndarray, whole: Batches) -> None:
        self.epoch, self.before = epoch, before
        left = [[i for i in batch if not before[i]] for batch in whole]
        pack = getattr(iterator, "pack", None)  # of `SafeTask.get_batch_iterator`
        if pack is not None and any(left):
            left = pack(np.array([i for batch in left for i in batch], dtype=np.int64))
        self.batches = tuple(batch for batch in left if len(batch))


def finish_epochs() -> None:
    """Continue an epoch correctly. A checkpoint holds the number of batches per rank, which with other batches or ranks is another place.

    Unpatched, going from 2 ranks to 1 repeats half of the epoch's batches, and from 1 to 2 skips as many or fails past the end, as does
    another `dataset.max_tokens`. Here checkpoints also hold the number of ranks, a digest of the batches, and the utterances that the epoch
    has used. With another number of ranks the remaining batches follow; with other batches, those of the remaining utterances.
    """
    save, load = EpochBatchIterator.state_dict, EpochBatchIterator.load_state_dict
    whole, ordered = EpochBatchIterator.frozen_batches.fget, EpochBatchIterator.ordered_batches
    EpochBatchIterator.rest = None

    def frozen_batches(self: EpochBatchIterator) -> Batches:
        return whole(self) if self.rest is None else self.rest.batches

    def ordered_batches(self: EpochBatchIterator, epoch: int, *options: Any, **named: Any) -> Any:
        if self.rest is not None and self.rest.epoch != epoch:
            self.rest = None
        return ordered(self, epoch, *options, **named)

    def state_dict(self: EpochBatchIterator) -> dict[str, Any]:
        state = {**save(self), "num_shards": self.num_shards}
        if state["iterations_in_epoch"]:
            state.update(batches=_digest(self.frozen_batches), seen=_pack(_seen(self, state["iterations_in_epoch"])))
            if self.rest is not None:
                state["before"] = _pack(self.rest.before)
        return state

    def load_state_dict(self: EpochBatchIterator, state: dict[str, Any]) -> None:
        epoch, size = state["epoch"], len(self.dataset)
        self.rest = None
        if "before" in state:
            self.rest = _Rest(self, epoch, _unpack(state["before"], size), whole(self))
        if "batches" in state and state["batches"] != _digest(self.frozen_batches):
            return _load_other_batches(self, state)
        state = _of_ranks(self, state)
        try:
            load(self, state)
        except RuntimeError:  # past the end, after larger batches in a checkpoint of an earlier version
            load(self, {**state, "epoch": epoch + 1, "iterations_in_epoch": 0})
            _say(self, f"epoch {epoch} has no batch left for this checkpoint: going on with epoch {epoch + 1}")

    def _load_other_batches(self: EpochBatchIterator, state: dict[str, Any]) -> None:
        epoch, size = state["epoch"], len(self.dataset)
        seen = _unpack(state["seen"], size)
        self.rest = _Rest(self, epoch, seen, whole(self))
        if not self.rest.batches:
            self.rest, epoch = None, epoch + 1
        load(self, {**state, "epoch": epoch, "iterations_in_epoch": 0})
        what = f"the others follow in {len(self.rest.batches)} batches" if self.rest is not None else f"epoch {epoch} follows"
        _say(
            self, f"going on from a checkpoint of other batches (dataset.max_tokens, batch_size ...): in epoch {state['epoch']}, "
            f"{int(seen.sum())} of {size} utterances are done, {what}"
        )  # fmt: skip

    EpochBatchIterator.frozen_batches, EpochBatchIterator.ordered_batches = property(frozen_batches), ordered_batches
    EpochBatchIterator.state_dict, EpochBatchIterator.load_state_dict = state_dict, load_state_dict


def _of_ranks(iterator: EpochBatchIterator, state: dict[str, Any]) -> dict[str, Any]:
    """Convert a state to the current number of ranks, and log it if that differs."""
    before, now = state.get("num_shards", iterator.num_shards), iterator.num_shards
    if before == now:
        return state
    seen = state["iterations_in_epoch"] * before
    again = f", the last {seen % now} once more" if seen % now else ""
    order = "; dataset.grouped_shuffling puts them in another order now" if iterator.grouped_shuffling and seen else ""
    _say(
        iterator, f"{now} rank(s) go on from a checkpoint of {before}: in epoch {state['epoch']}, {seen} of {len(iterator.frozen_batches)} "
        f"batches are done, the others follow{again}{order}. optimization.update_freq times {before}/{now} keeps the number of "
        "batches per update"
    )  # fmt: skip
    return {**state, "iterations_in_epoch": seen // now}


def _say(iterator: EpochBatchIterator, what: str) -> None:
    if iterator.shard_id == 0:
        logger.warning(what)


def _digest(batches: Batches) -> str:
    digest = hashlib.sha256(np.array([len(batch) for batch in batches], dtype=np.int64).tobytes())
    for batch in batches:
        digest.update(np.asarray(batch, dtype=np.int64).tobytes())
    return digest.hexdigest()


def _seen(iterator: EpochBatchIterator, steps: int) -> np.ndarray:
    """The utterances that the epoch has used after `steps` batches on each rank, bool, one per utterance."""
    seen = np.zeros(len(iterator.dataset), dtype=bool) if iterator.rest is None else iterator.rest.before.copy()
    own = iterator.shard_id
    try:
        for rank in range(iterator.num_shards):
            iterator.shard_id = rank
            for batch in iterator.ordered_batches(iterator.epoch, False, iterator.shuffle)[:steps]:
                seen[np.asarray(batch, dtype=np.int64)] = True
    finally:
        iterator.shard_id = own
    return seen


def _pack(flags: np.ndarray) -> Tensor:
    return torch.from_numpy(np.packbits(flags))


def _unpack(bits: Tensor, size: int) -> np.ndarray:
    """Flags of `size` utterances. None is set for a checkpoint of another number of utterances, which needs `task.resume_changed`."""
    flags = np.unpackbits(bits.numpy())
    return flags[:size].astype(bool) if len(bits) == (size + 7) // 8 else np.zeros(size, dtype=bool)


def group_what_is_left() -> None:
    """Count groups of remaining batches correctly. With `optimization.update_freq` above 1 fairseq takes those of the whole epoch.

    If the place in the epoch is not a multiple of it, one group is missing at the end, and the epoch starts again.
    """

    def __init__(self: Any, iterable: Any, chunk_size: int, skip_remainder_batch: bool = False) -> None:
        done = getattr(iterable, "n", 0)
        left = len(iterable) - done
        groups = left // chunk_size if skip_remainder_batch else -(-left // chunk_size)
        before = -(-done // chunk_size)
        chunks = iterators._chunk_iterator(iterable, chunk_size, skip_remainder_batch)
        CountingIterator.__init__(self, chunks, start=before, total=before + groups)
        self.chunk_size = chunk_size
        if skip_remainder_batch:
            iterable.take(done + groups * chunk_size)

    iterators.GroupedIterator.__init__ = __init__
