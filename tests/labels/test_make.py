"""Labels: runs that are interrupted, shared or refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import soundfile

from hubert_eff.cli import main
from hubert_eff.data.manifest import Options, make_manifest
from hubert_eff.errors import UserError
from hubert_eff.labels import make as targets
from hubert_eff.labels.features import FeatureSource, Mfcc
from hubert_eff.labels.kmeans import KMeans
from hubert_eff.labels.make import make_labels, read_manifest

pytest.importorskip("sklearn")
pytest.importorskip("torchaudio")


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
        patch.setattr(targets, "_label_shard", lambda *_, **__: pytest.fail("a shard was labeled again"))
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
    from benchmarks.reliability.kill_labels import kill_labels

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
    """Tables that are not manifests are not taken for splits; clusters without a frame stay in the dictionary."""
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
        ("checkpoint that is none", "is not a checkpoint"),
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
