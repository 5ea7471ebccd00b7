"""What table2_mini.py finds: figures per model and task, what one bit costs, whether the paper's order shows; as values and as Markdown."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from comparison import Estimate, Figures, estimate, mean, quality, ranks, read_result, read_rows, spread
from reporting import markdown, run_of, show
from scipy.stats import kendalltau, t

import hubert_eff
from hubert_eff.reports.table2 import METRICS, PAPER_TABLE
from superb_tasks.results.significance import DRAWS

if TYPE_CHECKING:
    from table2_mini import Cell, Table2Mini

SECONDS = 10.0  # of audio, for the cost
TITLES = {"float": "float", "w1a1": "W1A1", "untrained": "untrained"}
FORMS = tuple(TITLES)
Key = tuple[str, str, int]  # model, form, seed


def values_of(bench: Table2Mini) -> dict[str, Any]:
    """All figures of what has finished, as JSON holds them."""
    from table2_mini import MODELS

    cells = {(cell.model, cell.form, cell.seed): cell for cell in bench.finished()}
    drawn = {
        key: {task: quality(task, read_rows(bench.folder(cell) / "superb", task)) for task in cell.tasks} for key, cell in cells.items()
    }
    names = [name for name in bench.models if all((name, form, 1) in cells for form in FORMS)]
    found: dict[str, Any] = {
        "settings": {**bench.settings, "tasks": list(bench.tasks)},
        "run": run_of(bench.commits()),
        "seeds": bench.seeds,
        "models": {name: {**_cost(bench, name), "row": MODELS[name].row, "attention_only": MODELS[name].attention_only} for name in names},
        "cells": [_cell(bench, cell, drawn[key]) for key, cell in cells.items()],
        "left": len(bench.cells) - len(cells),
    }
    if names:
        found["table"] = _table(names, bench.tasks, drawn)
        found["losses"] = {name: _losses(name, bench.tasks, drawn) for name in names}
        found["paper"] = _paper({name: MODELS[name].row for name in names}, bench.tasks)
        found["order"] = _order(names, {name: MODELS[name].attention_only for name in names}, bench.tasks, drawn, found["paper"])
        found["repeated"] = _repeated(cells, drawn)
        found["sentence"] = _sentence(found)
    return found


def _cost(bench: Table2Mini, name: str) -> dict[str, Any]:
    """Parameters, operations and bytes of both forms, and the shape of the hidden states; all of 10 s."""
    model = bench.build(name, num_classes=[bench.clusters], label_rate=100)
    whole = hubert_eff.profile(model, seconds=SECONDS)
    bits = hubert_eff.profile(bench.build(name, quant="w1a1", quant_policy=bench.policy), seconds=SECONDS)
    with torch.no_grad():
        states, _ = model.eval().hidden_states(torch.zeros(1, round(SECONDS * hubert_eff.config.SAMPLE_RATE)))
    return {
        "parameters": whole.params_without_labels,
        "macs": whole.macs,
        "macs_one_bit": bits.macs_by_bits.get((1, 1), 0),
        "bytes": {"float": round(1e6 * whole.storage_mb["file"]), "w1a1": round(1e6 * bits.storage_mb["file"])},
        "bop_g": {"float": whole.bop_nonq_g + whole.bop_bq_g, "w1a1": bits.bop_nonq_g + bits.bop_bq_g},
        "states": [list(state.shape) for state in states],
    }


def _cell(bench: Table2Mini, cell: Cell, drawn: dict[str, Figures]) -> dict[str, Any]:
    place = bench.folder(cell) / "superb"
    return {
        "model": cell.model, "form": cell.form, "seed": cell.seed, "seconds": bench.seconds_of(cell),
        "validation": None if cell.form == "untrained" else bench.validation(cell),
        "tasks": {
            task: {
                METRICS[task].key: read_result(place, task)[METRICS[task].key],
                "steps": read_result(place, task)["steps"],
                "utterances": len(read_rows(place, task)),
                "quality": estimate(figures).to_dict(),
            }
            for task, figures in drawn.items()
        },
    }  # fmt: skip


# -- statistics ----------------------------------------------------------------------------------------------------------


def _table(names: Sequence[str], tasks: Sequence[str], drawn: dict[Key, dict[str, Figures]]) -> dict[str, Any]:
    """Per form and model of the first seed: mean over tasks, and mean rank among the models of the same form."""
    found: dict[str, Any] = {}
    for form in FORMS:
        places = [ranks([float(drawn[name, form, 1][task][0]) for name in names]) for task in tasks]
        found[form] = {
            name: {
                "mean": estimate(mean([drawn[name, form, 1][task] for task in tasks])).to_dict(),
                "mean_rank": round(statistics.mean(place[index] for place in places), 2),
            }
            for index, name in enumerate(names)
        }
    return found


def _losses(name: str, tasks: Sequence[str], drawn: dict[Key, dict[str, Figures]]) -> dict[str, Any]:
    """What one bit costs a model of the first seed: per task, over all tasks, and as a share of what pre-training gained."""
    whole, bits, bare = ({task: drawn[name, form, 1][task] for task in tasks} for form in FORMS)
    per_task = {task: estimate(whole[task] - bits[task]).to_dict() for task in tasks}
    loss, gain = mean([whole[task] - bits[task] for task in tasks]), mean([whole[task] - bare[task] for task in tasks])
    share = {task: _share(whole[task] - bits[task], whole[task] - bare[task]) for task in tasks}
    return {
        "tasks": per_task, "mean": estimate(loss).to_dict(), "gain": estimate(gain).to_dict(), "share": _share(loss, gain), "shares": share
    }  # fmt: skip


def _share(loss: Figures, gain: Figures) -> dict[str, float] | None:
    """The loss as a share of the gain in %; None where the gain is not clearly above 0."""
    if not estimate(gain).low > 0:
        return None
    with_gain = gain > 0
    return estimate(np.where(with_gain, 100 * loss / np.where(with_gain, gain, 1.0), math.nan)).to_dict()


def _paper(rows: dict[str, str], tasks: Sequence[str]) -> dict[str, Any]:
    """The paper's losses on the same tasks, in the same points, and its mean ranks at one bit."""

    def points(row: str, task: str) -> float:
        value, metric = PAPER_TABLE[row][list(METRICS).index(task)], METRICS[task]
        value *= 100 / metric.scale  # F1 is of 1
        return value if metric.more_is_better else 100 - value

    def one_bit(row: str) -> str:
        return f"BQ-{row.removesuffix(' Trans')}"

    losses = {name: {task: round(points(row, task) - points(one_bit(row), task), 2) for task in tasks} for name, row in rows.items()}
    places = [ranks([points(one_bit(row), task) for row in rows.values()]) for task in tasks]
    return {
        "losses": {name: {"tasks": found, "mean": round(statistics.mean(found.values()), 2)} for name, found in losses.items()},
        "mean_rank_w1a1": {name: round(statistics.mean(place[i] for place in places), 2) for i, name in enumerate(rows)},
    }


def _order(
    names: Sequence[str], attention: dict[str, bool], tasks: Sequence[str], drawn: dict[Key, dict[str, Figures]], paper: dict[str, Any]
) -> dict[str, Any] | None:
    """What encoders with convolution lose more than those of attention only, over all tasks; None where a kind is missing."""
    loss = {name: mean([drawn[name, "float", 1][task] - drawn[name, "w1a1", 1][task] for task in tasks]) for name in names}
    only, with_convolution = ([name for name in names if attention[name] is kind] for kind in (True, False))
    if not only or not with_convolution:
        return None
    theirs = paper["losses"]
    tau = kendalltau([float(loss[name][0]) for name in names], [theirs[name]["mean"] for name in names]).statistic
    pairs = list(itertools.product(with_convolution, only))
    return {
        "difference": estimate(mean([loss[name] for name in with_convolution]) - mean([loss[name] for name in only])).to_dict(),
        "paper_difference": round(_mean_loss(theirs, with_convolution) - _mean_loss(theirs, only), 2),
        "pairs": len(pairs),
        "pairs_of_the_claim": sum(float(loss[a][0]) > float(loss[b][0]) for a, b in pairs),
        "pairs_of_the_claim_in_the_paper": sum(theirs[a]["mean"] > theirs[b]["mean"] for a, b in pairs),
        "kendall_tau": round(float(tau), 2),
    }  # fmt: skip


def _mean_loss(losses: dict[str, Any], names: Sequence[str]) -> float:
    return statistics.mean(losses[name]["mean"] for name in names)


def _repeated(cells: dict[Key, Cell], drawn: dict[Key, dict[str, Figures]]) -> dict[str, Any] | None:
    """Spread over seeds of the models that have more than one, on the tasks that all seeds have."""
    seeds = {name: sorted(s for n, form, s in cells if n == name and form == "w1a1") for name, _, _ in cells}
    seeds = {name: [s for s in found if all((name, form, s) in cells for form in FORMS)] for name, found in seeds.items()}
    seeds = {name: found for name, found in seeds.items() if len(found) > 1}
    if not seeds:
        return None
    common = sorted(set.intersection(*(set(found) for found in seeds.values())))
    tasks = cells[next(iter(seeds)), "w1a1", common[-1]].tasks
    figures = {
        name: {form: {task: [float(drawn[name, form, s][task][0]) for s in common] for task in tasks} for form in FORMS} for name in seeds
    }
    losses = {
        name: [statistics.mean(f["float"][task][i] - f["w1a1"][task][i] for task in tasks) for i in range(len(common))]
        for name, f in figures.items()
    }
    found: dict[str, Any] = {"seeds": common, "tasks": list(tasks), "figures": figures, "losses": losses}
    if {"conformer", "sparseformer-dn"} <= set(losses) and len(common) > 1:
        differences = [a - b for a, b in zip(losses["conformer"], losses["sparseformer-dn"], strict=True)]
        half = float(t.ppf(0.975, len(common) - 1)) * statistics.stdev(differences) / math.sqrt(len(common))
        middle = statistics.mean(differences)
        found["difference"] = Estimate(middle, middle - half, middle + half).to_dict()
    return found


def _sentence(found: dict[str, Any]) -> str:
    order, repeated = found["order"], found["repeated"]
    if order is None:
        return "Models of one kind only: nothing is said about the paper's order."
    d = order["difference"]
    verdict = "shows" if d["low"] > 0 else "is reversed" if d["high"] < 0 else "does not show beyond noise"
    seeds = "one seed of training, whose own noise these intervals leave out"
    if repeated and "difference" in repeated:
        s = repeated["difference"]
        seen = "the same way" if s["low"] > 0 else "the other way" if s["high"] < 0 else "open"
        seeds = (
            f"over {len(repeated['seeds'])} seeds of training the Conformer's loss minus that of the deep-narrow Sparseformer is "
            f"{s['value']:.1f} points on {', '.join(repeated['tasks'])} (95% interval by Student's t: {s['low']:.1f} to {s['high']:.1f}), "
            f"which leaves it {seen}"
        )
    more = "more" if d["value"] >= 0 else "less"
    return (
        f"The paper's order {verdict}: at one bit, encoders with convolution lose {abs(d['value']):.1f} points {more} than those of "
        "attention only, mean over tasks (loss of the former minus that of the latter, 95% interval over the test utterances: "
        f"{d['low']:.1f} to {d['high']:.1f}; the paper: {order['paper_difference']:.1f}), and more in {order['pairs_of_the_claim']} of "
        f"{order['pairs']} pairs of one of each (the paper: {order['pairs_of_the_claim_in_the_paper']}); {seeds}."
    )


# -- Markdown ------------------------------------------------------------------------------------------------------------


def page(values: dict[str, Any]) -> str:
    """The Markdown of `values_of`."""
    settings, run = values["settings"], values["run"]
    if "table" not in values:
        return f"No model has finished in all of its forms yet ({values['left']} cells are left).\n"
    tasks, names = settings["tasks"], list(values["models"])
    cells = {(cell["model"], cell["form"], cell["seed"]): cell for cell in values["cells"]}
    lines = [values["sentence"], ""]
    lines += markdown(
        ("model", "row of the paper", "parameters", "GMAC, of which one-bit", "bytes, float", "bytes, W1A1", "states, 10 s"),
        [
            (
                name, m["row"], f"{m['parameters']:,}", f"{m['macs'] / 1e9:.2f}, {m['macs_one_bit'] / 1e9:.2f}", f"{m['bytes']['float']:,}",
                f"{m['bytes']['w1a1']:,}", f"{len(m['states'])} x {'x'.join(map(str, m['states'][0][1:]))}",
            )
            for name, m in values["models"].items()
        ],
    )  # fmt: skip
    rows = []
    for form in FORMS:
        for name in names:
            cell, row = cells[name, form, 1], values["table"][form][name]
            valid = cell["validation"]
            shown = [f"{100 * cell['tasks'][task][METRICS[task].key]:.1f}" for task in tasks]
            rows.append(
                (
                    name,
                    TITLES[form],
                    f"{100 * valid['accuracy']:.1f}" if valid else "–",
                    *shown,
                    show(row["mean"]),
                    f"{row['mean_rank']:.1f}",
                )
            )
    heads = [f"{task} {METRICS[task].title.rpartition(', ')[2]}" for task in tasks]
    lines += markdown(("model", "form", "masked accuracy, valid", *heads, "mean, errors as 100 - error", "mean rank in its form"), rows)
    majority = max((cell["validation"]["majority"] for cell in values["cells"] if cell["validation"]), default=0.0)
    lines += [
        f"Figures in %, seed 1. The most frequent label has {100 * majority:.1f}% of the masked frames. [ ]: 95% interval, bootstrap over "
        "the test utterances. The paper's mean ranks at one bit: "
        + ", ".join(f"{name} {rank:.1f}" for name, rank in values["paper"]["mean_rank_w1a1"].items()) + ".",
        "",
        "**What one bit costs**: float minus W1A1 in points, paired.",
        "",
    ]  # fmt: skip
    theirs = values["paper"]["losses"]
    lines += markdown(
        ("model", *tasks, "mean", "share of what pre-training gained, %", "the paper's mean"),
        [
            (name, *(show(loss["tasks"][task]) for task in tasks), show(loss["mean"]), show(loss["share"], 0), theirs[name]["mean"])
            for name, loss in values["losses"].items()
        ],
    )
    if order := values["order"]:
        lines += [f"Kendall's tau of the five mean losses with the paper's: {order['kendall_tau']}.", ""]
    if repeated := values["repeated"]:
        seeds = repeated["seeds"]
        lines += [f"**Seeds {', '.join(map(str, seeds))}** of pre-training and heads, mean ± standard deviation:", ""]
        shown = [
            (name, TITLES[form], *(spread(found[form][task]) for task in repeated["tasks"]))
            for name, found in repeated["figures"].items()
            for form in FORMS
        ]
        lines += markdown(("model", "form", *(f"{task}, right %" for task in repeated["tasks"])), shown)
        lines += [
            "Points lost at one bit, mean over these tasks: "
            + "; ".join(f"{name} {spread(found)}" for name, found in repeated["losses"].items()) + ".",
            "",
        ]  # fmt: skip
    hours = sum(sum(cell["seconds"].values()) for cell in values["cells"]) / 3600
    heads = f"{settings['head_steps']} steps" if settings["head_steps"] else "the steps of `--small`"
    lines += [
        f"{settings['updates']} updates of {settings['batch_seconds']:g} s on {settings['minutes']:g} minutes, {settings['clusters']} MFCC "
        f"classes, learning rate {settings['rate']:g}, policy {settings['policy']}; {settings['superb_minutes']:g} minutes per data set of "
        f"mini-SUPERB, heads of {heads}; bootstrap of {DRAWS} draws. {hours:.1f} h of commands of one thread each: "
        f"{run['cpu']}; torch {run['torch']}, commit {run['commit']}, {run['date']}."
        + (f" {values['left']} cells are left." if values["left"] else ""),
        "",
    ]
    return "\n".join(lines)
