"""Reads the result of a tested task for each utterance from S3PRL's files of predictions, for tests of significance.

Each row is (name, amount, total), so that the metric is the sum of the amounts over the sum of the totals: (1, 1) for a correct
answer, (errors, words) or (errors, phones), (F1, 1) per request, (wrong, spoken) seconds per conversation. In speaker verification a row
is a trial: (name, cosine, 1 for the same speaker or 0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..results import scoring
from ..tasks import Task
from . import layouts

Row = tuple[str, float, float]


def utterances(task: Task, folders: Sequence[Path], data: Path) -> list[Row]:
    """The rows of a task by name, from S3PRL's folders of experiments, one per fold. Spoken term detection has none."""
    return sorted(_rows(task, folders, data), key=lambda row: row[0])  # S3PRL takes some files in the order of the disk


def _rows(task: Task, folders: Sequence[Path], data: Path) -> list[Row]:
    if task.name == "asr":
        return _edited(folders[0], f"{task.test}-noLM")
    if task.name == "pr":
        return _edited(folders[0], task.test)
    if task.name == "sf":
        from s3prl.downstream.ctc.metric import slot_type_f1

        return _transcribed(folders[0], task.test, lambda said, meant: (float(slot_type_f1([said], [meant])), 1.0))
    if task.name == "asv":
        same = {_trial(a, b): float(label) for label, a, b in layouts.trials(data / layouts.VOXCELEB / layouts.TRIAL_LIST)}
        return [(name, float(score), same[name]) for name, score in _lines(folders[0] / f"{task.test}_predict.txt", " ")]
    if task.name == "sd":
        reference = list(layouts.segments(data / layouts.DIARIZATION / task.test))
        wrong = scoring.errors(reference, scoring.read_rttm(folders[0] / scoring.HYPOTHESIS))
        return [(name, *seconds) for name, seconds in wrong.items()]
    return [row for folder in folders for row in _classified(folder, task.test)]


def _classified(folder: Path, split: str) -> list[Row]:
    rows: list[Row] = []
    for predicted in sorted(folder.glob(f"{split}*_predict.*")):
        separator = "," if predicted.suffix == ".csv" else " "
        truth = _lines(predicted.with_name(predicted.name.replace("_predict", "_truth")), separator)
        rows += [(name, float(said == meant), 1.0) for (name, said), (_, meant) in zip(_lines(predicted, separator), truth, strict=True)]
    return rows


def _edited(folder: Path, split: str) -> list[Row]:
    import editdistance

    def errors(said: str, meant: str) -> tuple[float, float]:
        return float(editdistance.eval(said.split(), meant.split())), float(len(meant.split()))

    return _transcribed(folder, split, errors)


def _transcribed(folder: Path, split: str, measure: Callable[[str, str], tuple[float, float]]) -> list[Row]:
    said, meant = (_lines(folder / f"{split}-{kind}.ark", " ") for kind in ("hyp", "ref"))
    return [(name, *measure(text, truth)) for (name, text), (_, truth) in zip(said, meant, strict=True)]


def _lines(file: Path, separator: str) -> list[tuple[str, str]]:
    """The first word of each line, and the rest."""
    rows = (line.partition(separator) for line in file.read_text(encoding="utf-8").splitlines())
    return [(name, rest) for name, _, rest in rows]


def _trial(first: str, second: str) -> str:
    """A trial's name in S3PRL's predictions."""
    return "_".join("-".join(Path(name).with_suffix("").parts[-3:]) for name in (first, second))
