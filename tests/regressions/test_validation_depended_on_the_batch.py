"""One checkpoint had another masked accuracy for each size of batch: crops were drawn for a batch, and cut to its shortest utterance."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")

from fairseq.logging import metrics  # noqa: E402

from fairseq_plugins.data.transcripts import TranscribedDataset  # noqa: E402

from ..helpers.pretraining import make_data, make_task  # noqa: E402

LENGTHS = [0.6, 0.75, 0.9, 1.2, 1.21, 1.5, 1.9, 2.3, 2.3, 2.6, 3.1, 0.64]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("validation") / "data", {"train": [1.0], "valid": LENGTHS})


def validated(data: Path, *changes: str, size: int, ranks: int = 1) -> tuple[dict[str, float], int]:
    """The figures of a validation in batches of `size` utterances on some ranks, and how many batches there were."""
    task, cfg = make_task(data, "task.max_sample_size=16000", *changes)
    torch.manual_seed(1)
    model = task.build_model(cfg.model).eval()
    task.load_dataset("valid")
    criterion, count = task.build_criterion(cfg.criterion), 0
    metrics.reset()
    with metrics.aggregate("valid") as found, torch.no_grad():
        for rank in range(ranks):
            batches = task.get_batch_iterator(
                task.dataset("valid"),
                max_tokens=512_000,
                max_sentences=size,
                num_shards=ranks,
                shard_id=rank,
                seed=1,
                disable_iterator_cache=True,
            ).next_epoch_itr(shuffle=False, set_dataset_epoch=False)
            for batch in (b for b in batches if b):
                _, _, log = task.valid_step(batch, model, criterion)
                criterion.reduce_metrics([log])
                count += 1
    values = found.get_smoothed_values()
    return {key: values[key] for key in ("loss", "loss_m_0", "correct_m_0", "majority_m_0", "label_ppl_0", "loss_features_pen")}, count


@pytest.mark.parametrize("changes", [("task.pad_audio=true",), ("task.pad_audio=false",), ("model.extractor_mode=default",)])
def test_figures_are_those_of_any_batch(changes: Any, data: Path) -> None:
    expected, count = validated(data, *changes, size=1)
    assert count == len(LENGTHS)
    for size, ranks in ((4, 1), (16, 2), (64, 1)):
        found, batches = validated(data, *changes, size=size, ranks=ranks)
        assert batches < count
        assert found == pytest.approx(expected, rel=1e-3), (size, ranks)


def test_a_crop_is_that_of_its_utterance_in_any_batch(data: Path) -> None:
    task, _ = make_task(data, "task.max_sample_size=16000")
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    items = [dataset[i] for i in range(len(LENGTHS))]

    def crops(*chosen: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        batch = dataset.collater([items[i] for i in chosen])
        (labels,), (lengths,) = batch["target_list"], batch["target_lengths_list"]
        source, padding = batch["net_input"]["source"], batch["net_input"]["padding_mask"]
        return {int(i): (source[row][~padding[row]], labels[row][: lengths[row]]) for row, i in enumerate(batch["id"])}

    together = crops(*range(len(LENGTHS)))
    for chosen in ((10,), (7, 8), (8, 7, 2), (3, 10, 9)):
        for index, (source, labels) in crops(*chosen).items():
            assert torch.equal(source, together[index][0]) and torch.equal(labels, together[index][1])
    dataset.set_epoch(2)
    assert not torch.equal(crops(10)[10][0], together[10][0])


def test_where_padding_is_seen_batches_are_of_one_length(tmp_path: Path) -> None:
    rng, sizes = torch.Generator().manual_seed(1), [16_000, 16_000, 17_000, 16_000, 18_000, 18_000, 18_000]
    spelled = [[2, 3]] * len(sizes)
    manifest: Any = SimpleNamespace(samples=sizes, names=[f"{i}.wav" for i in range(len(sizes))], root=tmp_path)
    dataset = TranscribedDataset(manifest, spelled, [1.0], 0, 20_000, 1, False)
    order = torch.randperm(len(sizes), generator=rng).numpy()
    assert sorted(map(len, dataset.batch_by_size(order, max_sentences=4))) == [3, 4]
    dataset.equal_lengths = True
    for batches in (dataset.batch_by_size(order, max_sentences=2), dataset.batch_by_size(order, max_tokens=40_000)):
        assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
        assert all(len({sizes[i] for i in batch}) == 1 and len(batch) <= 2 for batch in batches)
