"""The generated data sets: what they hold, and what S3PRL's own classes read from them; what is refused as a keyword corpus."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf

import superb_tasks
from hubert_eff.cli import main
from hubert_eff.data.synthetic.espeak import pronounce
from hubert_eff.errors import UserError
from hubert_eff.utils.files import temporary_beside
from superb_tasks.data import corpus
from superb_tasks.data.generators import common, diarization, fluent_commands, iemocap, librispeech, snips, speech_commands, voxceleb
from superb_tasks.data.generators.common import NOISES, sex, voices
from superb_tasks.data.generators.speech_commands import KEYWORDS, OTHER_WORDS, check_keywords, folders, make_keywords, split_of
from superb_tasks.tasks import TASKS

pytest.importorskip("espeakng_loader")
SMALL = 0.2  # minutes, of the shared data too


# -- keywords --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("keywords")
    return out, make_keywords(out, seed=3, per_word=8, speakers=6)


@pytest.fixture
def copy(made, tmp_path) -> tuple[Path, Path]:
    shutil.copytree(made[0], tmp_path / "copy")
    return folders(tmp_path / "copy")


def test_layout_is_that_of_speech_commands(made):
    out, summary = made
    root, test_root = folders(out)
    check_keywords(root, test_root)
    recordings = {word: sorted(path.name for path in (root / word).glob("*.wav")) for word in (*KEYWORDS, *OTHER_WORDS)}
    assert {len(recordings[word]) for word in KEYWORDS} == {8}
    assert {len(recordings[word]) for word in OTHER_WORDS} == {2}
    assert summary["train"] + summary["valid"] + summary["test"] == 10 * 8 + 20 * 2
    speakers = {name.split("_nohash_")[0] for names in recordings.values() for name in names}
    assert sorted(split_of(speaker) for speaker in speakers) == ["test"] + 4 * ["train"] + ["valid"]
    for name, split in (("validation_list.txt", "valid"), ("testing_list.txt", "test")):
        listed = (root / name).read_text().split()
        assert len(listed) == summary[split]
        assert listed == sorted(f"{word}/{file}" for word, files in recordings.items() for file in files if split_of(file) == split)
    tested = {path.name: sorted(file.name for file in path.iterdir()) for path in test_root.iterdir()}
    assert set(tested) == {*KEYWORDS, "_unknown_", "_silence_"}
    for word in KEYWORDS:
        assert tested[word] == [name for name in recordings[word] if split_of(name) == "test"]
    assert tested["_unknown_"] and tested["_silence_"]


def test_recordings_are_one_second_of_varied_speech(made):
    root, _ = folders(made[0])
    audios = []
    for path in sorted((root / "yes").glob("*.wav")):
        info = sf.info(path)
        assert (info.samplerate, info.channels, info.frames, info.subtype) == (16000, 1, 16000, "PCM_16")
        audios.append(sf.read(path)[0])
        assert 0.19 < np.abs(audios[-1]).max() < 0.81
    correlations = np.corrcoef(audios) - np.eye(len(audios))
    assert np.abs(correlations).max() < 0.9  # no recording is another one again
    for noise in (root / "_background_noise_").glob("*.wav"):
        assert sf.info(noise).frames == speech_commands.NOISE_SECONDS * 16000


def test_the_same_arguments_give_the_same_files(made, tmp_path):
    out, summary = made
    again = make_keywords(tmp_path, seed=3, per_word=8, speakers=6)
    assert {key: again[key] for key in ("train", "valid", "test")} == {key: summary[key] for key in ("train", "valid", "test")}
    files = sorted(path.relative_to(out) for path in out.rglob("*.wav"))
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.wav"))
    assert all((out / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


def test_a_corpus_is_kept_and_never_mixed_with_another(made):
    out, summary = made
    file = next(folders(out)[0].glob("yes/*.wav"))
    before = file.stat().st_mtime_ns
    assert make_keywords(out, seed=3, per_word=8, speakers=6) == summary
    assert file.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds another speech_commands_v0.01: .* or remove .* and speech_commands_test_set_v0.01"):
        make_keywords(out, seed=4, per_word=8, speakers=6)


@pytest.mark.parametrize("arguments", [{"speakers": 2}, {"speakers": 129}, {"speakers": 8, "per_word": 7}])
def test_impossible_sizes_are_refused(arguments, tmp_path):
    with pytest.raises(UserError, match="speakers"):
        make_keywords(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_a_corpus_that_failed(tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("no voice")

    monkeypatch.setattr(speech_commands, "_record", fail)
    with pytest.raises(UserError, match="no voice"):
        make_keywords(tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


def test_s3prl_splits_it_alike(made):
    pytest.importorskip("s3prl")
    from s3prl.dataio.corpus.speech_commands import SpeechCommandsV1

    out, summary = made
    train, valid, test = SpeechCommandsV1(*map(str, folders(out))).data_split
    noises = len(NOISES)
    assert (len(train), len(valid)) == (summary["train"] + noises, summary["valid"] + noises)
    for split, data in (("train", train), ("valid", valid)):
        assert {split_of(name.split("/")[1]) for name in data if not name.startswith("_background_noise_")} == {split}
    assert {entry["class_name"] for entry in test.values()} == {*KEYWORDS, "_unknown_", "_silence_"}


def _remove(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root, test: _remove(root / "yes"), "no recordings in yes"),
        (lambda root, test: _remove(root / "_background_noise_"), "no recordings in _background_noise_"),
        (lambda root, test: [_remove(root / word) for word in OTHER_WORDS], "keywords only"),
        (lambda root, test: sf.write(root / "_background_noise_" / "short.wav", np.zeros(99), 16000), "must last a second"),
        (lambda root, test: (root / "_background_noise_" / "a.wav").write_bytes(b"x" * 99), "is not audio"),
        (lambda root, test: next(root.glob("go/*.wav")).write_bytes(b""), "holds no audio"),
        (lambda root, test: [f.unlink() for f in root.glob("*/*.wav") if split_of(f.name) == "valid"], "falls into valid"),
        (lambda root, test: _remove(test / "_unknown_"), "no recordings in _unknown_"),
        (lambda root, test: (test / "bed").mkdir(), "holds bed, which is none of the twelve classes"),
    ],
)
def test_another_layout_is_refused(copy, damage, message):
    damage(*copy)
    with pytest.raises(UserError, match=message):
        check_keywords(*copy)


# -- all ten tasks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def data(superb_data) -> Path:
    return superb_data


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


def test_conversations_are_labelled_where_they_are_loud():
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


# -- read by S3PRL ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3prl():
    """S3PRL's modules, patched to run offline; a network access fails."""
    pytest.importorskip("s3prl")
    superb_tasks.register()
    from s3prl import problem
    from s3prl.util import download

    def offline(*_, **__):
        raise AssertionError("S3PRL tried to download")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "_download_url_to_file", offline)
        patch.setattr(download, "_download_url_to_file_requests", offline)
        yield problem


def batch_of(problem, dataset, mode: str, target: Path, **more) -> dict:
    """The first batch that a problem's sampler and collate function make of a data set."""
    sampler = problem.build_batch_sampler(
        problem.default_config()["build_batch_sampler"], target_dir=target, cache_dir=target, mode=mode, dataset=dataset, **more
    )
    return problem.build_collate_fn({}, mode)([dataset[index] for index in next(iter(sampler))])


def read_text_task(problem, target: Path, **prepare) -> tuple[list, dict]:
    """Prepare a task with transcripts as S3PRL does; the data frames of the three splits and a batch of validation."""
    import pandas as pd

    config = problem.default_config()
    train, valid, tests = problem.prepare_data({**config["prepare_data"], **prepare}, target, target)
    text = problem.prepare_tokenizer_data({}, target, target, train, valid, tests)
    tokenizer = problem.build_tokenizer(config["build_tokenizer"], target, target, text)
    dataset = problem.build_dataset({}, target, target, "valid", valid, tokenizer)
    return [pd.read_csv(path) for path in (train, valid, *tests)], batch_of(problem, dataset, "valid", target, data_csv=valid)


def test_s3prl_reads_asr(s3prl, data, tmp_path):
    frames, batch = read_text_task(s3prl.SuperbASR(), tmp_path, dataset_root=str(data / "LibriSpeech"), n_jobs=1)
    assert [len(frame) for frame in frames] == [len(list((data / "LibriSpeech" / split).rglob("*.flac"))) for split in librispeech.SPLITS]
    assert batch["x"].shape[1] > 16000 and batch["labels"][0] in frames[1]["transcription"].tolist()
    assert 2 not in batch["class_ids"]  # no unknown character


def test_s3prl_reads_pr(s3prl, data, tmp_path, monkeypatch):
    from s3prl.dataio.encoder import g2p

    monkeypatch.setattr(g2p, "_urls_to_filepaths", lambda *_: [data / "LibriSpeech" / librispeech.LEXICON])
    frames, batch = read_text_task(s3prl.SuperbPR(), tmp_path, dataset_root=str(data / "LibriSpeech"), n_jobs=1)
    assert all(re.fullmatch(r"([A-Z]{1,2}[012]? ?)+", text) for frame in frames for text in frame["transcription"])
    assert batch["class_ids"].shape[1] > 10


def test_s3prl_reads_sf(s3prl, data, tmp_path):
    frames, batch = read_text_task(s3prl.SuperbSF(), tmp_path, dataset_root=str(data / "SNIPS"))
    assert [len(frame) for frame in frames] == [len(list((data / "SNIPS" / split).glob("*.wav"))) for split in snips.SPLITS]
    assert re.search(r"B-(\w+) .+ E-\1", batch["labels"][0])
    from s3prl.downstream.ctc.text import CharacterTextSlotEncoder

    (tmp_path / "characters.txt").write_text("\n".join(" 'ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    encoder = CharacterTextSlotEncoder.load_from_file(tmp_path / "characters.txt", data / "SNIPS" / "slots.txt")
    assert len(encoder.slots) == 2 * len(snips.SLOTS)
    line = (data / "SNIPS" / "all.iob.snips.txt").read_text().splitlines()[0]
    assert encoder.unk_idx not in encoder.encode(line.split(" ", 1)[1])


def test_s3prl_reads_ic(s3prl, data, tmp_path, monkeypatch):
    import pandas as pd

    monkeypatch.setattr(pd.Series, "iteritems", pd.Series.items, raising=False)  # S3PRL's corpus class is written for pandas 1
    root = data / "fluent_speech_commands_dataset"
    problem = s3prl.SuperbIC()
    train, valid, tests = problem.prepare_data({"dataset_root": str(root)}, tmp_path, tmp_path)
    problem.build_encoder({}, tmp_path, tmp_path, train, valid, tests)
    encoder = problem.build_encoder({}, tmp_path, tmp_path, train, valid, tests, get_path_only=True)
    dataset = problem.build_dataset({}, tmp_path, tmp_path, "train", train, encoder, 320)
    batch = batch_of(problem, dataset, "train", tmp_path, data_csv=train)
    assert batch["class_ids"].shape == (31, 3)  # an utterance for each intent
    from s3prl.downstream.fluent_commands.expert import DownstreamExpert

    expert = SimpleNamespace(datarc={"file_path": str(root)})
    DownstreamExpert.get_dataset(expert)
    assert expert.values_per_slot == [6, 14, 4]
    from s3prl.downstream.fluent_commands.dataset import FluentCommandsDataset

    wav, labels, _ = FluentCommandsDataset(expert.test_df, expert.base_path, expert.Sy_intent)[0]
    assert len(wav) > 8000 and labels.shape == (3,)


def test_s3prl_reads_sid(s3prl, data, tmp_path, monkeypatch):
    from s3prl.dataio.corpus.voxceleb1sid import VoxCeleb1SID
    from s3prl.downstream.voxceleb1 import dataset

    root = data / "VoxCeleb1"
    train, valid, test = VoxCeleb1SID(root, n_jobs=1, cache_root=root).data_split
    assert len(train) == 2 * len(valid) == 2 * len(test) == 48
    assert {item["label"] for item in train.values()} == {item["label"] for item in test.values()}
    monkeypatch.setattr(dataset, "CACHE_PATH", str(tmp_path))
    recordings = dataset.SpeakerClassifiDataset("dev", root, root / voxceleb.SPLIT_LIST, 128000)
    wav, label, name = recordings[0]
    assert len(recordings) == 24 and 32000 < len(wav) <= 128000 and 0 <= label < 1251
    assert set(recordings.label) == {int(item["label"].split("_")[1]) for item in train.values()}


def test_s3prl_reads_asv(s3prl, data, tmp_path):
    import pandas as pd

    root = data / "VoxCeleb1"
    lists = tmp_path / "lists"  # S3PRL leaves locks beside them
    lists.mkdir()
    for name in (voxceleb.SPLIT_LIST, voxceleb.TRIAL_LIST):
        shutil.copy(root / name, lists)
    problem = s3prl.SuperbASV()
    train, (trials,) = problem.prepare_data({"dataset_root": str(root)}, tmp_path, lists, False)
    assert len(set(pd.read_csv(train)["spk"])) == voxceleb.TRAIN_SPEAKERS
    dataset = problem.build_dataset({}, tmp_path, tmp_path, "test", trials, None)
    assert len(dataset) == 4 * voxceleb.TEST_SPEAKERS
    assert batch_of(problem, dataset, "test", tmp_path, data_csv=trials)["x"].shape[1] > 2.5 * 16000
    from s3prl.downstream.sv_voxceleb1.dataset import SpeakerVerifi_test

    assert len(SpeakerVerifi_test({}, root / "test" / "wav", root / voxceleb.TRIAL_LIST).pair_table) == len(pd.read_csv(trials))


def test_s3prl_reads_sd(s3prl, data, tmp_path):
    from s3prl.downstream.diarization.dataset import DiarizationDataset
    from s3prl.problem.diarization.util import csv_to_kaldi_dir

    root = data / "diarization"
    problem = s3prl.SuperbSD()
    train, valid, _ = problem.prepare_data({"data_dir": str(root)}, tmp_path, tmp_path)
    csv_to_kaldi_dir(train, tmp_path / "kaldi")
    settings = problem.default_config()["build_dataset"]
    dataset = problem.build_dataset(settings, tmp_path, tmp_path, "train", train, tmp_path / "kaldi", 2, 320)
    batch = batch_of(problem, dataset, "train", tmp_path, data_csv=train, data_dir=tmp_path / "kaldi")
    assert batch["label"].shape[2] == 2 and batch["label"].any(1).all()
    wav, label = DiarizationDataset("dev", str(root / "dev"), frame_shift=320, num_speakers=2)[0]
    assert abs(len(wav) / 320 - len(label)) < 1 and label.any(0).all()


def test_s3prl_reads_qbe(s3prl, data):
    from s3prl.downstream.quesst14_dtw.dataset import QUESST14Dataset

    for split in ("dev", "eval"):
        dataset = QUESST14Dataset(split, dataset_root=str(data / "quesst14Database"))
        assert (dataset.n_queries, dataset.n_docs) == (2, len(list((data / "quesst14Database" / "Audio").iterdir())))
        wavs, names = dataset.collate_fn([dataset[0], dataset[dataset.n_queries]])
        assert len(wavs[0]) > 4000 and names == (f"quesst14_{split}_0001", "quesst14_00001")


def test_s3prl_reads_er(s3prl, data, tmp_path):
    root = data / "IEMOCAP"
    for part in ("train", "test"):
        shutil.copy(root / "meta_data" / "Session2" / f"{part}_meta_data.json", tmp_path / f"test_session2_{part}_metadata.json")
    problem = s3prl.SuperbER()
    train, valid, tests = problem.prepare_data({"iemocap": str(root), "test_fold": 1}, tmp_path, tmp_path)
    encoder = problem.build_encoder({}, tmp_path, tmp_path, train, valid, tests)
    dataset = problem.build_dataset({}, tmp_path, tmp_path, "test", tests[0], encoder, 320)
    assert len(dataset) == 16
    assert batch_of(problem, dataset, "test", tmp_path, data_csv=tests[0])["x"].shape[0] == 4
    from s3prl.downstream.emotion import IEMOCAP_preprocess
    from s3prl.downstream.emotion.dataset import IEMOCAPDataset

    meta = root / "meta_data" / "Session2" / "test_meta_data.json"
    recordings = IEMOCAPDataset(str(root), meta, pre_load=False)
    assert len(recordings) == 16 and recordings[0][1] in range(4)
    IEMOCAP_preprocess.preprocess(str(root), ["Session2"], tmp_path / "made.json")
    made, ours = (json.loads(path.read_text()) for path in (tmp_path / "made.json", meta))
    assert made["labels"] == ours["labels"] and sorted(made["meta_data"], key=str) == sorted(ours["meta_data"], key=str)
