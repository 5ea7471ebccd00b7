"""The report over SUPERB results: the leaderboard's score, bootstrap, table, submission. Results are written here, as a run leaves them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from hubert_eff.cli import main as cli
from hubert_eff.errors import UserError
from hubert_eff.reports import page
from hubert_eff.reports.table2 import METRICS, PAPER_TABLE, REFERENCES, SCORE, paper_figures, superb_score
from superb_tasks.data.utterances import utterances
from superb_tasks.results import scoring, significance, submission
from superb_tasks.results import tables as results
from superb_tasks.tasks import TASKS

# HuBERT Base on SUPERB (Yang et al. 2021, table 2), whose score on the leaderboard is 941
HUBERT_BASE = {
    "asr": {"wer": 0.0642}, "ks": {"accuracy": 0.9630}, "sf": {"f1": 0.8853, "slot_value_cer": 0.2520}, "sid": {"accuracy": 0.8142},
    "pr": {"per": 0.0541}, "qbe": {"mtwv": 0.0736}, "ic": {"accuracy": 0.9834}, "asv": {"eer": 0.0511}, "sd": {"der": 0.0588},
    "er": {"accuracy": 0.6492},
}  # fmt: skip
FOLDS = TASKS["er"].variants


def write(folder: Path, figures: dict, upstream: str = "conformer-debug", right: float = 0.5, **more: object) -> Path:
    """Finished runs in `folder`, with predictions under S3PRL's names; `right` of the utterances of KS are right."""
    for task, values in figures.items():
        place = folder / task
        tested = [f"lr-0.01/{fold}" for fold in FOLDS] if task == "er" else ["lr-0.01"]
        result = {"task": task, "upstream": upstream, "sha256": None, "steps": 7, "small": False, "seed": 1, "learning_rates": [0.01],
                  "data_sha256": "d", "superb_settings": True, "learning_rate": 0.01, **values, **more}  # fmt: skip
        if task == "qbe":
            result |= {"layer": 1}
            tested = ["layer-1/test"]
        else:
            result["checkpoints"] = [f"{name}/states-7.ckpt" for name in tested]
        for name, key in zip(tested, [f"er_{fold}" for fold in FOLDS] if task == "er" else [task]):
            source = place / name / submission.FILES[key][1]
            if key == "sd":
                (place / name).mkdir(parents=True)
                (place / name / "frame_shift").write_text("320\n")
                source /= "rec1.h5"
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text(f"{key} of {upstream}\n")
        (place / "result.json").write_text(json.dumps(result))
        if task == "ks":
            (place / "utterances.json").write_text(json.dumps([[f"u{i}", float(i < 200 * right), 1.0] for i in range(200)]))
    return folder


def test_the_score_is_the_leaderboards():
    assert superb_score(HUBERT_BASE) == pytest.approx(941, abs=0.5)
    for side, score in enumerate((0, 1000)):
        ends = {task: {key: ends[side] / 100 for key, ends in metrics.items()} for task, metrics in REFERENCES.items()}
        assert superb_score(ends) == pytest.approx(score)
    assert superb_score({task: HUBERT_BASE[task] for task in HUBERT_BASE if task != "sd"}) is None
    # the paper's rows, whose slot filling has F1 only
    scores = {row: superb_score(paper_figures(row)) for row in PAPER_TABLE}
    assert sorted(scores, key=lambda row: -scores[row])[:2] == ["Vanilla Trans (reported)", "Vanilla Trans"]
    assert scores["BQ-Sparseformer-SW-S"] > scores["BQ-Conformer-S"]


def test_bootstrap_of_a_share_is_near_its_binomial():
    rows = [(f"u{i}", float(i < 300), 1.0) for i in range(400)]
    low, high = significance.interval("ks", rows)
    deviation = np.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - 1.96 * deviation, 0.75 + 1.96 * deviation), abs=0.004)
    assert significance.figure("ks", rows) == 0.75


def test_paired_differences_see_what_unpaired_ones_would_not():
    generator = np.random.default_rng(0)
    hard = generator.random(200) < 0.5
    ours = [(f"u{i}", float(not hard[i]), 1.0) for i in range(200)]
    theirs = [(f"u{i}", float(not hard[i] and i % 10 > 0), 1.0) for i in range(200)]  # loses a tenth of them, gains none
    found = significance.difference("ks", ours, theirs)
    assert found is not None and found.value > 0 and found.low > 0 and found.p < 0.01
    assert significance.interval("ks", ours)[0] < significance.interval("ks", theirs)[1]  # the intervals overlap
    same = significance.difference("ks", ours, ours)
    assert same is not None and (same.value, same.p) == (0, 1)
    assert significance.difference("ks", ours, theirs[1:]) is None
    # error rates weigh utterances by their words
    assert significance.figure("asr", [("a", 1.0, 9.0), ("b", 2.0, 3.0)]) == 0.25


def test_equal_error_rate_by_hand_and_against_all_thresholds():
    def rate(pairs):
        return float(significance.equal_error_rate(*(np.array(column, dtype=float) for column in zip(*pairs))))

    assert rate([(0.9, 1), (0.8, 1), (0.2, 0), (0.1, 0)]) == 0
    assert rate([(0.9, 1), (0.3, 1), (0.8, 0), (0.1, 0)]) == 0.5
    assert rate([(0.9, 1), (0.8, 1)]) == 0.5  # undefined
    generator = np.random.default_rng(1)
    same = generator.integers(0, 2, 1000)
    scores = generator.normal(size=1000) + 1.5 * same
    gaps = {t: ((scores < t)[same == 1].mean(), (scores >= t)[same == 0].mean()) for t in scores}
    missed, false = min(gaps.values(), key=lambda pair: abs(pair[0] - pair[1]))
    assert rate(list(zip(scores, same))) == pytest.approx((missed + false) / 2, abs=2e-3)


def test_utterances_of_each_kind_of_prediction(tmp_path):
    (tmp_path / "test_predict.csv").write_text("b,on,lamp,none\na,on,lamp,none\n")
    (tmp_path / "test_truth.csv").write_text("b,off,lamp,none\na,on,lamp,none\n")
    assert utterances(TASKS["ic"], [tmp_path], tmp_path) == [("a", 1, 1), ("b", 0, 1)]
    (tmp_path / "test-clean-noLM-hyp.ark").write_text("u1 A CAT\nu2 \n")
    (tmp_path / "test-clean-noLM-ref.ark").write_text("u1 THE CAT SAT\nu2 GO\n")
    pytest.importorskip("editdistance")
    assert utterances(TASKS["asr"], [tmp_path], tmp_path) == [("u1", 2, 3), ("u2", 1, 1)]
    (tmp_path / "VoxCeleb1").mkdir()
    (tmp_path / "VoxCeleb1" / "voxceleb1_test_v2.txt").write_text("1 id1/v/1.wav id1/v/2.wav\n0 id1/v/1.wav id2/v/1.wav\n")
    (tmp_path / "test_predict.txt").write_text("id1-v-1_id1-v-2 0.5\nid1-v-1_id2-v-1 0.25\n")
    assert utterances(TASKS["asv"], [tmp_path], tmp_path) == [("id1-v-1_id1-v-2", 0.5, 1), ("id1-v-1_id2-v-1", 0.25, 0)]
    (tmp_path / "diarization" / "test").mkdir(parents=True)
    (tmp_path / "diarization" / "test" / "segments").write_text("x r 0 4\ny r 3 6\n")
    (tmp_path / "diarization" / "test" / "utt2spk").write_text("x a\ny b\n")
    (tmp_path / scoring.HYPOTHESIS).write_text("SPEAKER r 1 0.0 6.0 <NA> <NA> one <NA> <NA>\n")
    assert utterances(TASKS["sd"], [tmp_path], tmp_path) == [("r", 3, 7)]


def test_the_table_over_models(tmp_path, capsys):
    full = write(tmp_path / "full", HUBERT_BASE, right=0.9)
    part = write(tmp_path / "part", {"ks": {"accuracy": 0.5}}, "conformer-debug@3", superb_settings=False, steps=3)
    assert cli(["superb", "report", str(full), str(part), "--out", str(tmp_path / "out"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values == json.loads((tmp_path / "out" / "superb.json").read_text())
    best, other, *paper = values["rows"]
    assert (best["model"], other["model"], [row["model"] for row in paper]) == ("conformer-debug", "conformer-debug@3", list(PAPER_TABLE))
    assert best["superb_score"] == pytest.approx(941, abs=0.5) and other["superb_score"] is None
    assert best["tasks"]["asr"]["value"] == pytest.approx(6.42) and best["tasks"]["sf"]["value"] == pytest.approx(0.8853)
    assert list(best["tasks"]) == list(METRICS) and list(other["tasks"]) == ["ks"]
    assert best["params"] == other["params"] > 1e5 and best["storage_mb"] > 0 and best["bop_g"] > 0
    low, high = best["tasks"]["ks"]["interval"]
    assert low < 90 < high
    [difference] = values["differences"]
    assert difference["task"] == "ks" and difference["difference"] == pytest.approx(-40) and difference["p"] < 0.01
    assert any(note.startswith("ks: not comparable") and "steps" in note for note in values["notes"])
    rows = list(csv.DictReader((tmp_path / "out" / "superb.csv").read_text().splitlines()))
    assert [row["model"] for row in rows] == [row["model"] for row in values["rows"]]
    assert [float(rows[i]["asr"]) for i in (2, 3)] == [7.06, 6.89] and rows[1]["asr"] == ""
    first, _, wide = (tmp_path / "out" / "superb.md").read_text().partition("| model |")
    assert first.startswith("| task | conformer-debug | conformer-debug@3, untrained | chance | best published |\n| --- | ---: |")
    assert "| ks accuracy ↑ | 96.30 | 50.00 | - | 96.66 |\n" in first and "| asv eer ↓ | 5.11 | - | 50.00 | 5.11 |\n" in first
    assert "Best published is the leaderboard's" in first and values["narrow"]["rows"][1][0] == "ks accuracy ↑"
    table = f"| model |{wide}".splitlines()
    assert "asr wer ↓" in table[0] and "50.00*" in table[3] and table[2].count("|") == table[0].count("|")
    assert cli(["superb", "report", str(full)]) == 0
    assert "941" in capsys.readouterr().out


def test_the_score_stands_on_the_frontier_of_the_report(tmp_path):
    full = write(tmp_path / "full", HUBERT_BASE)
    write(tmp_path / "full" / "toy", HUBERT_BASE, "transformer-debug", superb_settings=False)
    chart = page.points(page.collect([full]), SCORE, "storage")
    ours = {point.label: point.quality for point in chart if point.ours}
    assert ours == {"conformer-debug": pytest.approx(941, abs=0.5)}
    assert len(chart) == len(PAPER_TABLE) + 1


def test_a_file_trained_on_between_two_runs_is_two_models(tmp_path):
    runs = [write(tmp_path / name, {"ks": {"accuracy": 0.5}}, "runs/a/last.pt", sha256=64 * name) for name in "ab"]
    labels = [row["model"] for row in results.report(runs, tmp_path / "out")["rows"][:2]]
    assert labels == ["a/last.pt (aaaaaaaa)", "a/last.pt (bbbbbbbb)"]
    assert len(list((tmp_path / "out" / "submission").glob("*/predict.zip"))) == 2  # neither replaces the other


def test_bad_folders_are_refused_in_one_line(tmp_path, capsys):
    write(tmp_path / "a", {"ks": {"accuracy": 0.5}})
    write(tmp_path / "b", {"ks": {"accuracy": 0.5}})
    (tmp_path / "empty").mkdir()
    expected = {"absent": "no folder at", "empty": "holds no result.json", "a b": "both hold ks of conformer-debug"}
    for folders, message in expected.items():
        assert cli(["superb", "report", *(str(tmp_path / name) for name in folders.split())]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    with pytest.raises(UserError):
        results.collect([tmp_path / "absent"])


def test_the_printed_table_has_the_tasks_that_were_run(tmp_path, capsys):
    part = write(tmp_path / "part", {"sid": {"accuracy": 0.5}, "ks": {"accuracy": 0.5}})
    assert cli(["superb", "report", str(part), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "asr wer" not in out and "sid accuracy" in out
    values = json.loads((tmp_path / "out" / "superb.json").read_text())
    assert results.cells(values, results.tasks_of(values))[0][6:-1] == ["ks accuracy", "sid accuracy"]
    head = (tmp_path / "out" / "superb.md").read_text().partition("| model |")[2].splitlines()[0]
    assert all(f"| {task} {METRICS[task].key} " in head for task in METRICS)


def test_a_folder_without_results_does_not_stop_the_report(tmp_path, capsys):
    write(tmp_path / "done", {"ks": {"accuracy": 0.5}})
    (tmp_path / "empty").mkdir()
    for begun in ("done/sid", "new/ks", "new/pr"):
        (tmp_path / begun).mkdir(parents=True)
        (tmp_path / begun / "settings.json").write_text(json.dumps({"task": begun.split("/")[1]}))
    assert cli(["superb", "report", *(str(tmp_path / name) for name in ("empty", "done", "new")), "--json"]) == 0
    out, err = capsys.readouterr()
    assert [line.replace(f"{tmp_path}/", "") for line in err.splitlines()] == [
        "left out: empty holds no result.json of `hubert-eff superb run`",
        "left out: done unfinished: sid",
        "left out: new unfinished: ks pr",
    ]
    assert json.loads(out)["rows"][0]["tasks"]["ks"]["value"] == 50
    assert cli(["superb", "report", str(tmp_path / "new")]) == 2
    assert "new unfinished: ks pr" in capsys.readouterr().err


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_submission_holds_every_part_in_the_official_names(tmp_path):
    full = write(tmp_path / "full", HUBERT_BASE)
    [row, *_] = results.report([full], tmp_path / "out")["rows"]
    folder = tmp_path / "out" / "submission" / "conformer-debug"
    expected = {
        *(f"predict/{name}_public/predict.txt" for name in ("sid", "ks", "sv", *(f"er_{fold}" for fold in FOLDS))),
        *(f"predict/{name}_public/predict.ark" for name in ("pr", "asr", "sf")),
        "predict/ic_public/predict.csv", "predict/qbe_public/benchmark.stdlist.xml", "predict/sd_public/scoring/predictions/rec1.h5",
        "predict/sd_public/frame_shift", "predict.zip",
    }  # fmt: skip
    assert set(tree(folder)) == expected and len(row["submission"]) == len(submission.FILES)
    with zipfile.ZipFile(folder / "predict.zip") as archive:
        assert {*archive.namelist(), "predict.zip"} == expected
        assert archive.read("predict/sv_public/predict.txt") == b"asv of conformer-debug\n"
    (full / "ks" / "lr-0.01" / "test_predict.txt").unlink()  # then it is left out, and nothing of before is left
    [row, *_] = results.report([full], tmp_path / "out")["rows"]
    assert "ks_public" not in row["submission"] and not (folder / "predict" / "ks_public").exists()
    for file in [*full.rglob("*predict.*"), *full.rglob("*.ark"), *full.rglob("*.xml"), *full.rglob("*.h5")]:
        file.unlink()
    (full / "sd" / "lr-0.01" / "scoring" / "predictions").rmdir()
    assert results.report([full], tmp_path / "out")["rows"][0]["submission"] == [] and not (folder / "predict.zip").exists()


SUBMIT = os.environ.get("S3PRL_SUBMIT", "")


@pytest.mark.skipif(not Path(SUBMIT).is_file(), reason="$S3PRL_SUBMIT names no submit/submit.py of a checkout of S3PRL: its wheel has none")
def test_s3prls_submit_makes_the_same_folder(tmp_path):
    full = write(tmp_path / "full", HUBERT_BASE)
    [row, *_] = results.report([full], tmp_path / "out")["rows"]
    names = {"asv": "sv", "asr": "asr_no_lm"}
    words = [word for key, folder in row["experiments"].items() for word in (f"--{names.get(key, key)}", folder)]
    done = subprocess.run([sys.executable, SUBMIT, *words, "--output_dir", str(tmp_path / "theirs")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Process {len(submission.FILES)} tasks" in done.stdout
    assert tree(tmp_path / "theirs" / "predict") == tree(tmp_path / "out" / "submission" / "conformer-debug" / "predict")
