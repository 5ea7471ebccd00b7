"""Measures latency, real-time factor, peak memory and throughput of models in turn, and where their time goes."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import SAMPLE_RATE
from ..errors import UserError
from ..quant.runtime.int8 import Int8Linear
from ..utils.evaluating import evaluating
from ..utils.progress import progress
from .cost import MAX_SECONDS, MIN_SAMPLES, file_storage, noise
from .counters import Counts, Tally, count_operations
from .machine import cpu_seconds_of, guard, peak_growth, seconds_of
from .precision import FLOAT, PRECISIONS, form_of, kernel_of, label, precision_of, without_precision

if TYPE_CHECKING:
    from ..models.hubert import HubertModel

WARM_UP = 2  # calls before the timed ones
BLOCKS = "encoder.layers"


@dataclass
class Timing:
    """Measurements of one model on one shape of input. Ratios are of its time over the first model's, round by round."""

    model: str
    seconds: float  # of audio per utterance
    batch: int
    rounds: int
    median_ms: float
    p5_ms: float
    p95_ms: float
    rtf: float  # time over the length of all audio
    throughput: float  # seconds of audio per second
    peak_memory_mb: float | None  # weights, and growth of the process during the call
    ratio: float
    ratio_p5: float
    ratio_p95: float
    form: str = FLOAT  # float, packed or simulated (precision.py)
    precision: str = PRECISIONS[0]  # of the float parts
    file_mb: float | None = None  # size of the tensors in its export
    kernel: str = ""  # kernel of its linear layers

    @property
    def label(self) -> str:
        """The model, and what it ran as."""
        return label(self.model, self.form, self.precision)


@dataclass
class Share:
    """One group of modules or of operations: its parameters, floating-point operations and time, and their shares of the whole in %."""

    name: str
    params: int
    flop: int  # 2 per MAC, 1 per element operation
    ms: float
    params_percent: float = 0.0
    flop_percent: float = 0.0
    time_percent: float = 0.0


@dataclass
class Shares:
    """Where the time of a model goes, measured by operation: by parts of the model, by classes of modules inside the encoder's blocks (a
    module without own operations counts with its parent), and by kinds of operations."""

    model: str
    seconds: float
    parts: list[Share]
    blocks: list[Share]
    kinds: list[Share]
    form: str = FLOAT  # as of `Timing`
    precision: str = PRECISIONS[0]

    @property
    def label(self) -> str:
        """The model, and what it ran as."""
        return label(self.model, self.form, self.precision)


def measure(
    models: Mapping[str, HubertModel], seconds: Sequence[float], batches: Sequence[int], rounds: int, device: str = "cpu",
    cpu_time: bool = False,
) -> list[Timing]:  # fmt: skip
    """Time `hidden_states` of each model on each length and batch. A round calls every model once, so a slow moment affects all.

    cpu_time: count CPU time of this thread instead of wall time, for a machine that others use too; only with one torch thread.
    The name of a model may end in its precision, "conformer-s int8", to tell it from its own float form.

    Raises `UserError` for impossible lengths or counts, and `SlowProcessError` if figures of this process would be meaningless.
    """
    _validate(seconds, batches, rounds)
    models = {name: model.to(device) for name, model in models.items()}
    timings = []
    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(evaluating(model))
        advance = modes.enter_context(progress("bench", len(seconds) * len(batches) * (rounds + WARM_UP)))
        for length in seconds:
            for batch in batches:
                if device == "cpu":
                    guard(f"before {length:g} s")
                timings += _measure(models, length, batch, rounds, device, advance, cpu_time)
    if device == "cpu":
        guard("after the last round")
    return timings


def _measure(
    models: Mapping[str, HubertModel], seconds: float, batch: int, rounds: int, device: str, advance: Callable[[int], None],
    cpu_time: bool,
) -> list[Timing]:  # fmt: skip
    calls = {name: _call(model, noise(model, seconds, batch), device) for name, model in models.items()}
    for call in calls.values():
        for _ in range(WARM_UP - 1):
            call()
    peaks = {name: peak_growth(call, device) for name, call in calls.items()}
    advance(WARM_UP)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(cpu_seconds_of(call) if cpu_time else seconds_of(call))
        advance(1)
    first = times[next(iter(times))]
    timings = []
    for name, values in times.items():
        model = models[name]
        median, audio, peak = statistics.median(values), seconds * batch, peaks[name]
        ratios = [mine / other for mine, other in zip(values, first, strict=True)]
        timings.append(
            Timing(
                without_precision(name, model), seconds, batch, rounds,
                1e3 * median, 1e3 * _quantile(values, 0.05), 1e3 * _quantile(values, 0.95),
                median / audio, audio / median, None if peak is None else (_bytes(model) + peak) / 1e6,
                statistics.median(ratios), _quantile(ratios, 0.05), _quantile(ratios, 0.95),
                form_of(model), precision_of(model), file_storage(model) / 1e6, kernel_of(model, device),
            )
        )  # fmt: skip
    return timings


def _call(model: HubertModel, wave: Tensor, device: str) -> Callable[[], object]:
    def call() -> None:
        model.hidden_states(wave)
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def _bytes(model: nn.Module) -> int:
    laid_out = sum(module.codes.numel() for module in model.modules() if isinstance(module, Int8Linear))  # beyond the file
    return laid_out + sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _quantile(values: Sequence[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def _validate(seconds: Sequence[float], batches: Sequence[int], rounds: int) -> None:
    for length in seconds:
        if not MIN_SAMPLES / SAMPLE_RATE <= length <= MAX_SECONDS:
            raise UserError(f"{length:g} s cannot be measured: give between {MIN_SAMPLES / SAMPLE_RATE} and {MAX_SECONDS:g}")
    if min(batches) < 1 or rounds < 1:
        raise UserError(f"batch {min(batches)} and rounds {rounds} must be at least 1")


# -- where the time goes -------------------------------------------------------------------------------------------------


def measure_shares(name: str, model: HubertModel, seconds: float, rounds: int, device: str = "cpu") -> Shares:
    """Time each operation over one utterance, as the median of `rounds` passes, without Python's time between operations."""
    _validate([seconds], [1], rounds)
    wave = noise(model.to(device), seconds)

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    passes = []
    with evaluating(model):
        model.hidden_states(wave)
        for _ in range(rounds):
            with count_operations(model, time.perf_counter if device == "cpu" else synchronized) as counts:
                model.hidden_states(wave)
            passes.append(counts)
    for key, tally in passes[0].tallies.items():
        tally.seconds = statistics.median(counts.tallies[key].seconds for counts in passes)
    shares = shares_of(without_precision(name, model), model, seconds, passes[0])
    return dataclasses.replace(shares, form=form_of(model), precision=precision_of(model))


def shares_of(name: str, model: nn.Module, seconds: float, counts: Counts) -> Shares:
    """`Shares` of one pass that `count_operations` counted with a clock."""
    modules = dict(model.named_modules())
    ran = {path for path, _, _ in counts.tallies}
    own_params: dict[str, int] = defaultdict(int)  # by the path of the module that runs something
    for path, module in modules.items():
        runner = path
        while runner and runner not in ran:
            runner = runner.rpartition(".")[0]
        own_params[runner] += sum(w.numel() for w in module.parameters(recurse=False))

    def grouped(group: Callable[[str], str | None]) -> list[Share]:
        params: dict[str, int] = defaultdict(int)
        tallies: dict[str, Tally] = defaultdict(Tally)
        for path in {*own_params, *ran}:
            label = group(path)
            if label is not None:
                params[label] += own_params[path]
                tallies[label].add(counts.own(path))
        return _shares(params, tallies)

    def by_class(path: str) -> str | None:
        if not path.startswith(BLOCKS + "."):
            return None
        return "LayerNorm" if isinstance(modules[path], nn.LayerNorm) else type(modules[path]).__name__  # including derived classes

    return Shares(name, seconds, grouped(_part), grouped(by_class), _shares({}, counts.by_kind()))


def _part(path: str) -> str:
    """The part of the model that a module belongs to: the first name of its path, two inside the encoder."""
    names = path.split(".")
    return ".".join(names[:2] if names[0] == "encoder" else names[:1]) or "(model)"


def _shares(params: Mapping[str, int], tallies: Mapping[str, Tally]) -> list[Share]:
    rows = [
        Share(name, params.get(name, 0), 2 * tally.macs + tally.element_ops, 1e3 * tally.seconds)
        for name, tally in tallies.items()
        if tally.calls or params.get(name)
    ]
    for key in ("params", "flop"):
        _percent(rows, key, f"{key}_percent")
    _percent(rows, "ms", "time_percent")
    return sorted(rows, key=lambda row: -row.ms)


def _percent(rows: list[Share], key: str, target: str) -> None:
    whole = sum(getattr(row, key) for row in rows)
    for row in rows:
        setattr(row, target, 100 * getattr(row, key) / whole if whole else 0.0)


def plain(result: Timing | Shares) -> dict[str, object]:
    """Plain values for JSON, marked as measured."""
    return {"basis": "measured", **dataclasses.asdict(result)}


def read(path: Path) -> tuple[list[Timing], list[Shares]]:
    """Read a bench.json. Raises `UserError` for other files."""
    if not path.is_file():
        raise UserError(f"{path} cannot be read: it is not a regular file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        timings = [Timing(**_subject(t)) for t in content["timings"]]
        shares = []
        for values in map(_subject, content["shares"]):
            groups = {name: [_share(row) for row in values[name]] for name in ("parts", "blocks", "kinds")}
            shares.append(Shares(**{**values, **groups}))
        for t in timings:
            _check(t, "peak_memory_mb", "file_mb")
        for s in shares:
            _check(s)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a result of `hubert-eff bench --out`: {' '.join(str(error).split())[:160]}") from error
    return timings, shares


def _subject(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a record; earlier versions put the precision behind the model's name."""
    found = {name: value for name, value in values.items() if name != "basis"}
    if "precision" not in found:
        for precision in PRECISIONS:
            if found["model"].endswith(f" {precision}"):
                found.update(model=found["model"].removesuffix(f" {precision}"), precision=precision)
    return found


def _share(values: Mapping[str, Any]) -> Share:
    share = Share(**values)
    _check(share)
    return share


def _check(record: Timing | Shares | Share, *optional: str) -> None:
    """Raise `ValueError` unless texts are texts and numbers are numbers."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.type == "str":
            good = isinstance(value, str)
        elif field.type in ("int", "float", "float | None"):
            good = isinstance(value, (int, float)) and math.isfinite(value) or (value is None and field.name in optional)
        else:
            continue
        if not good:
            raise ValueError(f"{field.name}={str(value)[:40]}")
