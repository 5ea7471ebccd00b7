"""Generated data of all ten tasks."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from hubert_eff.cli import main
from hubert_eff.data.synthetic.espeak import pronounce
from hubert_eff.errors import UserError
from hubert_eff.utils import progress
from hubert_eff.utils.files import temporary_beside
from superb_tasks.data import corpus
from superb_tasks.data.generators import common, diarization, fluent_commands, iemocap, librispeech, snips, voxceleb
from superb_tasks.data.generators.common import sex, voices
from superb_tasks.tasks import TASKS

pytest.importorskip("espeakng_loader")


def test_progress_has_a_unit_and_ends_at_the_estimate(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    expected, printed = "words: 2 of 2 s of speech, about 0 s left\n", ""
    with common.disk(tmp_path / "words", minutes=1 / 30) as recorder:
        for number in range(3):  # a second more than estimated
            recorder.save(f"{number}.wav", np.zeros(16000))
        for _ in range(3000):
            if (printed := printed + capsys.readouterr().err).endswith(expected):
                break
            time.sleep(0.01)
    assert printed.endswith(expected) and " 3 of " not in printed


# -- all ten tasks ---------------------------------------------------------------------------------------------------

SMALL = 0.2  # minutes, of the shared data too


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_every_recording_is_16_khz_mono_speech(data):
    recordings = [path for path in data.rglob("*") if path.suffix in (".wav", ".flac")]
    assert {path.relative_to(data).parts[0] for path in recordings} == {
        "LibriSpeech", "speech_commands_v0.01", "speech_commands_test_set_v0.01", "quesst14Database", "VoxCeleb1", "diarization",
        "fluent_speech_commands_dataset", "SNIPS", "IEMOCAP",
    }  # fmt: skip
    for path in recordings:
        audio, rate = sf.read(path)
        assert rate == 16000 and audio.ndim == 1 and len(audio) >= 4000, path
        assert 0.03 < np.abs(audio).max() <= 1 and audio.std() > 0.005, path
    assert "compare models with each other only" in (data / "README.txt").read_text()
    assert not list(data.glob(".*"))


@pytest.mark.parametrize("task", TASKS)
def test_the_layout_passes_the_check_of_its_task(data, task):
    TASKS[task].check(data)


def test_every_task_has_a_data_set():
    assert set(corpus.DATA_SETS) == set(TASKS)


def test_data_sets_are_the_same_for_the_same_arguments_only(data, tmp_path):
    for task in ("pr", "qbe", "ic", "sf"):
        corpus.make_superb(tmp_path, [task], minutes=SMALL, seed=3)
    for folder in ("LibriSpeech", "quesst14Database", "fluent_speech_commands_dataset", "SNIPS"):
        assert files(tmp_path / folder) == files(data / folder)
    corpus.make_superb(tmp_path / "other", ["sf"], minutes=SMALL, seed=4)
    assert files(tmp_path / "other" / "SNIPS") != files(data / "SNIPS")


def test_an_interrupted_call_goes_on_where_it_stopped(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(snips, "request", interrupt)
        corpus.make_superb(tmp_path, ["ic", "sf"], SMALL, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"fluent_speech_commands_dataset", "corpus.json"}
    left = temporary_beside(tmp_path / "SNIPS").name.replace(f"-{os.getpid()}-", "-4194305-")  # no process has that number
    (tmp_path / left / "SNIPS").mkdir(parents=True)  # as a killed process leaves it
    before = (tmp_path / "fluent_speech_commands_dataset").stat().st_mtime_ns
    made = corpus.make_superb(tmp_path, ["ic", "sf"], SMALL, 3)
    assert (tmp_path / "fluent_speech_commands_dataset").stat().st_mtime_ns == before
    record = json.loads((tmp_path / "corpus.json").read_text())
    assert record == made and set(made) == {"fluent_speech_commands_dataset", "SNIPS"}
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match="holds another SNIPS"):
        corpus.make_superb(tmp_path, ["sf"], SMALL, 4)


def test_minutes_set_the_size(tmp_path):
    made = corpus.make_superb(tmp_path, ["asr", "sf"], 1.5, 0)
    for entry in made.values():
        assert 1.5 <= entry["recorded_minutes"] < 2.5


def test_command_line(tmp_path, capsys):
    arguments = ["corpus", "superb", "--out", str(tmp_path / "out"), "--minutes", str(SMALL)]
    assert main([*arguments, "--task", "asr, pr"]) == 0
    assert re.fullmatch(r"LibriSpeech: \d+ recordings, 0\.\d min -> .*LibriSpeech\n", capsys.readouterr().out)
    assert main([*arguments, "--task", "pr", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["LibriSpeech"]["recordings"] > 2
    for more, message in (
        (["--task", "azr"], "did you mean 'asr'"),
        (["--task", ","], "no task"),
        (["--minutes", "0"], "must be above 0"),
        (["--seed", "-1"], "must not be negative"),
        (["--out", str(tmp_path / "a b")], "no spaces in paths"),
    ):
        assert main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a b").exists()
    (tmp_path / "file").write_text("")
    assert main(["corpus", "superb", "--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_lexicon_has_a_line_for_every_word_and_phones_of_arpabet(data):
    root = data / "LibriSpeech"
    words = {word for path in root.rglob("*.trans.txt") for line in path.read_text().splitlines() for word in line.split()[1:]}
    lexicon = dict(line.split(" ", 1) for line in (root / librispeech.LEXICON).read_text().splitlines())
    assert set(lexicon) == words
    consonants = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH".split()
    vowels = [vowel + stress for vowel in "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split() for stress in "012"]
    assert {phone for phones in lexicon.values() for phone in phones.split()} <= {*consonants, *vowels}
    assert librispeech.arpabet(["THE", "A", "YELLOW", "ENGINEER", "FIRE"]) == {
        "THE": ["DH", "AH0"],
        "A": ["AH0"],
        "YELLOW": ["Y", "EH1", "L", "OW0"],
        "ENGINEER": ["EH2", "N", "JH", "IH0", "N", "IH1", "R"],
        "FIRE": ["F", "AY1", "ER0"],
    }
    assert pronounce(["two boats"], "en") == ["tˈuːbˈəʊts"]
    with pytest.raises(UserError, match="ARPAbet has no phone for"):
        librispeech._phones("LOCH", "lˈɒx")


def test_no_voice_is_in_two_splits(data):
    for split, other in (("train-clean-100", "dev-clean"), ("train-clean-100", "test-clean"), ("dev-clean", "test-clean")):
        assert not {p.name for p in (data / "LibriSpeech" / split).iterdir()} & {p.name for p in (data / "LibriSpeech" / other).iterdir()}
    tables = {split: table(data / "fluent_speech_commands_dataset" / "data" / f"{split}_data.csv") for split in ("train", "valid", "test")}
    speakers = {split: {row["speakerId"] for row in rows} for split, rows in tables.items()}
    assert not speakers["train"] & speakers["valid"] and not (speakers["train"] | speakers["valid"]) & speakers["test"]
    mixed = [(data / "diarization" / split / "spk2utt").read_text().splitlines() for split in ("train", "dev", "test")]
    names = [line.split()[0] for lines in mixed for line in lines]
    assert len(set(names)) == len(names)
    for count, name in ((24, "VoxCeleb1"), (24, "LibriSpeech"), (16, "SNIPS")):
        assert len(set(voices(count, name, 3))) == count


def test_commands_name_their_intents(data):
    rows = table(data / "fluent_speech_commands_dataset" / "data" / "train_data.csv")
    assert {(row["action"], row["object"], row["location"]) for row in rows} == set(fluent_commands.INTENTS)
    assert len(set(fluent_commands.INTENTS)) == 31
    for row in rows:
        for said in {row["object"], row["location"]} - {"none"}:
            assert said.lower() in row["transcription"].lower()
    rng = random.Random(0)
    assert len({fluent_commands.command(("bring", "shoes", "none"), rng) for _ in range(50)}) == 4


def test_trials_are_half_of_one_speaker_each(data):
    root = data / "VoxCeleb1"
    trials = [line.split() for line in (root / voxceleb.TRIAL_LIST).read_text().splitlines()]
    assert {label: sum(trial[0] == label for trial in trials) for label in "01"} == {"0": len(trials) / 2, "1": len(trials) / 2}
    for label, *pair in trials:
        assert (label == "1") == (pair[0].split("/")[0] == pair[1].split("/")[0]) and pair[0] != pair[1]
        assert all((root / "test" / "wav" / path).is_file() for path in pair)


def test_emotions_can_be_heard(data):
    """Anger is louder than sadness in every session; mood shifts pace and pitch."""
    for session in range(1, 6):
        by_label: dict[str, list[np.ndarray]] = {}
        for entry in json.loads((data / f"IEMOCAP/meta_data/Session{session}/test_meta_data.json").read_text())["meta_data"]:
            by_label.setdefault(entry["label"], []).append(sf.read(data / "IEMOCAP" / entry["path"])[0])
        assert set(by_label) == set(iemocap.LABELS)
        ang, sad = (np.mean([np.abs(audio).max() for audio in by_label[label]]) for label in ("ang", "sad"))
        assert ang > 1.4 * sad
    voice = voices(1, "IEMOCAP", 0)[0]
    assert iemocap.in_mood(voice, "sad").rate < voice.rate < iemocap.in_mood(voice, "ang").rate
    assert iemocap.in_mood(voice, "sad").pitch < voice.pitch < iemocap.in_mood(voice, "hap").pitch


def test_conversations_are_labeled_where_they_are_loud():
    """Outside the segments there is silence, inside there is speech; speakers overlap now and then; none overlaps itself."""
    rng, overlaps = random.Random(0), 0
    pair = [("a", voices(2, "x", 0)[0]), ("b", voices(2, "x", 0)[1])]
    for _ in range(4):
        audio, segments = diarization.conversation(pair, rng)
        active = np.zeros((2, len(audio)), dtype=int)
        for segment in segments:
            active["ab".index(segment.label), round(segment.start * 16000) : round(segment.end * 16000)] += 1
        assert active.max() == 1 and active.any(1).all()
        overlaps += int((active.sum(0) == 2).sum())
        loud = np.sqrt(np.convolve(audio**2, np.ones(800) / 800, "same")) > 0.02
        assert loud[active.sum(0) == 0].mean() < 0.1 < 0.6 < loud[active.sum(0) > 0].mean()
    assert overlaps > 8000


def test_queries_occur_where_the_truth_says(data):
    scoring = data / "quesst14Database" / "scoring"
    for part in ("dev", "eval"):
        truth = [line.split() for line in (scoring / f"groundtruth_quesst14_{part}" / f"quesst14_{part}.rttm").read_text().splitlines()]
        queries = [Path(line.split()[0]).stem for line in (scoring / f"language_key_{part}.lst").read_text().splitlines()]
        assert {line[5] for line in truth} == set(queries) and min(Counter(line[5] for line in truth).values()) >= 2
        sizes = {}
        for _, recording, _, start, duration, query, *_ in truth:
            sentence = data / "quesst14Database" / "Audio" / f"{recording}.wav"
            sizes.setdefault(query, []).append(float(duration))
            assert 0 < float(start) < float(start) + float(duration) < sf.info(sentence).duration
            asked = sf.info(data / "quesst14Database" / f"{part}_queries" / f"{query}.wav").duration
            assert 0.5 < asked / float(duration) < 2
        tlist = (scoring / f"groundtruth_quesst14_{part}" / f"quesst14_{part}.tlist.xml").read_text()
        assert re.findall(r'termid="(\w+)"', tlist) == queries


def test_slots_cover_their_words():
    rng, seen = random.Random(0), set()
    for _ in range(300):
        intent, text, words, tags = snips.request(rng)
        assert len(words) == len(tags) and " ".join(words) == re.sub(r"[^A-Z' ]", "", text.upper())
        for tag in set(tags) - {"O"}:
            seen.add(tag)
            assert " ".join(word for word, t in zip(words, tags) if t == tag) in {value.upper() for value in snips.SLOTS[tag]}
    assert seen == set(snips.SLOTS)


def test_shares_and_splits():
    parts = {"train": 0.7, "valid": 0.1, "test": 0.2}
    assert common.shares(10, parts) == pytest.approx({"train": 420, "valid": 60, "test": 120})
    assert common.divide(range(10), parts) == {"train": [*range(7)], "valid": [7], "test": [8, 9]}
    assert common.divide(range(3), parts) == {"train": [0], "valid": [1], "test": [2]}
    assert Counter(map(sex, voices(16, "x", 0))) == {"F": 8, "M": 8}
