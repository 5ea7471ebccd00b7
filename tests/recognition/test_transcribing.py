"""`hubert-eff transcribe` on manifests and streams: scores of every search and mode, text while audio comes, and what is refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from hubert_eff import cli
from hubert_eff.errors import UserError
from hubert_eff.recognition import Recognizer, RecognizerConfig, load_recognizer, transcribe
from hubert_eff.recognition.live import LiveTranscript
from hubert_eff.recognition.scoring import score

from ..helpers.recognizers import make, save


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Noise with transcripts, as `hubert-eff manifest` writes them."""
    rows, parts = [str(tmp_path)], ["utterance\tstart\tend\tsource\ttranscript"]
    for i, text in enumerate(("cab a", "AB")):
        samples = np.random.default_rng(i).normal(0, 0.1, 16_000 + 4_800 * i)
        soundfile.write(tmp_path / f"{i}.wav", samples, 16_000)
        rows.append(f"{i}.wav\t{len(samples)}")
        parts.append(f"{i}.wav\t0\t1\t{i}.wav\t{text}")
    (tmp_path / "valid.tsv").write_text("\n".join(rows) + "\n")
    (tmp_path / "parts.tsv").write_text("\n".join(parts) + "\n")
    return tmp_path


def test_scores_count_what_is_wrong() -> None:
    pytest.importorskip("jiwer", reason="jiwer is not installed: pip install 'hubert-eff[text]'")
    found = score(["ONE TWO THREE", "FOUR"], ["ONE TOO", "FOUR FIVE SIX"])
    assert (found.words.substitutions, found.words.deletions, found.words.insertions, found.words.total) == (1, 1, 2, 4)
    assert found.words.rate == 100.0 and found.plain()["wer"]["rate"] == 100.0
    assert found.characters.total == len("ONE TWO THREE") + len("FOUR") and found.characters.count == 1 + 6 + 9


def test_a_manifest_is_scored_by_every_search_in_every_mode(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jiwer", reason="jiwer is not installed: pip install 'hubert-eff[text]'")
    path = save(make(decoder_layers=1, streaming=True), data / "model.pt")
    arguments = ["transcribe", str(path), "--manifest", str(data), "--beam", "3", "--score"]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ways = {(way["search"], way["mode"]): way for way in found["ways"]}
    searches, modes = ("greedy", "beam", "rescore", "attention", "joint"), ("16-4", "16-inf", "full")
    assert set(ways) == {(search, mode) for search in searches for mode in modes}
    model = load_recognizer(path)
    for search, (mode, chunks) in (("rescore", ("16-4", {"chunk_size": 16, "left_chunks": 4})), ("joint", ("full", {}))):
        heard = [transcribe(model, torch.from_numpy(soundfile.read(data / f"{i}.wav", dtype="float32")[0])[None], search, 3, **chunks)
                 for i in range(2)]  # fmt: skip
        texts = [found["recordings"][i]["heard"][f"{search} {mode}"] for i in range(2)]
        assert texts == [text[0].text for text in heard]
        expected = score(["CAB A", "AB"], texts)
        assert ways[search, mode]["wer"] == expected.words.plain() and ways[search, mode]["cer"] == expected.characters.plain()
        assert ways[search, mode]["rtf"] > 0
    assert cli.main([*arguments, "--search", "beam,joint", "--modes", "full", "--utterances", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["beam", "full"], ["joint", "full"]] and "1 utterances, 2 words" in lines[3]
    assert cli.main(["transcribe", str(path), "--manifest", str(data), "--search", "attention"]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == ["0.wav", "1.wav"]


def test_text_comes_with_the_audio(data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(streaming=True).eval()
    model.ctc_proj.weight.data *= 4
    wav = torch.randn(1, 40_000) / 5
    expected = transcribe(model, wav, "beam", 4, chunk_size=16, left_chunks=2)[0].text
    assert expected
    for pieces in (wav.split(1_600, 1), wav.split(7_001, 1), (wav,)):
        live = LiveTranscript(model, 16, 2, beam=4)
        heard = [found for piece in pieces if (found := live.feed(piece)) is not None]
        last = live.flush()
        assert last.final and last.text == expected
        for before, after in zip(heard, [*heard[1:], last]):
            assert after.text.split()[: len(before.words.split())] == before.words.split()  # what is settled stays
        assert live.flush().text == ""
    path = save(model, data / "model.pt")
    pcm = (wav[0] * 32_768).clamp(-32_768, 32_767).short().numpy().tobytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(pcm)))
    assert cli.main(["transcribe", str(path), "-", "--stream", "16-2", "--beam", "4", "--json"]) == 0
    *lines, report = map(json.loads, capsys.readouterr().out.splitlines())
    assert lines[-1]["final"] and lines[-1]["text"] == expected and all(not line["final"] for line in lines[:-1])
    assert report["seconds"] == 2.5 and 0 < report["p50_ms"] <= report["p95_ms"] and report["rtf"] > 0


def test_text_comes_from_heads_that_read_fewer_frames(data: Path) -> None:
    config = RecognizerConfig(**{**vars(make(streaming=True).config), "output_downsampling": 2})
    model = Recognizer(config).eval()
    model.ctc_proj.weight.data *= 4
    wav = torch.randn(1, 40_000) / 5
    live = LiveTranscript(model, 16, 2, beam=4)
    for piece in wav.split(3_001, 1):
        live.feed(piece)
    assert live.flush().text == transcribe(model, wav, "beam", 4, chunk_size=16, left_chunks=2)[0].text
    with pytest.raises(UserError, match="chunk_size=15 must be a multiple of output_downsampling=2"):
        LiveTranscript(model, 15, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{data}/0.wav", "--score"], "--score compares texts with transcripts: name the manifest"),
        (["--manifest", "{data}", "--score", "--split", "none"], "no manifest"),
        (["--manifest", "{data}/empty", "--score"], "no transcripts: neither"),
        (["--manifest", "{data}", "--search", "attention"], "no attention decoder"),
        (["--manifest", "{data}", "--search", "greedy,beam"], "--search takes one name here, not greedy, beam"),
        (["--manifest", "{data}", "--search", "best"], "unknown search 'best'"),
        (["--manifest", "{data}", "--modes", "16"], "unknown mode"),
        (["--manifest", "{data}", "--modes", "16-4", "--score"], "this model cannot stream"),
        (["--manifest", "{data}", "--modes", "full", "--chunk-size", "16"], "say the same"),
        (["--manifest", "{data}", "{data}/0.wav"], "and not both"),
        ([], "name recordings, or a manifest"),
        (["{data}/0.wav", "--stream", "16-4"], "this model cannot stream"),
        (["{data}/0.wav", "--stream", "full"], "mode full is the whole recording"),
        (["{data}/0.wav", "--stream", "16-4", "--search", "joint"], "--stream searches by beam alone"),
        (["{data}/0.wav", "{data}/1.wav", "--stream", "16-4"], "--stream takes one file"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], message: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "empty").mkdir()
    (data / "empty" / "valid.tsv").write_text((data / "valid.tsv").read_text())
    path = save(make(), data / "model.pt")
    assert cli.main(["transcribe", str(path), *(a.replace("{data}", str(data)) for a in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
