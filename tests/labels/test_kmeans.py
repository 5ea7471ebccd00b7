"""k-means over files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from hubert_eff.cli import main
from hubert_eff.errors import UserError
from hubert_eff.labels import kmeans
from hubert_eff.labels.kmeans import KMeans, fit, fit_faiss
from hubert_eff.labels.make import make_labels

pytest.importorskip("sklearn")
pytest.importorskip("torchaudio")


# ---- k-means


def blobs(folder: Path, count: int = 5, files: int = 4, rows: int = 3000) -> tuple[list[Path], np.ndarray]:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(count, 8)).astype(np.float32) * 10
    paths = []
    for index in range(files):
        paths.append(folder / f"{index}.npy")
        np.save(paths[-1], (centers[rng.integers(count, size=rows)] + rng.normal(size=(rows, 8))).astype(np.float32))
    return paths, centers


@pytest.mark.parametrize("pool_bytes", [1 << 28, 150_000])
def test_kmeans_finds_the_clusters_also_when_memory_holds_one_file(tmp_path, monkeypatch, pool_bytes) -> None:
    monkeypatch.setattr(kmeans, "POOL_BYTES", pool_bytes)
    paths, centers = blobs(tmp_path)
    found = fit(paths, 5, seed=1)
    distance = np.linalg.norm(found[:, None] - centers[None], axis=-1)
    assert sorted(distance.argmin(1)) == [0, 1, 2, 3, 4] and distance.min(1).max() < 0.2
    assert np.array_equal(found, fit(paths, 5, seed=1))


def test_faiss_finds_the_clusters(tmp_path) -> None:
    pytest.importorskip("faiss")
    paths, centers = blobs(tmp_path)
    found = fit_faiss(paths, 5, seed=1)
    assert found.shape == centers.shape and found.dtype == np.float32
    rows = np.concatenate([np.load(p) for p in paths])
    errors = [((rows - c[KMeans(c, {}).assign(rows)]) ** 2).sum() for c in (found, fit(paths, 5, seed=1))]
    assert errors[0] < 2 * errors[1] and np.array_equal(found, fit_faiss(paths, 5, seed=1))
    np.save(tmp_path / "a.npy", np.full((50, 8), np.nan, np.float32))
    with pytest.raises(UserError, match="NaN"):
        fit_faiss([*paths, tmp_path / "a.npy"], 2, seed=1)


def test_faiss_is_named_where_it_is_missing(manifest, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    arguments = ["labels", str(manifest), "--out", str(tmp_path / "out"), "--features", "mfcc", "--clusters", "10", "--kmeans"]
    assert main([*arguments, "faiss"]) == 2
    assert main([*arguments, "exact"]) == 2
    missing, wrong = capsys.readouterr().err.splitlines()
    assert "needs the package 'faiss-cpu': pip install 'hubert-eff[faiss]'" in missing
    assert "unknown value of --kmeans 'exact'" in wrong and not (tmp_path / "out").exists()


def test_labels_by_faiss(manifest, tmp_path) -> None:
    pytest.importorskip("faiss")
    summary = make_labels(manifest, tmp_path, clusters=10, kmeans="faiss")
    assert summary["kmeans"] == "faiss" and make_labels(manifest, tmp_path, clusters=10, kmeans="faiss")["reused"]
    assert make_labels(manifest, tmp_path, clusters=10)["settings"] != summary["settings"]


def test_every_row_is_seen_once_per_pass(tmp_path, monkeypatch) -> None:
    paths = []
    for index in range(7):
        paths.append(tmp_path / f"{index}.npy")
        np.save(paths[-1], np.arange(index * 100, index * 100 + 100, dtype=np.float32)[:, None])
    monkeypatch.setattr(kmeans, "POOL_BYTES", 900)  # two files and a bit
    batches = list(kmeans._batches(paths, 64, seed=3))
    assert {len(b) for b in batches[:-1]} == {64} and sorted(np.concatenate(batches)[:, 0]) == list(range(700))
    again = list(kmeans._batches(paths, 64, seed=4))
    assert not np.array_equal(again[0], batches[0])


def test_assign_is_the_nearest_centroid_and_survives_saving(tmp_path) -> None:
    rng = np.random.default_rng(0)
    model = KMeans(rng.normal(size=(7, 3)).astype(np.float32), {"settings": "x"})
    rows = rng.normal(size=(500, 3)).astype(np.float32)
    expected = np.linalg.norm(rows[:, None] - model.centroids[None], axis=-1).argmin(1)
    assert np.array_equal(model.assign(rows), expected)
    model.save(tmp_path / "k.safetensors")
    read = KMeans.read(tmp_path / "k.safetensors")
    assert np.array_equal(read.centroids, model.centroids) and read.metadata == {"settings": "x"}
    (tmp_path / "bad.safetensors").write_bytes(b"something else")
    with pytest.raises(UserError, match="no k-means model"):
        KMeans.read(tmp_path / "bad.safetensors")


def test_kmeans_refuses_nan(tmp_path) -> None:
    np.save(tmp_path / "a.npy", np.full((50, 2), np.nan, np.float32))
    with pytest.raises(UserError, match="NaN"):
        fit([tmp_path / "a.npy"], 2, seed=1)
