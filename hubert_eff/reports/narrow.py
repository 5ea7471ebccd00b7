"""The ten SUPERB tasks as a narrow table: a line per task, a column per model, then chance and the best published figure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .table2 import GENERATED, METRICS, REFERENCES

# figures of a system that knows nothing, if the test set does not tell: an equal error rate, detecting nothing
CHANCE = {"asv": 50.0, "qbe": 0.0}
TOY = "°"  # marks figures of generated data
NOTE = (
    "Chance is the share of the most frequent class of the test set; it is 50% for verification and 0 for detection. Best published is the "
    "leaderboard's reference point, on the real data with SUPERB's settings."
)
TOY_NOTE = f"{TOY} marks figures on generated data: do not compare them with the best published figure or the paper's models."
NO_UNTRAINED = "No untrained model is here: hubert-eff superb run --upstream PRESET@0 shows what the training is worth."

Results = Mapping[str, Mapping[str, Any]]  # content of a model's result.json, by task


def is_untrained(upstream: str) -> bool:
    """Whether an upstream is a preset with random weights, PRESET@SEED."""
    return "@" in upstream and not os.path.exists(upstream)


def narrow(models: Sequence[tuple[str, str, Results]]) -> tuple[list[str], list[list[str]], list[str]]:
    """Head, rows and notes of the table of models (label, upstream, results); untrained models come last.

    A row is a task with its metric and an arrow that says which way is better; figures are in the units of the paper's Table 2.
    """
    ordered = sorted(models, key=lambda model: is_untrained(model[1]))
    names = [f"{label}, untrained" if is_untrained(upstream) else label for label, upstream, _ in ordered]
    rows, toy = [], False
    for task, metric in METRICS.items():
        results = [found.get(task) for _, _, found in ordered]
        if not any(results):
            continue
        cells = []
        for result in results:
            mark = TOY if result and result.get("data_set") == GENERATED else ""
            toy = toy or bool(mark)
            cells.append("-" if result is None else f"{metric.scale * result[metric.key]:.2f}{mark}")
        chances = {100 * float(result["chance"]) for result in results if result and isinstance(result.get("chance"), (int, float))}
        chance = " / ".join(f"{value:.2f}" for value in sorted(chances or {CHANCE[task]} if task in CHANCE else chances)) or "-"
        best = REFERENCES[task][metric.key][1] * metric.scale / 100
        rows.append([f"{task} {metric.key} {'↑' if metric.more_is_better else '↓'}", *cells, chance, f"{best:.2f}"])
    notes = [NOTE, *([TOY_NOTE] if toy else []), *([] if any(is_untrained(upstream) for _, upstream, _ in models) else [NO_UNTRAINED])]
    return ["task", *names, "chance", "best published"], rows, notes
