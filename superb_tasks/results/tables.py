"""`hubert-eff superb report`: models side by side on SUPERB's ten tasks, as in the paper's Table 2, with their costs.

A model is an upstream; its results are the `result.json` of finished tasks below the folders given. The figures are in the paper's units.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubert_eff.errors import UserError
from hubert_eff.reports import table1
from hubert_eff.reports.narrow import TOY, narrow
from hubert_eff.reports.table2 import GENERATED, METRICS, PAPER_TABLE, paper_figures, rows_of, superb_score
from hubert_eff.utils.files import writable, write_json, write_text

from ..data.utterances import Row
from ..running import records
from ..tasks import TASKS
from . import significance
from .submission import experiments, write_submission

COSTS = {"params": "params", "storage_mb": "storage MB", "gflop": "GFLOP", "bop_g": "BOP G"}
COMPARED = ("steps", "small", "learning_rates", "seed", "data_sha256")  # settings that results of a task must share to be compared
SIGNIFICANT = 0.05
OURS, PAPER = "found", "the paper"


@dataclass
class Model:
    """An upstream and its results: by task, the folder of the run and what its result.json holds."""

    upstream: str
    label: str
    results: dict[str, tuple[Path, dict[str, Any]]] = field(default_factory=dict)

    def rows(self, task: str) -> list[Row]:
        """The results of a task for each utterance; empty if the run left none."""
        try:
            return [tuple(row) for row in json.loads((self.results[task][0] / "utterances.json").read_text(encoding="utf-8"))]
        except (OSError, ValueError):
            return []


def collect(folders: Sequence[Path]) -> tuple[list[Model], list[str]]:
    """The models whose results are below the folders, in their order, and a line for each folder without results or with unfinished tasks.

    Raises `UserError` for a missing folder, folders of which none has a result, and two results of one model and task.
    """
    models: dict[str, Model] = {}  # by SHA-256 of the file, or name
    left_out = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no folder at {folder}")
        found = [(path.parent, records.read(path)) for path in sorted(folder.rglob("result.json"))]
        found = [(place, result) for place, result in found if result.get("task") in TASKS and "upstream" in result]
        begun = {str(path.parent): str(records.read(path).get("task")) for path in sorted(folder.rglob("settings.json"))}
        unfinished = [task for place, task in begun.items() if task in TASKS and place not in {str(place) for place, _ in found}]
        if unfinished:
            left_out.append(f"{folder} unfinished: {' '.join(unfinished)}")
        elif not found:
            left_out.append(f"{folder} holds no result.json of `hubert-eff superb run`")
        for place, result in found:
            upstream, task = str(result["upstream"]), str(result["task"])
            model = models.setdefault(str(result.get("sha256") or upstream), Model(upstream, _label(upstream)))
            if task in model.results:
                raise UserError(f"{place} and {model.results[task][0]} both hold {task} of {upstream}: name one of them")
            model.results[task] = place, result
    if not models:
        raise UserError("; ".join(left_out))
    labels, upstreams = [model.label for model in models.values()], [model.upstream for model in models.values()]
    for sha256, model in models.items():
        if upstreams.count(model.upstream) > 1:  # the file was trained further between two runs
            model.label += f" ({sha256[:8]})"
        elif labels.count(model.label) > 1:
            model.label = model.upstream
    return list(models.values()), left_out


def report(folders: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """The tables as JSON values: `narrow` (head, rows and notes as text: a line per task), `rows`, `differences`, `notes`, and `left_out`
    (folders without results, unfinished tasks). With `out`, they are written there as Markdown, CSV and JSON, with a folder for the
    leaderboard per model. Raises `UserError` as `collect` does."""
    models, left_out = collect(folders)
    rows = [_row(model) for model in models]
    differences = [entry for model in models[1:] for entry in _differences(models[0], model)]
    found = [(model.label, model.upstream, {task: result for task, (_, result) in model.results.items()}) for model in models]
    values: dict[str, Any] = {
        "narrow": dict(zip(("head", "rows", "notes"), narrow(found), strict=True)),
        "rows": rows + _paper_rows(), "differences": differences, "notes": _notes(models), "left_out": left_out,
    }  # fmt: skip
    if out is not None:
        writable(out)
        for model, row in zip(models, rows):
            row["submission"] = write_submission(model.results, out / "submission" / _file_name(model.label))
        write_text(out / "superb.md", markdown(values))
        write_text(out / "superb.csv", _csv(values["rows"]))
        write_json(out / "superb.json", values)
    return values


def _label(upstream: str) -> str:
    """A checkpoint by its last folder and file."""
    return "/".join(Path(upstream).parts[-2:]) if "/" in upstream else upstream


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.@+-]+", "-", label).strip("-")


# -- rows ------------------------------------------------------------------------------------------------------------


def _row(model: Model) -> dict[str, Any]:
    results = {task: result for task, (_, result) in model.results.items()}
    official = all(result.get("superb_settings") for result in results.values())
    row: dict[str, Any] = {"model": model.label, "upstream": model.upstream, "source": OURS, **_cost(model)}
    row["tasks"] = {task: _cell(task, model) for task in METRICS if task in results}
    row["superb_score"] = superb_score(results) if official else None
    row["experiments"] = {key: str(folder) for key, folder in experiments(model.results).items()}
    return row


def _cell(task: str, model: Model) -> dict[str, Any]:
    """A figure in the paper's unit, its 95% interval where there are utterances, and what it was found with."""
    _, result = model.results[task]
    metric, rows = METRICS[task], model.rows(task)
    settings = ("steps", "small", "learning_rate", "data_set", "data_sha256", "utterances")
    cell = {"value": metric.scale * result[metric.key], **{key: result.get(key) for key in settings}}
    if rows:
        cell["interval"] = [metric.scale * end for end in significance.interval(task, rows)]
    return cell


def _cost(model: Model) -> dict[str, Any]:
    from hubert_eff.profiling.cost import profile

    try:
        found = profile(model.upstream if Path(model.upstream).is_file() else model.upstream.partition("@")[0])
    except UserError:  # the checkpoint is gone
        return dict.fromkeys(COSTS)
    return {
        "params": found.params_without_labels,
        "storage_mb": found.storage_mb["paper"],
        "gflop": found.gflop,
        "bop_g": found.bop_nonq_g + found.bop_bq_g,
    }


def _paper_rows() -> list[dict[str, Any]]:
    rows = []
    for cost, title in [(row, title) for row in table1.PAPER_TABLE for title in rows_of(row.title)]:
        figures = dict(zip(METRICS, PAPER_TABLE[title], strict=True))
        rows.append({
            "model": title, "upstream": cost.preset, "source": PAPER,
            "params": None, "storage_mb": cost.storage_mb, "gflop": cost.gflop, "bop_g": cost.bop_nonq_g + (cost.bop_bq_g or 0.0),
            "tasks": {task: {"value": value} for task, value in figures.items()},
            "superb_score": superb_score(paper_figures(title)),
        })  # fmt: skip
    return rows


def _differences(first: Model, other: Model) -> list[dict[str, Any]]:
    """Each task of a model compared with the first model, if both were tested on the same utterances."""
    found = []
    for task in METRICS:
        if task not in first.results or task not in other.results or not (ours := other.rows(task)) or not (theirs := first.rows(task)):
            continue
        if first.results[task][1].get("data_sha256") != other.results[task][1].get("data_sha256"):
            continue
        if (difference := significance.difference(task, ours, theirs)) is not None:
            scale = METRICS[task].scale
            found.append({
                "task": task, "model": other.label, "against": first.label, "difference": scale * difference.value,
                "interval": [scale * difference.low, scale * difference.high], "p": difference.p,
            })  # fmt: skip
    return found


def _notes(models: Sequence[Model]) -> list[str]:
    notes = []
    found = [result for model in models for _, result in model.results.values()]
    if not all(result.get("superb_settings") for result in found):
        notes.append("Results with fewer steps, small heads or generated data compare with each other only, and get no SUPERB score.")
    if any(result.get("data_set") == GENERATED for result in found):
        notes.append(f"{TOY} is on generated data (hubert-eff corpus superb), which do not tell about the real data set.")
    notes.append(f"Data: {'; '.join(_data_sets(models))}.")
    for task in METRICS:
        results = [model.results[task][1] for model in models if task in model.results]
        differing = [key for key in COMPARED if len({json.dumps(result.get(key)) for result in results}) > 1]
        if differing:
            notes.append(f"{task}: not comparable, the results differ in {', '.join(differing)}.")
    if len(models) > 1:
        notes.append(
            f"* differs from {models[0].label} with p < {SIGNIFICANT:g} (paired bootstrap over the test set, {significance.DRAWS} draws; "
            "variation between trainings is not included)."
        )
    notes.append("SUPERB score: superb_s of superbbenchmark.org, FBANK 0, best of its time 1000; the paper's rows without slot-value CER.")
    notes.append("Cost: of 10 s of audio, BOP in 2^30 (32 per float MAC, 1 per W1A1 MAC); the paper's rows have its own figures.")
    return notes


def _data_sets(models: Sequence[Model]) -> Iterator[str]:
    """Task by task the data sets of the results, the beginnings of their digests, and how many utterances were tested."""
    for task in METRICS:
        found: dict[str, Any] = {}
        for model in models:
            if task in model.results:
                result = model.results[task][1]
                tested = f", {result['utterances']} utterances" if "utterances" in result else ""
                name = result.get("data_set", "not recorded")
                found[f"{name} ({str(result.get('data_sha256'))[:8]}{tested})"] = None
        if found:
            yield f"{task} {', '.join(found)}"


# -- tables ----------------------------------------------------------------------------------------------------------


def tasks_of(values: Mapping[str, Any]) -> list[str]:
    """The tasks of which a model has a result, the paper's models aside."""
    return [task for task in METRICS if any(task in row["tasks"] for row in values["rows"] if row["source"] == OURS)]


def cells(values: Mapping[str, Any], chosen: Sequence[str] = tuple(METRICS)) -> tuple[list[str], list[list[str]]]:
    """The table as text: the head, and a row per model, with columns for the chosen tasks."""
    head = ["model", "source", *COSTS.values(), *(f"{task} {METRICS[task].key}" for task in chosen), "SUPERB score"]
    marked = {(entry["model"], entry["task"]) for entry in values["differences"] if entry["p"] < SIGNIFICANT}
    table = []
    for row in values["rows"]:
        costs = [f"{row['params']:,}" if row["params"] else "-", *(_text(row[key]) for key in list(COSTS)[1:])]
        tasks = []
        for task in chosen:
            cell = row["tasks"].get(task)
            star = "*" if row["source"] == OURS and (row["model"], task) in marked else ""
            toy = TOY if cell and cell.get("data_set") == GENERATED else ""
            tasks.append(_text(cell["value"] if cell else None) + toy + star)
        table.append([row["model"], row["source"], *costs, *tasks, _text(row["superb_score"], ".0f")])
    return head, table


def markdown(values: Mapping[str, Any]) -> str:
    """The narrow table, the wide one with the paper's models, and the notes of both; an arrow says which way is better."""
    first = values["narrow"]
    head, table = cells(values)
    arrows = {f"{task} {metric.key}": "↑" if metric.more_is_better else "↓" for task, metric in METRICS.items()}
    head = [f"{name} {arrows.get(name, '')}".strip() for name in head]
    return _markdown(first["head"], first["rows"], first["notes"], 1) + "\n" + _markdown(head, table, values["notes"], 2)


def _markdown(head: Sequence[str], table: Sequence[Sequence[str]], notes: Sequence[str], left: int) -> str:
    """A table with so many left-aligned columns, and its notes."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (head, *table)]
    rows.insert(1, ["---"] * left + ["---:"] * (len(head) - left))
    listed = "".join(f"- {note}\n" for note in notes).replace("- *", "- \\*")
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + "\n" + listed


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["model", "source", *COSTS, *METRICS, "superb_score"])
    for row in rows:
        figures = (row["tasks"].get(task, {}).get("value") for task in METRICS)
        writer.writerow([row["model"], row["source"], *(row[key] for key in COSTS), *figures, row["superb_score"]])
    return text.getvalue()


def _text(value: float | None, form: str = ",.2f") -> str:
    return "-" if value is None else format(value, form)
