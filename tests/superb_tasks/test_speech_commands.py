"""A corpus in the layout of Speech Commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from hubert_eff.errors import UserError
from superb_tasks.data.generators import speech_commands
from superb_tasks.data.generators.common import NOISES
from superb_tasks.data.generators.speech_commands import KEYWORDS, OTHER_WORDS, check_keywords, folders, make_keywords, split_of

pytest.importorskip("espeakng_loader")


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
        (lambda root, test: (test / "bed").mkdir(), "holds bed, which is not one of the twelve classes"),
    ],
)
def test_another_layout_is_refused(copy, damage, message):
    damage(*copy)
    with pytest.raises(UserError, match=message):
        check_keywords(*copy)
