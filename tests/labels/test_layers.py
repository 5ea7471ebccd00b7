"""Which layer of an encoder to take: `labels quality --layers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hubert_eff.cli import main
from hubert_eff.labels import layers as comparing
from hubert_eff.labels.layers import LayerChoice, layer_quality

from ..helpers.teachers import Toy, folder, installed  # noqa: F401 (a fixture)

pytest.importorskip("sklearn")
pytest.importorskip("torchaudio")


def compared(place: Path, corpus: Path, capsys: Any, *more: str) -> Any:
    capsys.readouterr()
    command = ["labels", "quality", str(place), "--alignments", str(corpus / "alignments.tsv"), "--clusters", "20", "--workers", "1"]
    assert main([*command, *more, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_layers_are_measured_as_labels_are_of_one_pass(
    installed: None, corpus: Path, manifest: Path, tmp_path: Path, capsys: Any  # noqa: F811
) -> None:  # fmt: skip
    before = Toy.passes
    found = compared(manifest, corpus, capsys, "--checkpoint", "toy:100", "--layers", "all")
    heard = Toy.passes - before
    assert [row["layer"] for row in found["layers"]] == [0, 1] and found["best"] == 1
    assert found["layers"][1]["all"]["pnmi"] > 2 * found["layers"][0]["all"]["pnmi"]
    assert [row["channels"] for row in found["layers"]] == [4, 20] and found["layers"][0]["rate"] == 100.0
    out = tmp_path / "labels"
    made = ["labels", str(manifest), "--out", str(out), "--checkpoint", "toy:100", "--layer", "1", "--clusters", "20", "--workers", "1"]
    assert main(made) == 0
    capsys.readouterr()
    assert main(["labels", "quality", str(out), "--alignments", str(corpus / "alignments.tsv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["valid"] == found["layers"][1]["splits"]["valid"]
    before = Toy.passes
    again = compared(out, corpus, capsys, "--layers", "1")  # the encoder and the clusters are those of the labels
    assert again["layers"] == found["layers"][1:] and again["best"] == 1
    assert Toy.passes - before == heard  # as often for one layer as for two
    assert not [*manifest.glob(".layers-*"), *out.glob(".layers-*")]


def test_a_comparison_that_was_killed_goes_on(
    installed: None, corpus: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    choice, alignments = LayerChoice("toy:50", clusters=10), corpus / "alignments.tsv"
    whole = layer_quality(manifest, alignments, choice)
    fit, fits = comparing.fit, []

    def failing(files: list[Path], clusters: int, seed: int) -> Any:
        fits.append(files[0].name)
        if fits == ["0.npy", "1.npy"]:
            raise KeyboardInterrupt
        return fit(files, clusters, seed)

    monkeypatch.setattr(comparing, "fit", failing)
    with pytest.raises(KeyboardInterrupt):
        layer_quality(manifest, alignments, choice)
    monkeypatch.setattr(comparing, "_state_shard", lambda *_, **__: pytest.fail("the audio was heard again"))
    assert layer_quality(manifest, alignments, choice) == whole and fits == ["0.npy", "1.npy", "1.npy"]


@pytest.mark.parametrize("kind", ["wavlm", "whisper", "conformer-debug@1"])
def test_layers_of_each_kind(corpus: Path, manifest: Path, tmp_path: Path, capsys: Any, kind: str) -> None:
    pytest.importorskip("transformers")
    if "@" not in kind:
        folder(tmp_path, kind)
    found = compared(
        manifest, corpus, capsys, "--checkpoint", kind if "@" in kind else str(tmp_path), "--layers", "all", "--splits", "train"
    )
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2] and list(found["layers"][0]["splits"]) == ["train"]
    assert all(0 < row["all"]["pnmi"] < 1 for row in found["layers"])


def test_bad_input(installed: None, corpus: Path, manifest: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    alignments = ["--alignments", str(corpus / "alignments.tsv")]
    foreign = tmp_path / "foreign.tsv"
    foreign.write_text("unknown.wav\tphone\t0\t1\ta\n")
    toy = ["--checkpoint", "toy:50", "--clusters", "10"]
    for arguments, message in (
        ([*alignments, "--layers", "all"], "--checkpoint is missing"),
        ([*alignments, "--layers", "two", *toy], "--layers two: give all, or numbers of hidden states"),
        ([*alignments, "--layers", "1,2", *toy], "--layers 2 is not in toy:50: it has hidden states 0 to 1"),
        ([*alignments, "--layers", "all", "--checkpoint", "toy:40"], "toy:40 has 40 frames per second in its hidden state 0"),
        ([*alignments, "--layers", "all", "--checkpoint", "toy:50", "--clusters", "100000"], "needs as many frames"),
        (["--alignments", str(foreign), "--layers", "all", *toy], "has phones of none of the recordings"),
        (["--layers", "all", *toy], "--alignments FILE is missing"),
        ([*alignments, *toy], "--checkpoint goes with --layers"),
    ):
        capsys.readouterr()
        assert main(["labels", "quality", str(manifest), *arguments]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line, line
    monkeypatch.setattr(comparing.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert main(["labels", "quality", str(manifest), *alignments, "--layers", "all", *toy]) == 2
    assert "lower --fit-hours, or name fewer --layers" in capsys.readouterr().err
