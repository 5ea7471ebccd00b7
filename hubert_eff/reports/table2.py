"""The paper's Table 2: ten SUPERB tasks per model, as reference points beside results of one's own.

The paper: "Attention or Convolution" (Jeon et al. 2023, arXiv:2311.02772), Table 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A task's figure, in % unless stated otherwise: its name, its key in a results file, and whether more is better."""

    title: str
    key: str
    more_is_better: bool
    scale: float = 100.0  # from the results file, where shares are in [0, 1], to the paper's unit


METRICS = {
    "asr": Metric("speech recognition, WER", "wer", False),
    "ks": Metric("keyword spotting, accuracy", "accuracy", True),
    "sf": Metric("slot filling, F1 (of 1)", "f1", True, 1.0),
    "sid": Metric("speaker identification, accuracy", "accuracy", True),
    "pr": Metric("phoneme recognition, PER", "per", False),
    "qbe": Metric("spoken term detection, MTWV x 100", "mtwv", True),
    "ic": Metric("intent classification, accuracy", "accuracy", True),
    "asv": Metric("speaker verification, EER", "eer", False),
    "sd": Metric("diarization, DER", "der", False),
    "er": Metric("emotion recognition, accuracy", "accuracy", True),
}

SCORE = "superb"  # all ten tasks as one figure, see `superb_score`
QUALITIES = {**METRICS, SCORE: Metric("SUPERB score (FBANK: 0, best of its time: 1000)", "superb_score", True, 1.0)}

GENERATED = "generated data"  # the data set of results on `hubert-eff corpus superb`
REPORTED = " (reported)"  # Table 2 repeats published figures of two models, in FP16, beside those of the paper's own set-up

# by the names of Table 1's rows
PAPER_TABLE: dict[str, tuple[float, ...]] = {
    "Vanilla Trans (reported)": (7.06, 96.62, 0.89, 53.67, 6.05, 6.91, 97.28, 5.30, 6.32, 65.00),
    "Vanilla Trans": (6.89, 96.56, 0.89, 53.52, 5.82, 6.70, 97.86, 5.96, 6.63, 63.83),
    "Conformer-S": (8.56, 95.94, 0.87, 52.11, 9.42, 6.20, 92.88, 5.80, 6.81, 62.12),
    "Squeeze-XS": (8.96, 96.13, 0.80, 35.35, 10.73, 6.14, 83.31, 7.86, 9.18, 58.75),
    "Sparseformer-DN-S": (8.44, 95.89, 0.88, 60.57, 7.99, 6.27, 96.02, 6.24, 7.66, 62.26),
    "Sparseformer-SW-S": (7.88, 93.25, 0.88, 61.86, 9.72, 4.92, 93.15, 6.98, 6.56, 65.90),
    "BQ-Vanilla (reported)": (15.96, 93.83, 0.78, 49.62, 22.96, 5.63, 93.01, 6.83, 7.62, 61.68),
    "BQ-Vanilla": (16.83, 94.77, 0.79, 40.15, 20.63, 5.57, 89.77, 9.13, 7.80, 60.74),
    "BQ-Conformer-S": (20.53, 92.44, 0.76, 24.98, 37.13, 5.18, 69.73, 9.86, 11.11, 56.41),
    "BQ-Squeeze-XS": (24.10, 92.79, 0.69, 18.56, 28.82, 5.08, 62.01, 11.97, 13.42, 57.57),
    "BQ-Sparseformer-DN-S": (19.33, 92.24, 0.79, 29.21, 33.17, 4.66, 71.34, 10.70, 9.64, 58.97),
    "BQ-Sparseformer-SW-S": (18.15, 94.03, 0.79, 38.92, 24.37, 6.09, 84.37, 9.19, 8.39, 61.39),
}


def rows_of(row: str) -> list[str]:
    """The rows of Table 2 with the cost of a row of Table 1."""
    return [title for title in PAPER_TABLE if title.removesuffix(REPORTED) == row]


def paper_quality(row: str, quality: str) -> float:
    """The paper's figure of a row on a task, or the score from its ten tasks."""
    if quality == SCORE:
        score = superb_score(paper_figures(row))
        assert score is not None  # the paper has all ten tasks
        return score
    return PAPER_TABLE[row][list(METRICS).index(quality)]


def paper_figures(row: str) -> dict[str, dict[str, float]]:
    """The paper's figures of a row in the form of results: by task and metric, shares in [0, 1]."""
    return {task: {metric.key: value / metric.scale} for (task, metric), value in zip(METRICS.items(), PAPER_TABLE[row], strict=True)}


# The leaderboard's two reference points per metric, in %: FBANK, and the best upstream of its time. Source: superbbenchmark.org,
# github.com/superbbenchmark/website-react, frontend/src/Data.js, `reference_points` (errors there as 100 - error)
REFERENCES: dict[str, dict[str, tuple[float, float]]] = {
    "asr": {"wer": (23.18, 3.62)},
    "ks": {"accuracy": (41.3826674, 96.66)},
    "sf": {"f1": (69.64, 89.81), "slot_value_cer": (52.94, 21.76)},
    "sid": {"accuracy": (20.058174, 90.3)},
    "pr": {"per": (82.01, 3.53)},
    "qbe": {"mtwv": (0.58, 7.36)},
    "ic": {"accuracy": (9.649354219, 98.76)},
    "asv": {"eer": (9.56, 5.11)},
    "sd": {"der": (10.05, 5.62)},
    "er": {"accuracy": (48.23672168, 67.62)},
}


def superb_score(results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The leaderboard's score superb_s of results by task, shares in [0, 1]; None unless all ten tasks have results.

    A metric's points are 1000 (value - FBANK) / (best - FBANK), see `REFERENCES`; a task's the mean of its metrics', the score the mean of
    the tasks' (superbbenchmark.org, Overall Metrics). Of slot filling, where the slot-value CER is not given, as in the paper, F1 counts.
    """
    if not set(METRICS) <= set(results):
        return None
    points: list[float] = []
    for task, metrics in REFERENCES.items():
        given = {key: ends for key, ends in metrics.items() if key in results[task]}
        points.append(sum(1000 * (100 * results[task][key] - low) / (high - low) for key, (low, high) in given.items()) / len(given))
    return sum(points) / len(points)
