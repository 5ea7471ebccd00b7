"""What real_speech.py finds: keywords and speakers per model beside filter banks, and what came of its targets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from comparison import Figures, estimate, mean, quality, read_rows, spread
from reporting import markdown, run_of, show

from superb_tasks.results.significance import DRAWS

if TYPE_CHECKING:
    from real_speech import RealSpeech

COLUMNS = (("all", "ks"), ("all", "sid"), ("tenth", "ks"), ("tenth", "sid"), ("held-out", "ks"))
HEADS = ("KS", "SID", "KS, 10% of the labels", "SID, 10%", "KS, unheard speaker")
GOALS = {"ks": 90.0, "sid": 97.0}  # of float models, with all labels
WITHIN, ABOVE = 2.0, 10.0  # points: W1A1 of float; an unheard speaker's keywords of the best filter banks
Model = tuple[str, str, str]  # size, labels, form
Columns = dict[tuple[str, str], dict[int, Figures]]  # (protocol, task) -> seed -> figures


def values_of(bench: RealSpeech) -> dict[str, Any]:
    """All figures of what has finished, as JSON holds them."""
    from real_speech import BASELINES, PROTOCOLS, SIZES

    finished, drawn = bench.finished(), dict[Model, Columns]()
    for cell in finished:
        columns = drawn.setdefault((cell.size, cell.labels, cell.form), {})
        for protocol in bench.protocols(cell):
            for task in PROTOCOLS[protocol][0]:
                rows = read_rows(bench.folder(cell) / protocol, task)
                columns.setdefault((protocol, task), {})[cell.seed] = quality(task, rows)
    return {
        "settings": bench.settings,
        "run": run_of(bench.commits()),
        "sizes": {
            size: sum(p.numel() for p in bench.build(size).parameters()) for size in SIZES if any(cell.size == size for cell in finished)
        },
        "models": [
            {
                "size": model[0], "labels": model[1], "form": model[2],
                "figures": {
                    f"{protocol} {task}": {
                        "seeds": {seed: round(float(figures[0]), 3) for seed, figures in found.items()},
                        "mean": estimate(mean(list(found.values()))).to_dict(),
                    }
                    for (protocol, task), found in columns.items()
                },
            }
            for model, columns in drawn.items()
        ],
        "validation": {cell.name: bench.validation(cell) for cell in finished if cell.trained},
        "seconds": {cell.name: sum(map(bench.seconds, bench._chain(cell))) for cell in finished},
        "targets": _targets(drawn, [("", name, "") for name in BASELINES]),
        "left": len(bench.cells()) - len(finished),
    }  # fmt: skip


def _difference(ours: Columns, theirs: Columns, column: tuple[str, str]) -> dict[str, Any] | None:
    """`ours` minus `theirs` on the utterances of a test set, over the seeds that both have; None where a model has not finished."""
    seeds = sorted(set(ours.get(column, {})) & set(theirs.get(column, {})))
    if not seeds:
        return None
    found = mean([ours[column][seed] - theirs[column][seed] for seed in seeds])
    return {**estimate(found).to_dict(), "seeds": {seed: round(float((ours[column][seed] - theirs[column][seed])[0]), 3) for seed in seeds}}


def _above_baselines(columns: Columns, drawn: Mapping[Model, Columns], baselines: Sequence[Model], column: tuple[str, str]) -> Any:
    """What a model has over the best of S3PRL's upstreams, with its name; these have one seed, which stands for all."""
    known = {name[1]: drawn[name][column][1] for name in baselines if name in drawn and column in drawn[name]}
    if not known or column not in columns:
        return None
    best = max(known, key=lambda name: float(known[name][0]))
    found = [figures - known[best] for figures in columns[column].values()]
    return {**estimate(mean(found)).to_dict(), "than": best}


def _targets(drawn: Mapping[Model, Columns], baselines: Sequence[Model]) -> list[dict[str, Any]]:
    """Each target, for every model that it is of, with what came out and whether that meets it."""
    found: list[dict[str, Any]] = []

    def add(target: str, model: Model, figure: dict[str, Any] | None, met: bool | None) -> None:
        if figure is not None:
            found.append({"target": target, "model": " ".join(part for part in model if part), "figure": figure, "met": met})

    for model, columns in drawn.items():
        size, labels, form = model
        if not size or labels == "untrained":
            continue
        for task, goal in GOALS.items() if form == "float" else ():
            if column := columns.get(("all", task)):
                figure = estimate(mean(list(column.values()))).to_dict()
                add(f"float {task.upper()} at least {goal:g}%", model, figure, figure["value"] >= goal)
        if form == "w1a1":
            for task in GOALS:
                figure = _difference(drawn.get((size, labels, "float"), {}), columns, ("all", task))
                add(f"{task.upper()} at one bit within {WITHIN:g} points of float", model, figure, figure and figure["value"] <= WITHIN)
        figure = _above_baselines(columns, drawn, baselines, ("held-out", "ks"))
        add(f"KS of an unheard speaker {ABOVE:g} points above filter banks", model, figure, figure and figure["value"] >= ABOVE)
        before = {"layer": "mfcc", "teacher": "layer"}.get(labels)
        if before and (size, before, form) in drawn:
            for column_name in COLUMNS:
                figure = _difference(columns, drawn[size, before, form], column_name)
                name = HEADS[COLUMNS.index(column_name)]
                add(f"labels of {labels} not below those of {before}: {name}", model, figure, figure and figure["value"] >= 0)
    return found


# -- Markdown ------------------------------------------------------------------------------------------------------------


def page(values: dict[str, Any]) -> str:
    """The Markdown of `values_of`."""
    settings, run, rows = values["settings"], values["run"], []
    for model in values["models"]:
        size, labels, form = model["size"], model["labels"], model["form"]
        parameters = f"{values['sizes'][size] / 1e6:.1f} M" if size else "–"
        heard = [
            found
            for name, found in values["validation"].items()
            if name.startswith("shared-") and name.rpartition("-")[0] == f"shared-{size}-{labels}-{form}"
        ]
        accuracy = "–"
        if heard:
            accuracy = (
                f"{100 * statistics.mean(f['accuracy'] for f in heard):.1f} ({100 * statistics.mean(f['majority'] for f in heard):.1f})"
            )
        shown = [
            spread(list(model["figures"][f"{protocol} {task}"]["seeds"].values())) if f"{protocol} {task}" in model["figures"] else "–"
            for protocol, task in COLUMNS
        ]
        rows.append((parameters, labels, form.upper() if form == "w1a1" else form or "–", accuracy, *shown))
    heads = ("parameters", "labels", "form", "masked accuracy (most frequent label)", *HEADS)
    lines = markdown(heads, rows)
    lines += [
        f"Accuracies in %, over seeds mean ± standard deviation. {settings['updates']} updates of {settings['batch_seconds']:g} s, "
        f"{settings['clusters']} classes, unheard speaker: {settings['held_out']}. {run['cpu']}; torch {run['torch']}, commit "
        f"{run['commit']}, {run['date']}; {sum(values['seconds'].values()) / 3600:.1f} h of commands of one thread each."
        + (f" {values['left']} cells are left." if values["left"] else ""),
        "",
        f"**Targets.** [ ]: 95% interval over the test utterances, paired, {DRAWS} draws.",
        "",
    ]
    verdicts = {True: "met", False: "missed", None: "–"}
    shown_targets = []
    for target in values["targets"]:
        than = f" (than {target['figure']['than']})" if "than" in target["figure"] else ""
        shown_targets.append((target["target"], target["model"], show(target["figure"]) + than, verdicts[target["met"]]))
    return "\n".join([*lines, *markdown(("target", "model", "came out", ""), shown_targets)])
