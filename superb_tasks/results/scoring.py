"""Two metrics that S3PRL leaves to its users: MTWV for spoken term detection, DER for diarization."""

from __future__ import annotations

import runpy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from scipy.optimize import linear_sum_assignment

from hubert_eff.errors import UserError
from hubert_eff.utils.files import write_text

from ..running.launch import command_line

Turn = tuple[str, str, float, float]  # recording, speaker, start and end in s
HYPOTHESIS = "hypothesis.rttm"

# QUESST 2014 (Anguera et al. 2014): prior of an occurrence, costs of a miss and of a false alarm
PRIOR, MISS_COST, FALSE_ALARM_COST = 0.0008, 100.0, 1.0
BETA = FALSE_ALARM_COST * (1 - PRIOR) / (MISS_COST * PRIOR)


def read_detections(file: Path) -> dict[str, dict[str, float]]:
    """The scores of a `benchmark.stdlist.xml` as S3PRL writes it, by query and document."""
    return {
        query.attrib["termid"]: {term.attrib["file"]: float(term.attrib["score"]) for term in query}
        for query in ElementTree.parse(file).getroot()
    }


def mtwv(scores: Mapping[str, Mapping[str, float]], truth: Iterable[tuple[str, str]]) -> float:
    """The maximum term-weighted value over all thresholds, one for all queries.

    TWV = 1 - mean over queries of (P_miss + beta P_false_alarm), in which a document holds a query or not (NIST STD 2006, with a trial
    per document as in QUESST 2014). `truth` are (query, document) pairs; queries that occur in none of the documents are left out, and
    a document without a score counts as never detected. At least 0, the value of detecting nothing.

    Raises `UserError` if no query occurs in any document.
    """
    occurs = set(truth)
    occurrences = Counter(query for query, _ in occurs)
    present = [query for query, documents in scores.items() if any((query, name) in occurs for name in documents)]
    if not present:
        raise UserError("none of the queries occurs in a document: there is nothing to detect")
    steps = []  # (score, what detecting it is worth), for one query each
    for query in present:
        hits = {name: (query, name) in occurs for name in scores[query]}
        right, wrong = occurrences[query], len(hits) - sum(hits.values())
        steps += [(scores[query][name], 1 / right if hit else -BETA / wrong) for name, hit in hits.items()]
    order = np.array(sorted(steps, reverse=True))
    value = np.cumsum(order[:, 1]) / len(present)
    last_of_score = np.append(order[1:, 0] != order[:-1, 0], True)
    return max(0.0, float(value[last_of_score].max()))


def read_rttm(file: Path) -> list[Turn]:
    """The turns of an RTTM file."""
    rows = (line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("SPEAKER"))
    return [(row[1], row[7], float(row[3]), float(row[3]) + float(row[4])) for row in rows]


def errors(reference: Sequence[Turn], hypothesis: Sequence[Turn]) -> dict[str, tuple[float, float]]:
    """Per recording of the reference: speaker time that is missed, falsely detected or confused, and speaker time, in s.

    No collar, overlapped speech scored, speakers matched per recording so that the error is least (NIST's md-eval).
    """
    found = {}
    for recording in sorted({turn[0] for turn in reference}):
        ours, theirs = ([turn[1:] for turn in turns if turn[0] == recording] for turns in (reference, hypothesis))
        edges = np.unique([time for _, start, end in (*ours, *theirs) for time in (start, end)])
        length = np.diff(edges)  # of the intervals in which nothing changes
        a, b = _activity(ours, edges), _activity(theirs, edges)  # (speakers, stretches)
        rows, columns = linear_sum_assignment((a * length) @ b.T, maximize=True)
        correct = (a[rows] * b[columns]).sum(0)
        found[recording] = float((np.maximum(a.sum(0), b.sum(0)) - correct) @ length), float(a.sum(0) @ length)
    return found


def der(reference: Sequence[Turn], hypothesis: Sequence[Turn]) -> float:
    """The diarization error rate: all `errors` over all speaker time. Raises `UserError` if nobody speaks in the reference."""
    wrong, spoken = (sum(seconds) for seconds in zip(*errors(reference, hypothesis).values())) if reference else (0.0, 0.0)
    if not spoken:
        raise UserError("nobody speaks in the reference")
    return wrong / spoken


def lowest_der(reference: Sequence[Turn], folder: Path) -> float:
    """The DER of the predictions in S3PRL's folder of an experiment, lowest over thresholds and median filters: SUPERB's scoring.

    The turns of this prediction are left in `HYPOTHESIS`.
    """
    predictions, hypothesis, best = folder / "predictions.txt", folder / "threshold.rttm", folder / HYPOTHESIS
    write_text(predictions, "".join(f"{file}\n" for file in sorted((folder / "scoring" / "predictions").glob("*.h5"))))
    shift = (folder / "frame_shift").read_text(encoding="utf-8").strip()
    lowest = float("inf")
    for median in ("1", "11"):
        for threshold in ("0.3", "0.4", "0.5", "0.6", "0.7"):
            with command_line("--median", median, "--threshold", threshold, "--frame_shift", shift, str(predictions), str(hypothesis)):
                runpy.run_module("s3prl.downstream.diarization.make_rttm", run_name="__main__")
            error = der(reference, read_rttm(hypothesis))
            if error < lowest:
                lowest = error
                hypothesis.replace(best)
    return lowest


def _activity(turns: Sequence[tuple[str, float, float]], edges: np.ndarray) -> np.ndarray:
    """1 where a speaker is active in an interval between two edges: (speakers, intervals)."""
    names = sorted({name for name, _, _ in turns})
    active = np.zeros((len(names), max(0, len(edges) - 1)))
    for name, start, end in turns:
        active[names.index(name), np.searchsorted(edges, start) : np.searchsorted(edges, end)] = 1
    return active
