"""Mean and variance of the output of every linear and convolutional layer over training (Song et al. 2022, "layer trend plot").

A record is a line of RUN_DIR/trends.jsonl: {"update": 100, "loss": 5.1, "input": "gaussian", "layers": {name: [mean, variance, dead]}};
`loss` is in nats per frame or letter; `dead` is the share of channels that are the same in every frame; non-finite values are null.
"""

# B batch, T frames, C channels

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, printable
from ..layers.convolution import DepthwiseConv
from ..layers.position import PositionalConv1d
from ..utils.files import write_text

FILE = "trends.jsonl"
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, DepthwiseConv, PositionalConv1d)
FRAMES = 200  # length of the Gaussian input
Stats = tuple[float, float, float]  # mean, variance, share of dead channels

# limits of the alarms; `alarms` says what each means
EXPLODED, ATTENUATED, DEAD_CHANNEL, DEAD_SHARE = 1e4, 1e-8, 1e-12, 0.99


@dataclass(frozen=True)
class Record:
    """The figures of all layers after `update` updates; `loss` is that of the next update, if known."""

    update: int
    layers: Mapping[str, Stats]
    loss: float | None = None
    input: str = "gaussian"

    def line(self) -> str:
        """The record as a line of JSON."""
        layers = {name: [_finite(value) for value in stats] for name, stats in self.layers.items()}
        return json.dumps({"update": self.update, "loss": _finite(self.loss), "input": self.input, "layers": layers})


def _finite(value: float | None) -> float | None:
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _figures(y: Tensor, channel: int) -> Tensor:
    """Mean, variance and share of dead channels of an output, as a tensor, so the CPU does not wait for a GPU."""
    rows = y.detach().float().movedim(channel, -1).flatten(0, -2)  # (N, C)
    of_channels, mean = torch.var_mean(rows, dim=0, correction=0)
    variance = of_channels.mean() + mean.var(correction=0)
    return torch.stack((mean.mean(), variance, (of_channels < DEAD_CHANNEL).float().mean()))


class LayerTrends:
    """Observes the outputs of a model's layers; it costs nothing while it is not observing."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def watching(self) -> Iterator[dict[str, Stats]]:
        """Observe everything that runs inside. The dictionary is filled at the end: layer -> figures of its last call."""
        found: dict[str, Tensor] = {}
        handles = []
        parts = _output_parts(self.model)
        for name, module in self.model.named_modules():
            if isinstance(module, LAYERS):
                channel = 1 if isinstance(module, (nn.Conv1d, nn.Conv2d, PositionalConv1d)) else -1
                handles.append(module.register_forward_hook(_watch(parts.get(name, (name,)), channel, found)))
            elif callable(getattr(module, "projections", None)):
                handles.append(module.register_forward_pre_hook(_watch_projections(name, module, found)))
        figures: dict[str, Stats] = {}
        try:
            yield figures
        finally:
            for handle in handles:
                handle.remove()
        if found:
            rows = torch.stack(list(found.values())).cpu().tolist()
            figures.update((name, (row[0], row[1], row[2])) for name, row in zip(found, rows, strict=True))


def _output_parts(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Layers whose output is that of several layers side by side, as their modules declare by `output_parts()`: path -> paths."""
    declared = {name: module.output_parts() for name, module in model.named_modules() if hasattr(module, "output_parts")}
    return {f"{name}.{key}": tuple(f"{name}.{part}" for part in parts) for name, keys in declared.items() for key, parts in keys.items()}


def _watch(names: tuple[str, ...], channel: int, found: dict[str, Tensor]) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
            for name, part in zip(names, output.chunk(len(names), channel), strict=True):
                found[name] = _figures(part, channel)

    return hook


def _watch_projections(name: str, module: Any, found: dict[str, Tensor]) -> Any:
    """Compute projections again from the input of an attention that computes several as one product and never calls them."""

    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        for key in ("q_proj", "k_proj", "v_proj"):
            layer = getattr(module, key, None)
            if layer is not None and getattr(module, "qkv_input", None) is None:
                with torch.no_grad():
                    found[f"{name}.{key}"] = _figures(nn.functional.linear(inputs[0], layer.weight, layer.bias), -1)

    return hook


@torch.no_grad()
def look(model: Any, update: int, seed: int = 0) -> Record:
    """Record a HuBERT's encoder in eval mode on Gaussian input (1, 200, D); the model is left as it was."""
    encoder = model.encoder
    parameter = next(encoder.parameters())
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, FRAMES, model.config.input_dim, generator=generator).to(parameter)
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        with LayerTrends(encoder).watching() as figures:
            encoder(x)
    finally:
        for module, mode in modes:
            module.training = mode
    return Record(update, figures)


class TrendLog:
    """The file of a run to which records are added. A run that resumes at an earlier update drops the records after it."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / FILE
        self.open = False

    def add(self, record: Record) -> None:
        """Append one record."""
        if not self.open:
            kept = [r for r in read_trends(self.path) if r.update < record.update] if self.path.is_file() else []
            write_text(self.path, "".join(f"{r.line()}\n" for r in kept))
            self.open = True
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(record.line() + "\n")


def read_trends(path: Path) -> list[Record]:
    """Read the records of a file; a last line that was cut off by a kill is skipped. Raises `UserError` for other files."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            layers = {}
            for name, stats in entry["layers"].items():
                mean, variance, dead = (math.nan if value is None else float(value) for value in stats)
                layers[printable(name)] = mean, variance, dead
            if not layers:
                raise ValueError("no layer")
            loss = None if entry.get("loss") is None else float(entry["loss"])
            records.append(Record(int(entry["update"]), layers, loss, printable(entry["input"])))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path} line {number} is not a record of layer trends") from error
    return records


@dataclass(frozen=True)
class Alarm:
    """A fault of a layer, and the update at which it began."""

    kind: str
    layer: str
    update: int
    value: float

    def __str__(self) -> str:
        said = {
            "not finite": "gives values that are not finite",
            "explosion": f"has exploded: variance {self.value:.3g}",
            "attenuation": f"has faded: variance {self.value:.3g}",
            "dead": f"is dead: {self.value:.0%} of its channels are the same in every frame",
        }[self.kind]
        return f"update {self.update}: {self.layer} {said}"


def alarms(records: Sequence[Record]) -> list[Alarm]:
    """The first alarm of each kind and layer, in order of time.

    not finite: mean or variance is NaN or infinite. explosion: a variance above 1e4 (values around 100, where a softmax or a sigmoid
    saturates). attenuation: below 1e-8. dead: at least 99% of the channels do not change from frame to frame (variance below 1e-12).
    """
    first: dict[tuple[str, str], Alarm] = {}
    for record in records:
        for name, (mean, variance, dead) in record.layers.items():
            kind, value = "", variance
            if not (math.isfinite(mean) and math.isfinite(variance)):
                kind = "not finite"
            elif dead >= DEAD_SHARE:
                kind, value = "dead", dead
            elif variance > EXPLODED:
                kind = "explosion"
            elif variance < ATTENUATED:
                kind = "attenuation"
            if kind:
                first.setdefault((kind, name), Alarm(kind, name, record.update, value))
    return sorted(first.values(), key=lambda alarm: alarm.update)


def place(layer: str) -> tuple[str, str]:
    """A layer's block ("block 1", or "outside the blocks") and its name inside the block."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\.(.+)$", layer)
    return (f"block {int(match[1]) + 1}", match[2]) if match else ("outside the blocks", layer)


def by_block(layers: Iterable[str]) -> dict[str, list[str]]:
    """Layers of each block."""
    blocks: dict[str, list[str]] = {}
    for layer in layers:
        blocks.setdefault(place(layer)[0], []).append(layer)
    return blocks
