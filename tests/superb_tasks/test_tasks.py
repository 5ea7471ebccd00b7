"""The ten task specifications: settings, layouts and what is refused as one, the two metrics of our own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from hubert_eff.cli import main as cli
from hubert_eff.errors import UserError
from hubert_eff.reports.table2 import METRICS
from superb_tasks.data import corpus, layouts
from superb_tasks.results import scoring
from superb_tasks.tasks import CONFIGS, LEARNING_RATES, TASKS, check, choose

pytest.importorskip("espeakng_loader")


@pytest.fixture
def data(superb_data) -> Path:
    return superb_data


@pytest.fixture
def copy(data, tmp_path) -> Path:
    shutil.copytree(data, tmp_path / "copy")
    return tmp_path / "copy"


def test_tasks_are_those_of_the_paper_with_its_metrics():
    assert list(TASKS) == list(METRICS)
    for name, task in TASKS.items():
        assert (task.key, task.more_is_better) == (METRICS[name].key, METRICS[name].more_is_better)
    assert [task.name for task in choose("ks,asr,ks")] == ["ks", "asr"]
    assert len(choose("all")) == len(choose(["ks", "all"])) == 10
    with pytest.raises(UserError, match="no task given"):
        choose([])
    with pytest.raises(UserError, match="did you mean 'asr'"):
        choose("arr")


def test_settings_are_complete_and_superbs():
    assert {task.config for task in TASKS.values()} == {file.stem for file in CONFIGS.glob("*.yaml")}
    settings = {name: task.settings() for name, task in TASKS.items()}
    steps = {name: config["runner"].get("total_steps", 0) for name, config in settings.items()}
    most, few = 200_000, 30_000
    expected = {"asr": most, "ks": most, "sf": most, "sid": most, "pr": 100_000, "qbe": 0, "ic": most, "asv": most, "sd": few, "er": few}
    assert steps == expected
    for name, config in settings.items():
        if name != "qbe":
            assert config["optimizer"]["torch_optim_name"] == ("AdamW" if name == "asv" else "Adam")
            assert config["runner"]["gradient_clipping"] == 1
    batches = {
        "ks": settings["ks"]["downstream_expert"]["datarc"]["batch_size"],
        "ic": settings["ic"]["downstream_expert"]["datarc"]["train_batch_size"],
        "pr": settings["pr"]["downstream_expert"]["corpus"]["batch_size"] * settings["pr"]["runner"]["gradient_accumulate_steps"],
        "er": settings["er"]["downstream_expert"]["datarc"]["train_batch_size"] * settings["er"]["runner"]["gradient_accumulate_steps"],
    }
    assert set(batches.values()) == {32}
    assert LEARNING_RATES[0] == 1e-1 and LEARNING_RATES[-1] == 1e-7


def test_small_settings_change_values_of_the_same_kind():
    for task in TASKS.values():
        full, small = task.settings(), task.settings(small=True)
        for key, value in task.small.items():
            before, after = full, small
            for part in key.split("."):
                before, after = before[part], after[part]
            assert after == value and (after is None or type(before) is type(after))  # None: left out


def test_list_names_data_license_and_source(capsys):
    assert cli(["superb", "list", "--json"]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert [task["task"] for task in tasks] == ["asr", "ks", "sf", "sid", "pr", "qbe", "ic", "asv", "sd", "er"]
    for task in tasks:
        assert task["license"] and "http" in task["url"] and all(folder in task["layout"] for folder in task["folders"][:1])
        assert len(task["learning_rates"]) == (0 if task["task"] == "qbe" else 7)
    assert cli(["superb", "list"]) == 0
    assert "Libri2Mix" in capsys.readouterr().out


@pytest.mark.parametrize("spelling", ["ks sid er", "ks,sid,er", "ks,sid er", "ks, sid, er"])
def test_every_command_takes_tasks_with_spaces_and_commas(spelling, monkeypatch, capsys, tmp_path):
    found = []
    monkeypatch.setattr(corpus, "make_superb", lambda out, tasks, minutes, seed: found.append(list(tasks)) or {})
    assert cli(["corpus", "superb", "--out", str(tmp_path), "--task", *spelling.split()]) == 0
    assert found == [["ks", "sid", "er"]]
    assert cli(["superb", "check", "--data", str(tmp_path), "--json", "--task", *spelling.split()]) == 2
    assert list(json.loads(capsys.readouterr().out)["missing"]) == found[0]


def test_generated_data_are_complete(data, capsys):
    assert cli(["superb", "check", "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == {}


def test_lists_and_checks_import_neither_torch_nor_s3prl(data):
    code = (
        "import sys; from hubert_eff.cli import main\n"
        f"assert main(['superb', 'list']) == 0 and main(['superb', 'check', '--data', {str(data)!r}]) == 0\n"
        "assert not {'torch', 's3prl', 'pandas'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines() if line[:1] != " "] == [*TASKS, *(f"{name}:" for name in TASKS)]


def test_missing_data_are_named_without_importing_torch_or_s3prl(tmp_path):
    code = (
        f"import sys; from hubert_eff.cli import main; code = main(['superb', 'check', '--data', {str(tmp_path)!r}])\n"
        "assert not {'torch', 's3prl', 'pandas'} & set(sys.modules); sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = result.stderr.splitlines()
    assert (result.returncode, len(lines), result.stdout) == (2, 10, "")
    for name, line in zip(TASKS, lines):
        assert line.startswith(f"hubert-eff superb: {name}: no folder at ") and "http" in line


def test_the_data_set_itself_is_not_its_parent(data, monkeypatch):
    monkeypatch.chdir(data.parent)
    for name in ("ks", "er"):
        own = Path(data.name) / TASKS[name].source.folders[0]
        with pytest.raises(UserError, match=f"^{name}: {own} is the data set itself: give the folder that holds it, --data {data.name}$"):
            check(TASKS[name], own)


def test_a_damaged_data_set_gets_a_short_line(copy):
    shutil.rmtree(copy / "speech_commands_v0.01" / "_background_noise_")
    with pytest.raises(UserError, match="has no recordings in _background_noise_") as error:
        check(TASKS["ks"], copy)
    said = str(error.value).replace(str(copy), "")
    assert len(said) < 250 and said.count("hubert-eff corpus superb") == 1


def _one(root: Path, pattern: str) -> Path:
    return sorted(root.glob(pattern))[0]


def _replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def _at_8_khz(file: Path) -> None:
    sf.write(file, sf.read(file)[0], 8000)


def _conversation_at_8_khz(data: Path) -> None:
    sf.write(data / "slow.wav", np.zeros(8000), 8000)
    scp = data / "diarization" / "dev" / "wav.scp"
    _replace(scp, scp.read_text().split()[1], str(data / "slow.wav"))


FLUENT, COLUMNS = "fluent_speech_commands_dataset/data", ",path,action,object,location\n"


@pytest.mark.parametrize(
    ("task", "damage", "message"),
    [
        ("asr", lambda d: shutil.rmtree(d / "LibriSpeech" / "dev-clean"), "no folder at .*dev-clean"),
        ("asr", lambda d: _one(d, "LibriSpeech/test-clean/*/*/*.flac").unlink(), "no recording at .*flac"),
        ("asr", lambda d: _at_8_khz(_one(d, "LibriSpeech/dev-clean/*/*/*.flac")), "sampled at 8000 Hz: .* at 16000 Hz"),
        ("asr", lambda d: _replace(_one(d, "LibriSpeech/dev-clean/*/*/*.txt"), "0000 ", "0000 7 "), "unknown character '7'"),
        ("asr", lambda d: [f.unlink() for f in d.glob("LibriSpeech/dev-clean/*/*/*.txt")], "dev-clean is empty"),
        ("pr", lambda d: _one(d, "LibriSpeech/lexicon/*").unlink(), "no lexicon at"),
        ("pr", lambda d: _replace(_one(d, "LibriSpeech/test-clean/*/*/*.txt"), "0000 ", "0000 QQQ "), "lacks 1 words .* such as QQQ"),
        ("ks", lambda d: shutil.rmtree(d / "speech_commands_v0.01" / "yes"), "no recordings in yes"),
        ("sf", lambda d: (d / "SNIPS" / "slots.txt").write_text("O\n"), "has the slot .* not in slots.txt"),
        ("sf", lambda d: _at_8_khz(_one(d, "SNIPS/train/*.wav")), "sampled at 8000 Hz: .* at 16000 Hz"),
        ("sid", lambda d: _at_8_khz(_one(d, "VoxCeleb1/dev/wav/*/*/*.wav")), "sampled at 8000 Hz: .* at 16000 Hz"),
        ("ic", lambda d: _at_8_khz(_one(d, "fluent_speech_commands_dataset/wavs/speakers/*/*.wav")), "sampled at 8000 Hz"),
        ("sd", lambda d: _conversation_at_8_khz(d), "sampled at 8000 Hz: .* at 16000 Hz"),
        ("sf", lambda d: [f.unlink() for f in d.glob("SNIPS/valid/*.wav")], "valid has no recording"),
        ("sf", lambda d: _replace(d / "SNIPS" / "all.iob.snips.txt", " BOS ", " BOS 7:30 "), "words and .* labels"),
        ("sid", lambda d: (d / "VoxCeleb1" / "iden_split.txt").unlink(), "no file at .*iden_split.txt: it is at http"),
        ("sid", lambda d: _replace(d / "VoxCeleb1" / "iden_split.txt", "id1", "id2"), "is not '1|2|3"),
        ("sid", lambda d: (d / "VoxCeleb1" / "iden_split.txt").write_text("1 id10001/a/1.wav\n"), "no recordings for validation and test"),
        ("asv", lambda d: _replace(d / "VoxCeleb1" / "voxceleb1_test_v2.txt", ".wav", ".flac"), "no recording at .*flac"),
        ("asv", lambda d: (d / "VoxCeleb1" / "voxceleb1_test_v2.txt").write_text("2 a b\n"), "line 1: expected"),
        ("qbe", lambda d: (d / "quesst14Database/scoring/language_key_dev.lst").write_text("a/b.wav czech\n"), "no English recording"),
        ("qbe", lambda d: _one(d, "quesst14Database/scoring/*_eval/*.rttm").write_text(""), "none of the English queries"),
        ("ic", lambda d: _replace(d / FLUENT / "train_data.csv", ",action", ",deed"), "no column action"),
        ("ic", lambda d: (d / FLUENT / "valid_data.csv").write_text(f"{COLUMNS}0,x,fly,none,none\n"), "'fly' does not occur"),
        ("ic", lambda d: (d / FLUENT / "test_data.csv").write_text(COLUMNS), "test_data.csv is empty"),
        ("sd", lambda d: (d / "diarization" / "test" / "segments").unlink(), "no file at .*segments"),
        ("sd", lambda d: (d / "diarization" / "dev" / "wav.scp").write_text("a /absent.wav\n"), "lines in wav.scp"),
        ("er", lambda d: shutil.rmtree(d / "IEMOCAP" / "Session3"), "no folder at .*Session3"),
        ("er", lambda d: [f.unlink() for f in d.glob("IEMOCAP/Session2/dialog/EmoEvaluation/*.txt")], "Session2 has no recording that"),
        ("er", lambda d: sf.write(_one(d, "IEMOCAP/Session1/sentences/wav/*/*.wav"), np.zeros((99, 2)), 16000), "has 2 channels"),
    ],
)
def test_damaged_data_are_refused_in_one_line(copy, task, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message) as refused:
        check(TASKS[task], copy)
    assert "\n" not in str(refused.value)


def test_lexicon_takes_the_first_pronunciation(tmp_path):
    (tmp_path / "a").write_text("THE DH AH0\nTHE DH IY0\nEMPTY\n")
    (tmp_path / "b").write_text("the X\ncat K AE1 T\n")
    assert layouts.lexicon([tmp_path / "a", tmp_path / "b"]) == {"THE": ["DH", "AH0"], "CAT": ["K", "AE1", "T"]}


def test_mtwv_is_the_best_threshold_of_the_formula():
    generator = np.random.default_rng(0)
    documents = [f"d{i}" for i in range(200)]
    truth = {(f"q{q}", documents[i]) for q in range(5) for i in generator.choice(200, 3, replace=False)}
    scores = {
        f"q{q}": {d: float(generator.normal() + 3 * ((f"q{q}", d) in truth)) for d in documents}
        for q in range(6)  # q5 occurs nowhere
    }
    values = [0.0]
    for threshold in sorted({score for documents in scores.values() for score in documents.values()}):
        terms = []
        for query in [f"q{q}" for q in range(5)]:
            hits = {d for d, score in scores[query].items() if score >= threshold}
            right = {d for q, d in truth if q == query}
            miss = len(right - hits) / len(right)
            false_alarm = len(hits - right) / (200 - len(right))
            terms.append(1 - miss - 12.49 * false_alarm)
        values.append(sum(terms) / 5)
    assert scoring.mtwv(scores, truth) == pytest.approx(max(values))
    assert 0.2 < max(values) < 1
    assert scoring.mtwv({"q": {"a": 2.0, "b": 1.0}}, {("q", "a")}) == 1
    assert scoring.mtwv({"q": {"a": 1.0, "b": 1.0}}, {("q", "a")}) == 0  # equal scores are detected together
    assert scoring.mtwv({"q": {"a": 2.0, "b": 1.0}}, {("q", "a"), ("q", "unscored")}) == 0.5  # a document without a score is a miss
    with pytest.raises(UserError, match="none of the queries"):
        scoring.mtwv({"q": {"a": 1.0}}, set())


def test_der_by_hand():
    reference = [("r", "a", 0.0, 4.0), ("r", "b", 3.0, 6.0)]
    assert scoring.der(reference, [("r", "2", 0.0, 4.0), ("r", "1", 3.0, 6.0)]) == 0
    assert scoring.der(reference, []) == 1
    # one speaker throughout: b's 3 s are missed or confused for a, 2 of them beside nobody else, so 1 s missed + 2 s confused
    assert scoring.der(reference, [("r", "x", 0.0, 6.0)]) == pytest.approx(3 / 7)
    # 1 s of false alarm, another recording is not scored
    assert scoring.der(reference, [*reference, ("r", "a", 6.0, 7.0), ("s", "a", 0.0, 9.0)]) == pytest.approx(1 / 7)
    with pytest.raises(UserError, match="nobody speaks"):
        scoring.der([], reference)


def test_der_agrees_with_counting_frames():
    generator = np.random.default_rng(1)

    def turns(count):
        starts = generator.integers(0, 90, count)
        taken = np.zeros((2, 100), dtype=int)
        for start in starts:
            taken[generator.integers(2), start : start + generator.integers(2, 10)] = 1
        found = []
        for speaker, row in enumerate(taken):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], row, [0]])))
            found += [("r", str(speaker), float(a), float(b)) for a, b in zip(edges[::2], edges[1::2])]
        return taken, found

    for _ in range(20):
        (a, reference), (b, hypothesis) = turns(8), turns(8)
        errors = [np.maximum(a.sum(0), b.sum(0)) - (a * b[order]).sum(0) for order in ([0, 1], [1, 0])]
        assert scoring.der(reference, hypothesis) == pytest.approx(min(e.sum() for e in errors) / a.sum())
