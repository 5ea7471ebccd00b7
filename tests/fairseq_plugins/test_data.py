"""Batches, crops, loading processes, and checks of data and settings."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from hubert_eff.errors import UserError
from hubert_eff.models.extractor import frame_padding_mask

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
import fairseq_plugins  # noqa: E402, F401
from fairseq_plugins.data import dataset as dataset_module  # noqa: E402
from fairseq_plugins.data.buckets import Buckets  # noqa: E402

from ..helpers.pretraining import make_data, make_task  # noqa: E402

# -- data ----------------------------------------------------------------------------------------------------------------


def test_batches_and_crops_depend_on_seed_epoch_and_utterances_only(data: Path) -> None:
    def crops(epoch: int, seed: int = 1) -> tuple[list[int], torch.Tensor]:
        task, _ = make_task(data, "task.pad_audio=false", f"common.seed={seed}")
        task.load_dataset("train")
        dataset = task.dataset("train")
        dataset.set_epoch(epoch)
        np.random.seed(int.from_bytes(os.urandom(3), "big"))  # the state that a resumed process happens to have
        order = dataset.ordered_indices()
        batch = dataset.collater([dataset[i] for i in order])
        assert batch["net_input"]["sample_ids"].tolist() == order.tolist()
        return order.tolist(), batch["net_input"]["source"]

    (order, first), (again, second), (_, third) = crops(3), crops(3), crops(4)
    assert order == again and torch.equal(first, second)
    assert not torch.equal(first, third)
    assert {tuple(crops(3, seed)[0]) for seed in range(6)} != {tuple(order)}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lengths = np.random.default_rng(1).uniform(0.4, 2.0, 40).round(3)
    return make_data(tmp_path_factory.mktemp("many") / "data", {"train": [*lengths, 2.5], "valid": [1.0]})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rate", [50, 100])
def test_buckets_leave_few_shapes(padded: bool, rate: int, many: Path, tmp_path: Path) -> None:
    data = many
    if rate == 50:  # every second label of the others
        data = tmp_path
        for name in ("train.tsv", "valid.tsv", "dict.km.txt"):
            (data / name).write_text((many / name).read_text())
        for name in ("train.km", "valid.km"):
            halves = [" ".join(line.split()[::2]) for line in (many / name).read_text().splitlines()]
            (data / name).write_text("\n".join(halves) + "\n")
    keys = (f"task.pad_audio={str(padded).lower()}", f"task.label_rate={rate}", "task.min_sample_size=6000", "task.max_sample_size=33000")
    task, cfg = make_task(data, "task.length_buckets=3", *keys)
    task.load_dataset("train"), task.load_dataset("valid")
    dataset, model = task.dataset("train"), task.build_model(cfg.model)
    assert task.dataset("valid").buckets is None
    lengths = dataset.buckets.lengths.tolist()
    assert len(lengths) == 3 and all(length % 2560 == 320 for length in lengths) and lengths[-1] <= 33_000
    epoch = task.get_batch_iterator(dataset, max_tokens=80_000, required_batch_size_multiple=1).next_epoch_itr(shuffle=False)
    shapes, seen = set(), []
    for batch in epoch:
        source, padding, (labels,) = batch["net_input"]["source"], batch["net_input"]["padding_mask"], batch["target_list"]
        features = torch.zeros(len(source), model.num_frames(source.size(1)), 1)
        frames = None if padding is None else frame_padding_mask(padding, features.size(1), model.config.valid_frames, model.conv_layers)
        features, frames, (targets,) = model._align(features, frames, [labels])
        assert features.size(1) == source.size(1) // 320 - 1  # no frame is lost for want of labels, so the encoder's shape is fixed too
        assert (frames is None) != padded
        assert (targets[~frames] if padded else targets).min() >= 4  # the dictionary begins with four special symbols
        assert source.numel() <= 80_000
        shapes.add(tuple(source.shape))
        seen += batch["id"].tolist()
    assert sorted(seen) == list(range(len(dataset))) and {length for _, length in shapes} == set(lengths)
    assert len(shapes) <= 6
    for index, size in enumerate(dataset.sizes):
        near = [n for n in lengths if (n >= size if padded else n <= size)]
        assert dataset.size(index) == ((min(near) if near else lengths[-1]) if padded else max(near))
    first, second = (dataset.collater([dataset[i] for i in (0, 1, 2)])["net_input"]["source"] for _ in range(2))
    assert torch.equal(first, second)


def test_utterances_too_short_for_a_bucket_are_named(data: Path) -> None:
    make_task(data, "task.length_buckets=2")[0].load_dataset("train")
    sizes = [32_000, 250_000]
    (length,) = (one := Buckets(sizes, 1, 200_000, padded=False)).lengths
    assert 29_000 < length <= 32_000 and one.kept(sizes) == pytest.approx(2 * length / 232_000)  # of what 200,000 samples leave
    with pytest.raises(UserError, match="length_buckets=-1"):
        make_task(data, "task.length_buckets=-1")
    with pytest.raises(UserError, match="length_buckets=2: the shortest utterance has 2000 samples.*task.min_sample_size"):
        Buckets([2000, 16_000], 2, 250_000, padded=False)


@pytest.mark.parametrize(("seconds", "limit"), [(4.0, 48_080), (17.0, 250_000)])
def test_no_padding_label_falls_on_a_valid_frame_of_a_random_crop(seconds: float, limit: int, data: Path, tmp_path: Path) -> None:
    make_data(tmp_path / "long", {"train": [seconds, seconds, 1.013], "valid": [1.0]})
    task, cfg = make_task(tmp_path / "long", "task.pad_audio=true", f"task.max_sample_size={limit}", "task.max_keep_size=null")
    task.load_dataset("train")
    dataset = task.dataset("train")
    model = task.build_model(cfg.model)
    samples, short = [dataset[i] for i in range(3)], 0
    for start in range(0, int(seconds * 16_000) - limit + 1, 40):
        # one crop at `start`, one at the beginning, an utterance that is padded
        with mock.patch.object(dataset_module, "crop_start", side_effect=[start, 0]):
            batch = dataset.collater(samples)
        source, padding = batch["net_input"]["source"], batch["net_input"]["padding_mask"]
        frames = frame_padding_mask(padding, model.num_frames(source.size(1)), model.config.valid_frames, model.conv_layers)
        _, frames, (targets,) = model._align(torch.zeros(*frames.shape, 1), frames, batch["target_list"])
        assert (targets[~frames] >= 4).all()  # fairseq's dictionaries begin with four special symbols
        valid, lengths = (~frames).sum(1), batch["target_lengths_list"][0]
        expected = [min(model.num_frames(min(len(s["source"]), limit)), -(-int(n) // 2)) for s, n in zip(samples, lengths)]
        assert valid.tolist() == expected  # and no more is given up than has no label
        short += expected[0] < expected[1]
    assert short


def test_loading_processes_see_the_epoch_that_comes_after_they_started(data: Path) -> None:
    task, _ = make_task(data, "task.pad_audio=false")
    task.load_dataset("train")
    dataset = task.dataset("train")
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=[[0, 1]], collate_fn=dataset.collater, num_workers=1, persistent_workers=True
    )
    for epoch in (1, 2):
        dataset.set_epoch(epoch)
        (batch,) = loader
        assert torch.equal(batch["net_input"]["source"], dataset.collater([dataset[0], dataset[1]])["net_input"]["source"])


def test_a_loading_process_outlives_a_sigterm_that_is_not_its_parents(data: Path) -> None:
    task, _ = make_task(data)
    task.load_dataset("train")
    dataset = task.dataset("train")
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=[[0], [1], [2]], collate_fn=dataset.collater, num_workers=1, persistent_workers=True
    )
    assert len(list(loader)) == 3
    (worker,) = loader._iterator._workers
    if os.fork() == 0:  # a process that is not the parent sends the signal
        os.kill(worker.pid, signal.SIGTERM)
        os._exit(0)
    os.wait()
    assert len(list(loader)) == 3
    worker.terminate()
    worker.join(10)
    assert not worker.is_alive()
