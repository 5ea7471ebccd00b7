"""Synthesis with timings, and the demo corpus."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pytest
import soundfile

from hubert_eff.cli import main
from hubert_eff.data.synthetic.espeak import SILENCE, Voice, speak
from hubert_eff.data.synthetic.sentences import MAX_SECONDS, MIN_SECONDS, make_demo, speakers
from hubert_eff.errors import UserError

pytest.importorskip("espeakng_loader")
SENTENCE = "The quick brown fox, jumped over the lazy dog."


def test_phones_cover_the_audio_and_words_lie_on_them() -> None:
    speech = speak(SENTENCE)
    assert speech.audio.dtype == np.float32 and 0.1 < np.abs(speech.audio).max() <= 1
    assert speech.phones[0].start == 0 and speech.phones[-1].end == pytest.approx(len(speech.audio) / 16000)
    for before, after in zip(speech.phones, speech.phones[1:]):
        assert before.end == after.start and before.start < before.end
    assert [w.label for w in speech.words] == "the quick brown fox jumped over the lazy dog".split()
    edges = {p.start for p in speech.phones} | {p.end for p in speech.phones}
    assert all(w.start in edges and w.end in edges for w in speech.words)
    assert not any("ˈ" in p.label or "ˌ" in p.label or not p.label for p in speech.phones)


def test_timings_fit_the_sound() -> None:
    """The pause after the comma is quiet and the vowel of `lazy` is loud, at the times given."""
    speech = speak(SENTENCE)
    level = {p: float(np.sqrt(np.mean(speech.audio[int(p.start * 16000) : int(p.end * 16000)] ** 2))) for p in speech.phones}
    pause = next(p for p in speech.phones[1:-1] if p.label == SILENCE)
    fox, jumped = (next(w for w in speech.words if w.label == label) for label in ("fox", "jumped"))
    assert fox.end == pause.start and pause.end == jumped.start
    vowel = next(p for p in speech.phones if p.label == "eɪ")
    assert level[pause] < 0.02 * level[vowel]


def test_speak_is_a_pure_function() -> None:
    first, voice = speak(SENTENCE), Voice("en", "f2", pitch=60, rate=180)
    other = speak(SENTENCE, voice, seed=7)
    assert np.array_equal(first.audio, speak(SENTENCE).audio)
    assert np.array_equal(other.audio, speak(SENTENCE, voice, seed=7).audio)
    assert len(other.audio) < len(first.audio)  # it speaks faster


def test_words_that_are_run_together_share_a_segment_and_numbers_keep_their_digits() -> None:
    words = [w.label for w in speak("They paid 23 coins in the town of Paris.").words]
    assert " ".join(words) == "they paid 23 coins in the town of paris"
    assert "23" in words


@pytest.mark.parametrize(
    ("text", "voice", "message"),
    [
        ("...", Voice(), "nothing to say"),
        ("a", Voice("xx"), "no voice 'xx'"),
        ("a", Voice(variant="f22"), "did you mean 'f2'"),
        ("a", Voice(rate=5), "80 to 450"),
    ],
)
def test_bad_requests(text: str, voice: Voice, message: str) -> None:
    with pytest.raises(UserError, match=message):
        speak(text, voice)


def test_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object) -> object:
        if name == "espeakng_loader":
            raise ImportError(name)
        return real(name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"espeakng-loader.*pip install 'hubert-eff\[data\]'"):
        speak("a")


def test_demo_corpus(tmp_path, capsys) -> None:
    out = tmp_path / "corpus"
    assert main(["corpus", "demo", "--out", str(out), "--minutes", "0.6", "--speakers", "3", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    transcripts = dict(line.split("\t") for line in (out / "transcripts.tsv").read_text().splitlines())
    files = sorted(str(p.relative_to(out)) for p in out.glob("*/*.wav"))
    assert sorted(transcripts) == files and len(files) == summary["utterances"]
    assert {f.split("/")[0] for f in files} == {"speaker01", "speaker02", "speaker03"}
    assert summary["minutes"] >= 0.6

    ends: dict[str, float] = {}
    words: dict[str, list[str]] = {}
    for line in (out / "alignments.tsv").read_text().splitlines():
        path, tier, start, end, label = line.split("\t")
        if tier == "phone":
            assert abs(float(start) - ends.get(path, 0.0)) < 2e-4  # without gaps
            ends[path] = float(end)
        else:
            words.setdefault(path, []).append(label)
    for path in files:
        info = soundfile.info(out / path)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert MIN_SECONDS <= info.duration <= MAX_SECONDS
        assert ends[path] == pytest.approx(info.duration, abs=1e-3)
        assert " ".join(words[path]) == "".join(c for c in transcripts[path].lower() if c.isalpha() or c == " ")


def test_demo_corpus_depends_on_the_seed_only(tmp_path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_demo(tmp_path / name, minutes=0.15, speaker_count=2, seed=seed)
    content = [{p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.*") if p.is_file()} for n in "abc"]
    assert content[0] == content[1] != content[2]


def test_speakers_differ() -> None:
    voices = speakers(32, seed=1)
    assert len({v.name for v in voices}) == 32
    for voice in voices:
        assert len(speak("hello", voice).audio) > 1000


def test_demo_corpus_spares_other_files(tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    assert main(["corpus", "demo", "--out", str(tmp_path), "--minutes", "0.1", "--speakers", "1"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("mark", [None, "[]", '{"corpus": "mine", "voices": {}}', '{"corpus": "demo"}', "no json"])
def test_demo_corpus_spares_recordings_in_folders_named_like_its_own(tmp_path, capsys, mark) -> None:
    recording = tmp_path / "speaker1" / "my_recording.wav"
    recording.parent.mkdir()
    recording.write_bytes(b"precious")
    if mark is not None:
        (tmp_path / "corpus.json").write_text(mark)
    assert main(["corpus", "demo", "--out", str(tmp_path), "--minutes", "0.05", "--speakers", "1"]) == 2
    assert recording.read_bytes() == b"precious"
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no corpus.json of a demo corpus" in error


@pytest.mark.parametrize("added", ["speaker2/mine.wav", "speaker01/mine.wav", "speaker01/speaker01-9999.wav"])
def test_only_what_it_wrote_itself_is_replaced(tmp_path, added) -> None:
    out = tmp_path / "corpus"
    make_demo(out, minutes=0.05, speaker_count=1)
    make_demo(out, minutes=0.05, speaker_count=1, seed=2)
    assert json.loads((out / "corpus.json").read_text())["seed"] == 2
    (out / added).parent.mkdir(exist_ok=True)
    (out / added).write_bytes(b"precious")
    before = sorted(out.rglob("*"))
    with pytest.raises(UserError, match="is not part of its demo corpus"):
        make_demo(out, minutes=0.05, speaker_count=1)
    assert sorted(out.rglob("*")) == before and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("wrong", [["--minutes", "0"], ["--speakers", "0"], ["--speakers", "99"]])
def test_demo_corpus_refuses_bad_numbers(tmp_path, wrong, capsys) -> None:
    assert main(["corpus", "demo", "--out", str(tmp_path / "x"), *wrong]) == 2
    assert not (tmp_path / "x").exists() and capsys.readouterr().err.count("\n") == 1
