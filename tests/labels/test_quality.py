"""What labels know of phones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from hubert_eff.cli import main
from hubert_eff.data.manifest import Options, make_manifest
from hubert_eff.labels.make import make_labels
from hubert_eff.labels.quality import Phones, label_quality, purities

from ..helpers.pages import BLOCK, page, run_block
from ..helpers.recordings import noise

pytest.importorskip("sklearn")
pytest.importorskip("torchaudio")


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


def test_frames_meet_the_phone_at_their_center(tmp_path) -> None:
    """Two phones of half a second; the label says which one the frame's center is in, so every measure is 1."""
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


def test_alignments_of_the_montreal_forced_aligner(tmp_path) -> None:
    """The script of docs/labels.md reads what `mfa align --output_format csv` writes, and the rows on that page are read."""
    text = page("labels")
    (script,) = (body for _, language, body in BLOCK.findall(text) if language == "python")
    (rows,) = (body for _, language, body in BLOCK.findall(text) if language == "text" and "phone" in body)
    (tmp_path / "aligned" / "theo").mkdir(parents=True)
    aligned = "Begin,End,Label,Type,Speaker\n0.0,0.3,seven,words,theo\n0.0,0.11,s,phones,theo\n0.11,0.17,eh,phones,theo\n"
    (tmp_path / "aligned" / "theo" / "7_theo_0.csv").write_text(aligned)
    run_block("python", script, tmp_path)
    (tmp_path / "rows.tsv").write_text(rows)
    (tmp_path / "data").mkdir()
    made = Phones.read(tmp_path / "alignments.tsv", tmp_path / "data", clusters=2)
    shown = Phones.read(tmp_path / "rows.tsv", tmp_path / "data", clusters=2)
    assert made.intervals == {str(tmp_path / "recordings" / "theo" / "7_theo_0.wav"): [(0.0, 0.11, "s"), (0.11, 0.17, "eh")]}
    assert sorted(shown.inventory) == ["eh", "s", "v"]


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
    named = f"It has {tmp_path / 'unknown.wav'}, needed is e.g. {corpus}/"
    expected = ["labels.json", "no alignments at", "--alignments FILE is missing", named, "train.km has 1 lines"]
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
    assert (f"{file}, line 2: {token!r} is not a label from 0 to 4" if token else f"{file} cannot be read") in error
