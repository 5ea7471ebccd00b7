"""Real speech without overlap: what each part hears, the figures of results that are known, what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from hubert_eff.utils.files import write_json

from ..helpers.benchmarks import scripts

SPEAKERS = ("ann", "bob", "theo")


@pytest.fixture
def modules() -> Iterator[list[Any]]:
    pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
    with scripts("learning", "real_speech", "superb_fsdd") as found:
        yield found


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of noise under the names of the data set: 26 takes of ten digits by three speakers."""
    folder = tmp_path_factory.mktemp("digits")
    noise = (0.1 * np.random.default_rng(0).standard_normal(1600)).astype(np.float32)
    for speaker in SPEAKERS:
        (folder / speaker).mkdir()
        for name in (f"{digit}_{speaker}_{index}" for digit in range(10) for index in range(26)):
            sf.write(folder / speaker / f"{name}.wav", noise, 8000)
    return folder


def test_no_recording_stands_in_two_parts(modules: list[Any], digits: Path) -> None:
    real_speech, superb_fsdd = modules
    found = superb_fsdd.recordings(digits)
    shared = {key for key in found if key[2] >= real_speech.PRETRAINING}
    every = real_speech.sides(found, "all", "theo")
    assert not shared & set(every) and len(shared) + len(every) == len(found) == 780
    assert Counter(every.values()) == {"test": 150, "valid": 90, "train": 450}

    tenth = real_speech.sides(found, "tenth", "theo")
    assert {key: side for key, side in every.items() if side != "train"} == {key: side for key, side in tenth.items() if side != "train"}
    kept = Counter(digit for (_, digit, _), side in tenth.items() if side == "train")
    assert set(tenth) < set(every) and len(kept) == 10 and sum(kept.values()) in (40, 50)  # 4.5 of 45 of each digit

    unheard = real_speech.sides(found, "held-out", "theo")
    assert {key for key, side in unheard.items() if side == "test"} == {key for key in found if key[0] == "theo"}
    assert not any(key[0] != "theo" and (key in shared or side == "test") for key, side in unheard.items())


def test_the_layouts_hold_what_a_protocol_gives(modules: list[Any], digits: Path, tmp_path: Path) -> None:
    real_speech, superb_fsdd = modules
    found = superb_fsdd.recordings(digits)
    sides = {key: side for key, side in real_speech.sides(found, "held-out", "theo").items() if key[1] in "01" and key[2] in (0, 5, 8, 25)}
    superb_fsdd.write(found, sides, tmp_path)
    from superb_tasks.data.layouts import check_keywords

    tested = sorted(path.name for path in (tmp_path / "speech_commands_test_set_v0.01" / "yes").glob("*.wav"))
    assert len(tested) == 4 and all(name.startswith("theo") for name in tested)  # the digit 0
    with pytest.raises(Exception, match="no recordings in up"):  # two digits only
        check_keywords(tmp_path)


def _finish(real_speech: Any, bench: Any, shares: dict[tuple[str, str], float]) -> None:
    """Leave behind what commands that have succeeded would, with shares of right answers by labels and form; unheard speakers 0.1 less."""
    for cell in bench.cells():
        for step in bench._chain(cell):
            write_json(bench._step_record(step), {"title": step.title, "command": step.shown, "seconds": 1.0})
        for protocol in bench.protocols(cell):
            share = shares[cell.labels, cell.form] - 0.1 * (protocol == "held-out")
            for task in real_speech.PROTOCOLS[protocol][0]:
                rows = [[f"{i:03d}", float(i < round(200 * share)), 1.0] for i in range(200)]
                write_json(bench.folder(cell) / protocol / task / "result.json", {"task": task, "accuracy": share})
                write_json(bench.folder(cell) / protocol / task / "utterances.json", rows)
        if cell.trained:
            valid = {
                "epoch": 1, "valid_loss": "4.1", "valid_num_updates": "9", "valid_correct_m_0": "0.3", "valid_majority_m_0": "0.1",
                "valid_code_ppl_0": "20", "valid_label_ppl_0": "40",
            }  # fmt: skip
            (bench.folder(cell) / "train.log").write_text(f"[2026-01-01 00:00:00,000][valid][INFO] - {json.dumps(valid)}\n")


def test_figures_and_targets_of_known_results(modules: list[Any], digits: Path, tmp_path: Path) -> None:
    real_speech, _ = modules
    bench = real_speech.RealSpeech(digits, tmp_path, seeds=2)
    shares = {
        ("s3prl:fbank", ""): 0.3, ("s3prl:fbank_no_cmvn", ""): 0.5, ("s3prl:mfcc", ""): 0.1, ("untrained", "float"): 0.2,
        ("mfcc", "float"): 0.95, ("mfcc", "w1a1"): 0.94, ("layer", "float"): 0.9, ("layer", "w1a1"): 0.8,
    }  # fmt: skip
    _finish(real_speech, bench, shares)
    found = bench.results()
    assert found["left"] == 0 and 150_000 < found["sizes"]["small"] < 250_000
    met = {(target["target"], target["model"]): target["met"] for target in found["targets"]}
    assert met["float KS at least 90%", "small mfcc float"] and not met["float SID at least 97%", "small mfcc float"]
    assert met["KS at one bit within 2 points of float", "small mfcc w1a1"]
    assert not met["KS at one bit within 2 points of float", "small layer w1a1"]
    assert not met["labels of layer not below those of mfcc: KS", "small layer float"]
    above = [t["figure"] for t in found["targets"] if t["target"].startswith("KS of an unheard") and t["model"] == "small mfcc float"]
    assert above[0]["value"] == pytest.approx(45) and above[0]["than"] == "s3prl:fbank_no_cmvn"
    page = (tmp_path / "real_speech.md").read_text()
    assert "| 0.2 M | mfcc | W1A1 | 30.0 (10.0) | 94.0 ± 0.0 |" in page and "missed |" in page


def test_bad_input_is_one_line(modules: list[Any], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real_speech, _ = modules

    def refused(*words: object) -> str:
        assert real_speech.main([*map(str, words), "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "has no DIGIT_SPEAKER_INDEX.wav" in refused(tmp_path)
    assert "unknown speaker 'eve'" in refused(digits, "--held-out", "eve")
    assert "unknown size 'huge'" in refused(digits, "--sizes", "huge")
    assert "--teacher and --teacher-layer go together" in refused(digits, "--teacher", "x")
    assert "--seeds 0 must be above 0" in refused(digits, "--seeds", "0")
    write_json(tmp_path / "out" / "recipe.json", {"settings": real_speech.RealSpeech(digits, tmp_path / "out", updates=5).settings})
    assert "with updates=5, not 750: take another --out" in refused(digits)
