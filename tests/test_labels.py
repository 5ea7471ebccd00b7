"""Features, k-means, labels and their quality."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import soundfile
import torch

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.data.manifest import Options, make_manifest
from hubert_eff.errors import UserError
from hubert_eff.exporting.safetensors import export
from hubert_eff.labels import features, kmeans
from hubert_eff.labels import make as targets
from hubert_eff.labels.features import FeatureSource, HiddenLayer, Mfcc
from hubert_eff.labels.kmeans import KMeans, fit, fit_faiss
from hubert_eff.labels.make import make_labels, read_manifest
from hubert_eff.labels.quality import label_quality, purities

pytest.importorskip("sklearn")
pytest.importorskip("torchaudio")


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).normal(size=round(seconds * 16000))).astype(np.float32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A minute of four voices, with phone timings."""
    pytest.importorskip("espeakng_loader")
    from hubert_eff.data.synthetic.sentences import make_demo

    folder = tmp_path_factory.mktemp("speech") / "corpus"
    make_demo(folder, minutes=1.0, speaker_count=4)
    return folder


@pytest.fixture(scope="module")
def manifest(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    make_manifest(corpus, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    export(hubert_eff.build("conformer-debug").eval(), path)
    return str(path)


# ---- features


@pytest.mark.parametrize("samples", [400, 559, 560, 16000, 16321])
def test_mfcc_is_kaldis_with_deltas(samples) -> None:
    from torchaudio.compliance.kaldi import mfcc
    from torchaudio.functional import compute_deltas

    wav = noise(samples / 16000)
    [(index, got)] = Mfcc().extract([wav])
    assert index == 0 and got.shape == (1 + (samples - 400) // 160, 39) == (Mfcc().frames(samples), 39)
    static = mfcc(torch.from_numpy(wav)[None], sample_frequency=16000, use_energy=False)
    delta = compute_deltas(static.T).T
    expected = torch.cat([static, delta, compute_deltas(delta.T).T], 1)
    torch.testing.assert_close(torch.from_numpy(got), expected)


def test_features_of_long_audio_in_pieces_have_the_same_frames(checkpoint, monkeypatch) -> None:
    wav = noise(2.005)
    [(_, whole)] = Mfcc().extract([wav])
    monkeypatch.setattr(features, "MFCC_CHUNK", 60)
    [(_, pieces)] = Mfcc().extract([wav])
    np.testing.assert_allclose(pieces, whole, atol=1e-4)
    layer = FeatureSource(checkpoint, 0).open()
    monkeypatch.setattr(features, "LAYER_CHUNK", 30)
    found = dict(layer.extract([wav, noise(0.3), noise(1.2)]))
    assert {i: len(f) for i, f in found.items()} == {0: 100, 1: 14, 2: 59}


def test_hidden_layer_does_not_depend_on_the_batch(checkpoint) -> None:
    audio = [noise(s, i) for i, s in enumerate((0.5, 1.3, 0.025, 0.9))]
    together = dict(FeatureSource(checkpoint, 2).open().extract(audio))
    model = hubert_eff.load(checkpoint)
    for index, wav in enumerate(audio):
        with torch.no_grad():
            states, _ = model.hidden_states(torch.from_numpy(wav)[None])
        np.testing.assert_allclose(together[index], states[2][0].numpy(), atol=2e-5)
        assert len(together[index]) == 1 + (len(wav) - 400) // 320


def test_group_norm_extractor_is_never_padded(tmp_path) -> None:
    """Its statistics over time would take in the padding: only equal lengths share a batch."""
    path = tmp_path / "model.safetensors"
    export(hubert_eff.build("transformer-debug", extractor_mode="default").eval(), path)
    layer = HiddenLayer(str(path), 1, "cpu", 60.0)
    audio = [noise(s, i) for i, s in enumerate((0.5, 0.8, 0.5))]
    assert sorted(len(b) for b in layer._batches(audio)) == [1, 2]
    with torch.no_grad():
        states, _ = layer.model.hidden_states(torch.from_numpy(audio[0])[None])
    np.testing.assert_allclose(dict(layer.extract(audio))[0], states[1][0].numpy(), atol=2e-5)


@pytest.mark.parametrize("preset", ["transformer-debug", "conformer-debug"])
def test_long_recordings_are_normalised_as_a_whole(tmp_path, monkeypatch, preset) -> None:
    """A quiet half and a loud half stay so, although each is a piece of its own."""
    path = tmp_path / "model.safetensors"
    export(hubert_eff.build(preset, normalize=True).eval(), path)
    wav = np.concatenate([0.01 * noise(0.605, 1), noise(0.6, 2)]) + np.float32(0.02)
    short = noise(0.3, 3)
    layer = HiddenLayer(str(path), 0, "cpu", 60.0)
    model = hubert_eff.load(str(path))
    with torch.no_grad():
        expected = [model.hidden_states(torch.from_numpy(w)[None])[0][0][0].numpy() for w in (wav, short)]
    found = dict(layer.extract([wav, short]))  # in one piece: the model's own normalisation
    for index, values in enumerate(expected):
        np.testing.assert_allclose(found[index], values, atol=2e-5)
    whole = hubert_eff.models.hubert.normalize_waveform(torch.from_numpy(wav)[None])
    monkeypatch.setattr(features, "LAYER_CHUNK", 30)
    pieces = list(features.chunks(len(wav), layer.frames(len(wav)), 320, 400, 30))
    assert len(pieces) == 2 and model.config.normalize
    model.config = dataclasses.replace(model.config, normalize=False)
    with torch.no_grad():
        parts = [model.hidden_states(whole[:, start:end])[0][0][0].numpy() for start, end in pieces]
    np.testing.assert_allclose(dict(layer.extract([wav, short]))[0], np.concatenate(parts), atol=2e-5)


# ---- k-means


def blobs(folder: Path, count: int = 5, files: int = 4, rows: int = 3000) -> tuple[list[Path], np.ndarray]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(count, 8)).astype(np.float32) * 10
    paths = []
    for index in range(files):
        paths.append(folder / f"{index}.npy")
        np.save(paths[-1], (centres[rng.integers(count, size=rows)] + rng.normal(size=(rows, 8))).astype(np.float32))
    return paths, centres


@pytest.mark.parametrize("pool_bytes", [1 << 28, 150_000])
def test_kmeans_finds_the_clusters_also_when_memory_holds_one_file(tmp_path, monkeypatch, pool_bytes) -> None:
    monkeypatch.setattr(kmeans, "POOL_BYTES", pool_bytes)
    paths, centres = blobs(tmp_path)
    found = fit(paths, 5, seed=1)
    distance = np.linalg.norm(found[:, None] - centres[None], axis=-1)
    assert sorted(distance.argmin(1)) == [0, 1, 2, 3, 4] and distance.min(1).max() < 0.2
    assert np.array_equal(found, fit(paths, 5, seed=1))


def test_faiss_finds_the_clusters(tmp_path) -> None:
    pytest.importorskip("faiss")
    paths, centres = blobs(tmp_path)
    found = fit_faiss(paths, 5, seed=1)
    assert found.shape == centres.shape and found.dtype == np.float32
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


# ---- labels


def read_labels(file: Path) -> list[list[int]]:
    return [[int(v) for v in line.split()] for line in file.read_text().splitlines()]


def test_mfcc_labels(manifest, tmp_path) -> None:
    summary = make_labels(manifest, tmp_path, clusters=20)
    assert (summary["source"], summary["k"], summary["rate"], summary["layer"]) == ("mfcc", 20, 100.0, None)
    model = KMeans.read(tmp_path / "kmeans.safetensors")
    for split in ("train", "valid"):
        table = read_manifest(manifest / f"{split}.tsv")
        labels = read_labels(tmp_path / f"{split}.km")
        assert [len(v) for v in labels] == [1 + (n - 400) // 160 for _, n in table.entries]
        figures = summary["splits"][split]
        flat = np.concatenate(labels)
        assert figures["frames"] == len(flat) and figures["used_clusters"] == len(set(flat))
        assert figures["majority_share"] == pytest.approx(np.bincount(flat).max() / len(flat), abs=1e-6)
        wav, _ = soundfile.read(table.root / table.entries[-1][0], dtype="float32")
        [(_, frames)] = Mfcc().extract([wav])
        assert np.array_equal(model.assign(frames), labels[-1])  # one model for all splits
    entries = [line.split() for line in (tmp_path / "dict.km.txt").read_text().splitlines()]
    assert [int(index) for index, _ in entries] == list(range(20))
    assert sum(int(count) for _, count in entries) == summary["splits"]["train"]["frames"]
    assert json.loads((tmp_path / "labels.json").read_text())["splits"] == summary["splits"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "dict.km.txt", "kmeans.safetensors", "labels.json", "train.km", "valid.km"
    ]  # fmt: skip


def test_fairseq_accepts_the_lengths_and_the_dictionary(manifest, checkpoint, tmp_path, caplog) -> None:
    dataset = pytest.importorskip("fairseq.data.audio.hubert_dataset")
    from fairseq.data import Dictionary

    for name, source, rate in (("mfcc", FeatureSource(), 100.0), ("layer", FeatureSource(checkpoint, 1), 50.0)):
        make_labels(manifest, tmp_path / name, source, clusters=10)
        words = Dictionary.load(str(tmp_path / name / "dict.km.txt"))
        assert len(words) - words.nspecial == 10
        with caplog.at_level(logging.WARNING):
            data = dataset.HubertDataset(
                str(manifest / "train.tsv"), 16000, [str(tmp_path / name / "train.km")], rate, [1], [2], pad_audio=True,
                label_processors=[lambda line, words=words: words.encode_line(line, append_eos=False, add_if_not_exist=False)],
            )  # fmt: skip
        assert not caplog.records and len(data) == len(read_manifest(manifest / "train.tsv").entries)
        assert int(data[0]["label_list"][0].min()) >= words.nspecial  # no label is unknown


def test_layer_labels_name_their_checkpoint(manifest, checkpoint, tmp_path, capsys) -> None:
    arguments = ["labels", str(manifest), "--out", str(tmp_path), "--checkpoint", checkpoint, "--layer", "1"]
    assert main([*arguments, "--clusters", "8", "--workers", "1", "--device", "cpu", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["source"], summary["layer"], summary["rate"], summary["k"]) == ("checkpoint", 1, 50.0, 8)
    assert summary["checkpoint"] == checkpoint and len(summary["checkpoint_sha256"]) == 64
    table = read_manifest(manifest / "valid.tsv")
    assert [len(v) for v in read_labels(tmp_path / "valid.km")] == [1 + (n - 400) // 320 for _, n in table.entries]


def test_processes_give_the_same_labels(manifest, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(targets, "SHARD_SECONDS", 20)
    make_labels(manifest, tmp_path / "one", clusters=10, workers=1)
    make_labels(manifest, tmp_path / "two", clusters=10, workers=2)
    for name in ("train.km", "valid.km", "dict.km.txt", "kmeans.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_interrupted_run_goes_on_where_it_stopped(manifest, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(targets, "SHARD_SECONDS", 10)
    make_labels(manifest, tmp_path / "whole", clusters=10)
    out, calls, assign = tmp_path / "out", [0], KMeans.assign

    def failing(self: KMeans, rows: np.ndarray) -> np.ndarray:
        calls[0] += 1
        if calls[0] > 6 and len(list(out.glob(".labels-*/*.km"))) == 2:
            raise KeyboardInterrupt
        return assign(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(KMeans, "assign", failing)
        with pytest.raises(KeyboardInterrupt):
            make_labels(manifest, out, clusters=10)
    assert not list(out.glob("*.km")) and not (out / "labels.json").exists()  # nothing half-written
    finished = {p: p.stat().st_mtime_ns for p in out.glob(".labels-*/*.km")}
    assert len(finished) == 2
    calls_of_one = []
    real = targets._label_shard
    with monkeypatch.context() as patch:
        patch.setattr(targets, "fit", lambda *_: pytest.fail("k-means was fitted again"))
        patch.setattr(targets, "_label_shard", lambda task, **rest: calls_of_one.append(task[0]) or real(task, **rest))
        make_labels(manifest, out, clusters=10)
    assert calls_of_one and not set(finished) & set(calls_of_one)
    (out / ".labels-0123456789abcdef").mkdir()  # of a run with other settings, which was given up
    make_labels(manifest, out, clusters=11)
    assert not list(out.glob(".labels-*"))
    make_labels(manifest, out, clusters=10)
    for name in ("train.km", "valid.km"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_jobs_share_a_folder(manifest, tmp_path, monkeypatch, capsys) -> None:
    """Three ranks, one of which dies and is started again; a rank that comes before k-means waits; the last call collects."""
    monkeypatch.setattr(targets, "SHARD_SECONDS", 10)
    monkeypatch.setattr(targets, "WAIT_SECONDS", 0.01)
    make_labels(manifest, tmp_path / "alone", clusters=10)
    out = tmp_path / "shared"
    arguments = ["labels", str(manifest), "--out", str(out), "--features", "mfcc", "--clusters", "10", "--workers", "1"]
    early = Thread(target=make_labels, args=(manifest, out), kwargs={"clusters": 10, "share": (1, 3)})
    early.start()
    assert main([*arguments, "--nshard", "3", "--rank", "0", "--json"]) == 0
    early.join()
    printed = capsys.readouterr()
    first = json.loads(printed.out)
    assert first["shards"] > 5 and not (out / "labels.json").exists() and not list(out.glob("*.km"))
    assert "waiting for the k-means model of --rank 0" in printed.err
    with monkeypatch.context() as patch:
        patch.setattr(targets, "fit", lambda *_: pytest.fail("k-means was fitted again"))
        last = make_labels(manifest, out, clusters=10, share=(2, 3))
        assert last == {"rank": 2, "nshard": 3, "shards": first["shards"], "finished": first["shards"], "reused": False}
        shards = sorted(out.glob(".labels-*/*.km"))
        shards[2].unlink()  # as if rank 2 had died
        assert make_labels(manifest, out, clusters=10, share=(0, 3))["finished"] == first["shards"] - 1
        assert main([*arguments, "--nshard", "3", "--rank", "2"]) == 0
        assert f"{first['shards']} of all {first['shards']} shards are finished" in capsys.readouterr().out
        patch.setattr(targets, "_label_shard", lambda *_, **__: pytest.fail("a shard was labelled again"))
        assert main(arguments) == 0
    for name in ("train.km", "valid.km", "dict.km.txt", "kmeans.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "alone").iterdir())
    assert make_labels(manifest, out, clusters=10, share=(1, 3))["reused"] is True


def test_a_run_killed_while_it_cleared_up_leaves_nothing(manifest, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(targets.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        make_labels(manifest, tmp_path, clusters=10)
    assert list(tmp_path.glob(".labels-*")) and (tmp_path / "labels.json").exists()
    assert make_labels(manifest, tmp_path, clusters=10)["reused"] is True
    assert not list(tmp_path.glob(".labels-*"))


@pytest.mark.long
def test_killed_label_runs_lose_nothing() -> None:
    from benchmarks.kill_labels import kill_labels

    result = kill_labels(kills=3, seed=1, minutes=8.0, workers=1)
    assert result["kills"] == 3 and result["losses"] == []


def test_same_settings_are_not_made_twice_and_others_never_mix(manifest, tmp_path, monkeypatch) -> None:
    assert make_labels(manifest, tmp_path, clusters=10, splits=["train"])["reused"] is False
    train = (tmp_path / "train.km").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(targets, "fit", lambda *_: pytest.fail("k-means was fitted again"))
        assert make_labels(manifest, tmp_path, clusters=10, splits=["train"])["reused"] is True
        later = make_labels(manifest, tmp_path, clusters=10)  # adds valid, by the same model
    assert sorted(later["splits"]) == ["train", "valid"] and (tmp_path / "train.km").read_bytes() == train
    with pytest.raises(UserError, match="labels of valid made with other settings"):
        make_labels(manifest, tmp_path, clusters=12, splits=["train"])
    assert (tmp_path / "train.km").read_bytes() == train
    assert make_labels(manifest, tmp_path, clusters=12)["k"] == 12
    assert len((tmp_path / "dict.km.txt").read_text().splitlines()) == 12


def test_labels_beside_manifest_and_corpus_tables(corpus, tmp_path) -> None:
    """Tables that are no manifests are not taken for splits; clusters without a frame stay in the dictionary."""
    make_manifest(corpus, tmp_path, options=Options(valid_percent=0))
    (tmp_path / "transcripts.tsv").write_text("a.wav\ttext\n")
    summary = make_labels(tmp_path, tmp_path, clusters=300)
    assert list(summary["splits"]) == ["train"]
    assert len((tmp_path / "dict.km.txt").read_text().splitlines()) == 300


def bad_input(kind: str, manifest: Path, folder: Path) -> list[str]:
    """Arguments of a run that must be refused."""
    tables = folder / "tables"
    tables.mkdir()
    for split in ("train", "valid"):
        (tables / f"{split}.tsv").write_bytes((manifest / f"{split}.tsv").read_bytes())
    train = tables / "train.tsv"
    lines = train.read_text().splitlines()
    arguments = ["labels", str(tables), "--out", str(folder / "out"), "--workers", "1"]
    mfcc = [*arguments, "--features", "mfcc", "--clusters", "10"]
    if kind == "short utterance":
        train.write_text("\n".join([*lines, "brief.wav\t399"]) + "\n")
    elif kind == "wrong length":
        name, samples = lines[1].split("\t")
        train.write_text("\n".join([lines[0], f"{name}\t{int(samples) + 7}", *lines[2:]]) + "\n")
    elif kind == "missing audio":
        train.write_text("\n".join([*lines, "gone.wav\t16000"]) + "\n")
    elif kind == "malformed":
        train.write_text("\n".join([*lines, "no tab here"]) + "\n")
    elif kind == "empty manifest":
        train.write_text(lines[0] + "\n")
    elif kind == "no manifest":
        for file in tables.iterdir():
            file.unlink()
    elif kind == "no folder":
        return ["labels", str(folder / "nowhere"), *mfcc[2:]]
    elif kind == "too many clusters":
        return [*mfcc, "--clusters", "1000000"]
    elif kind == "unknown split":
        return [*mfcc, "--splits", "test"]
    elif kind == "rank alone":
        return [*mfcc, "--rank", "1"]
    elif kind == "rank too high":
        return [*mfcc, "--nshard", "2", "--rank", "2"]
    elif kind == "two sources":
        return [*mfcc, "--checkpoint", "x.pt"]
    elif kind == "no source":
        return arguments
    elif kind == "no checkpoint":
        return [*arguments, "--checkpoint", str(folder / "none.pt"), "--layer", "1"]
    elif kind == "checkpoint that is none":
        return [*arguments, "--checkpoint", str(train), "--layer", "1"]
    return mfcc


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short utterance", "brief.wav has 399 samples"),
        ("wrong length", "is not what its manifest says"),
        ("missing audio", "cannot be read any more"),
        ("malformed", "expected a path, a tab and a number of samples"),
        ("empty manifest", "lists no utterance"),
        ("no manifest", "no manifest in"),
        ("no folder", "is not a folder"),
        ("too many clusters", "needs as many frames"),
        ("unknown split", "no manifest"),
        ("rank alone", "--nshard N and --rank I go together"),
        ("rank too high", "--rank 2 must be from 0 to 1"),
        ("two sources", "one source of features"),
        ("no source", "one source of features"),
        ("no checkpoint", "no checkpoint at"),
        ("checkpoint that is none", "is no checkpoint"),
    ],
)
def test_bad_input(manifest, tmp_path, capsys, kind, message) -> None:
    assert main(bad_input(kind, manifest, tmp_path)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("features to cluster")]  # progress
    assert len(lines) == 1 and message in lines[0]
    visible = [p for p in (tmp_path / "out").glob("*") if not p.name.startswith(".")] if (tmp_path / "out").exists() else []
    assert visible == []


@pytest.mark.parametrize(("layer", "message"), [(None, "needs --layer"), (3, "hidden states 0 to 2"), (-1, "hidden states 0 to 2")])
def test_layer_must_exist(manifest, checkpoint, tmp_path, layer, message) -> None:
    with pytest.raises(UserError, match=message):
        make_labels(manifest, tmp_path, FeatureSource(checkpoint, layer), clusters=5)
    assert list(tmp_path.iterdir()) == []


# ---- quality


def test_purities_by_hand() -> None:
    perfect = purities(np.diag([3, 5, 2]))
    assert all(v == pytest.approx(1) for v in perfect.values())
    independent = purities(np.outer([1, 3], [2, 2]))
    assert independent == {"phone_purity": pytest.approx(0.75), "cluster_purity": pytest.approx(0.5), "pnmi": pytest.approx(0)}
    # phones A (6 frames), B (4); clusters 0, 1, 2
    mixed = purities(np.array([[4, 1, 1], [0, 1, 3]]))
    assert mixed["phone_purity"] == pytest.approx((4 + 1 + 3) / 10)
    assert mixed["cluster_purity"] == pytest.approx((4 + 3) / 10)
    entropy = -(0.6 * np.log(0.6) + 0.4 * np.log(0.4))
    rest = -(0.2 * 2 * 0.5 * np.log(0.5) + 0.1 * np.log(0.25) + 0.3 * np.log(0.75))
    assert mixed["pnmi"] == pytest.approx(1 - rest / entropy)


def test_frames_meet_the_phone_at_their_centre(tmp_path) -> None:
    """Two phones of half a second; the label says which one the frame's centre is in, so every measure is 1."""
    soundfile.write(tmp_path / "a.wav", noise(1.0), 16000)
    (tmp_path / "train.tsv").write_text(f"{tmp_path}\na.wav\t16000\n")
    labels = [int(i / 100 + 0.0125 >= 0.5) for i in range(98)]
    (tmp_path / "train.km").write_text(" ".join(map(str, labels)) + "\n")
    info = {"rate": 100.0, "k": 2, "splits": {"train": {}}, "manifest": str(tmp_path)}
    (tmp_path / "labels.json").write_text(json.dumps(info))
    rows = "path\ttier\tstart\tend\tlabel\na.wav\tphone\t0\t0.5\tx\na.wav\tphone\t0.5\t0.9\ty\na.wav\tword\t0\t0.9\txy\n"
    (tmp_path / "alignments.tsv").write_text(rows)
    report = label_quality(tmp_path, tmp_path / "alignments.tsv")["all"]
    assert (report["phone_purity"], report["cluster_purity"], report["pnmi"]) == (1, 1, 1)
    assert (report["frames"], report["aligned_frames"], report["phones"]) == (98, 89, 2)


def test_labels_of_speech_know_phones_also_after_joining(corpus, manifest, tmp_path, capsys) -> None:
    make_labels(manifest, tmp_path / "labels", clusters=50)
    alignments = str(corpus / "alignments.tsv")
    assert main(["labels", "quality", str(tmp_path / "labels"), "--alignments", alignments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    whole = report["all"]
    assert sorted(report["splits"]) == ["train", "valid"] and whole["aligned_frames"] > 0.98 * whole["frames"]
    assert whole["pnmi"] > 0.35 and whole["phone_purity"] > 2.5 * whole["majority_phone_share"]

    file = tmp_path / "labels" / "train.km"  # the same labels in random order know nothing
    lines = file.read_text().splitlines()
    rng = np.random.default_rng(0)
    file.write_text("".join(" ".join(rng.permutation(line.split())) + "\n" for line in lines))
    assert label_quality(tmp_path / "labels", alignments)["splits"]["train"]["pnmi"] < report["splits"]["train"]["pnmi"] / 2

    make_manifest(corpus, tmp_path / "joined", options=Options(join=8.0))
    make_labels(tmp_path / "joined", tmp_path / "joined", clusters=50)
    joined = label_quality(tmp_path / "joined", alignments)["all"]
    assert joined["pnmi"] == pytest.approx(whole["pnmi"], abs=0.05)


def test_quality_of_bad_input(corpus, manifest, tmp_path, capsys) -> None:
    alignments = str(corpus / "alignments.tsv")
    assert main(["labels", "quality", str(tmp_path), "--alignments", alignments]) == 2
    make_labels(manifest, tmp_path, clusters=5)
    assert main(["labels", "quality", str(tmp_path), "--alignments", str(tmp_path / "none.tsv")]) == 2
    assert main(["labels", "quality", str(tmp_path)]) == 2
    other = tmp_path / "other.tsv"
    other.write_text("unknown.wav\tphone\t0\t1\ta\n")
    assert main(["labels", "quality", str(tmp_path), "--alignments", str(other)]) == 2
    (tmp_path / "train.km").write_text("1 2 3\n")
    assert main(["labels", "quality", str(tmp_path), "--alignments", alignments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hubert-eff labels: ")]
    expected = ["labels.json", "no alignments at", "--alignments FILE is missing", "phones of none", "train.km has 1 lines"]
    assert len(errors) == 5 and all(text in line for text, line in zip(expected, errors))


@pytest.mark.parametrize("wrong", ["missing", "no integer", "too large", "negative"])
def test_quality_of_labels_that_were_changed(tmp_path, capsys, wrong) -> None:
    (tmp_path / "train.tsv").write_text(f"{tmp_path}\na.wav\t720\nb.wav\t720\n")
    (tmp_path / "labels.json").write_text(json.dumps({"rate": 100, "k": 5, "splits": ["train"], "manifest": str(tmp_path)}))
    (tmp_path / "alignments.tsv").write_text("a.wav\tphone\t0\t1\tx\nb.wav\tphone\t0\t1\ty\n")
    file = tmp_path / "train.km"
    arguments = ["labels", "quality", str(tmp_path), "--alignments", str(tmp_path / "alignments.tsv")]
    file.write_text("0 4 1\n2 0 1\n")
    assert main(arguments) == 0
    capsys.readouterr()
    token = {"no integer": "1.5", "too large": "5", "negative": "-1"}.get(wrong)
    file.write_text(f"0 4 1\n2 {token} 1\n") if token else file.unlink()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (f"{file}, line 2: {token!r} is no label from 0 to 4" if token else f"{file} cannot be read") in error
