"""Chooses the form of a float layer on a CPU: torch's own, or ours through oneDNN, with the same results up to rounding.

Which one is faster depends on the processor's vendor, its instruction sets and the shapes. `RULES` fixes the choice for all of these, so
that a resumed or distributed training is equal to the last bit. Our form runs only where it was measured to be no slower than torch's;
elsewhere torch's own runs. `benchmarks/speed/float_layers.py` measures.

`hubert-eff doctor --tune` measures this machine and keeps its own choice in `$XDG_CACHE_HOME/hubert-eff` (default ~/.cache), for this
processor, version of torch and number of threads. It holds only within `torch.inference_mode()`, where nothing trains.
"""

# M rows, K inputs, N outputs, T frames

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import short
from ..kernels.cpu import AMD, INTEL, Cpu, cpu
from ..utils.files import write_json
from .tracing import is_tracing

NEVER = math.inf


@dataclass(frozen=True)
class Choice:
    """The sizes from which our form runs.

    `linear`, `folded`: pairs (rows, weights) in order of falling rows. At M rows the first pair with at most M rows decides, and oneDNN's
    product runs if K N is at least its weights; `folded` is for weights stored input by input, as `Linear.fold` leaves them.
    `attention`, `relative`: number of queries from which attention runs by blocks, dense or with relative positions. `least`: linear layers
    with fewer weights take torch's product without further checks, which with few rows would take a tenth of their time.
    """

    linear: tuple[tuple[int, float], ...] = ()
    folded: tuple[tuple[int, float], ...] = ()
    attention: float = NEVER
    relative: float = NEVER
    least: float = NEVER

    def described(self) -> dict[str, str]:
        """The choice in words, by kind of layer."""

        def product(steps: tuple[tuple[int, float], ...]) -> str:
            return ", ".join(f"oneDNN from {rows} rows and {int(weights):,} weights on" for rows, weights in reversed(steps)) or "torch"

        def attention(frames: float) -> str:
            return "torch" if frames == NEVER else f"by blocks from {int(frames)} frames on"

        return {
            "linear": product(self.linear),
            "linear, fused": product(self.folded),
            "attention": attention(self.attention),
            "attention, relative positions": attention(self.relative),
        }


STOCK = Choice()
# Zen 5 computes 512 bits at a time; MKL, the library behind torch's products, uses half of them on processors that are not Intel's
FULL_WIDTH = Choice(((64, 2**14), (32, 2**16), (16, 2**21)), ((64, 2**14), (16, 2**16)), attention=192, relative=192, least=2**14)
# Zen 4 and older compute 256 bits at a time: MKL is near the peak, and is slower than oneDNN only with wide weights
HALF_WIDTH = Choice(((1536, 2**14), (384, 2**18)), ((128, 5 * 2**14), (16, 3 * 2**16)), relative=768, least=5 * 2**14)


@dataclass(frozen=True)
class Rule:
    """The choice for processors of this vendor with all of these instruction sets."""

    name: str
    vendor: str
    sets: tuple[str, ...]
    choice: Choice


RULES = (  # the first match counts
    Rule("Intel", INTEL, (), STOCK),  # at par or below with and without AMX: attention 0.5 - 0.7x, linear layers 0.7 - 1.06x
    Rule("AMD, AVX-512 and AVX-VNNI (Zen 5)", AMD, ("avx512bw", "avx_vnni"), FULL_WIDTH),
    Rule("AMD", AMD, (), HALF_WIDTH),
)
UNMEASURED = Rule("not measured", "", (), STOCK)  # Arm among them


def rule_for(processor: Cpu) -> Rule:
    """The rule that fits a processor."""
    fits = (rule for rule in RULES if rule.vendor == processor.vendor and set(rule.sets) <= set(processor.sets))
    return next(fits, UNMEASURED)


def takes_product(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's product is chosen for x (..., K) and weight (N, K)."""
    choice = chosen()
    steps = choice.linear if weight.is_contiguous() else choice.folded
    rows = x.numel() // x.size(-1)
    return weight.numel() >= next((weights for least, weights in steps if rows >= least), NEVER)


def takes_blocks(queries: int, keys: int, relative: bool) -> bool:
    """Whether attention of so many queries and keys runs by blocks."""
    choice = chosen()
    return min(queries, keys) >= (choice.relative if relative else choice.attention)


def takes_spectrum(x: Tensor, shape: tuple[int, int, int]) -> bool:
    """Whether a grouped convolution over time of x (B, T, D), with weights (D, C, k), is computed from spectra in inference.

    At 499 frames, kernel 128, 16 groups and 144 - 768 channels that takes a quarter of the direct convolution's time. It does not depend on
    the length, so an utterance gives the same bits alone and among longer ones. bfloat16 is transformed in float32, except for few channels
    per group where AMX multiplies it.
    """
    _, width, kernel = shape
    if x.device.type != "cpu" or not torch._C.has_spectral or kernel < 64 or width > 64 or x.numel() == 0:
        return False
    if torch.compiler.is_compiling() or is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    if x.dtype == torch.bfloat16:
        return width > 16 or "amx_bf16" not in cpu().sets
    return x.dtype in (torch.float32, torch.float16)


FIXED = rule_for(cpu()).choice


def chosen() -> Choice:
    """The choice to use here: the rule, or in inference mode the tuned choice."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():  # a compiler cannot follow the second condition
        return tuned(torch.get_num_threads()) or FIXED
    return FIXED


# -- what was tuned -----------------------------------------------------------------------------------------------------------------------


def _key(threads: int) -> dict[str, Any]:
    return {"processor": dataclasses.asdict(cpu()) | {"sets": list(cpu().sets)}, "torch": torch.__version__, "threads": threads}


def tuned_file(threads: int) -> Path:
    """The file of the choice for this machine. Raises `RuntimeError` for a user without a home."""
    name = hashlib.sha256(json.dumps(_key(threads), sort_keys=True).encode()).hexdigest()[:20]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hubert-eff" / f"float-layers-{name}.json"


def keep(choice: Choice, threads: int) -> Path:
    """Write a choice to its file. Raises `UserError` if it cannot be written, `WriteError` on a full disk."""
    path = tuned_file(threads)
    numbers = {name: None if value == NEVER else value for name, value in dataclasses.asdict(choice).items()}
    write_json(path, _key(threads) | {"choice": numbers})
    tuned.cache_clear()
    return path


def _checked(text: str, threads: int) -> Choice:
    """Parse a choice that `keep` wrote. Raises `ValueError` and other errors for other content."""
    found = json.loads(text)
    if {name: found[name] for name in _key(threads)} != _key(threads):
        raise ValueError("it belongs to another machine")
    values = found["choice"]

    def number(value: Any) -> float:
        if type(value) is not int or not 0 < value < 2**40:
            raise ValueError(f"{value!r} is not a size")
        return value

    def steps(pairs: Any) -> tuple[tuple[int, float], ...]:
        read = tuple((int(number(rows)), number(weights)) for rows, weights in pairs)
        if sorted(read, reverse=True) != list(read):
            raise ValueError("rows must fall")
        return read

    limits = {name: NEVER if values[name] is None else number(values[name]) for name in ("attention", "relative", "least")}
    return Choice(steps(values["linear"]), steps(values["folded"]), **limits)


@functools.cache
def tuned(threads: int) -> Choice | None:
    """The tuned choice for this machine; None if there is none, or if the file is damaged, of which it warns once."""
    try:
        path = tuned_file(threads)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, ValueError) as error:
        warnings.warn(f"the tuned choice for this machine cannot be read ({short(error)}): the fixed rule holds", stacklevel=2)
        return None
    try:
        return _checked(text, threads)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(f"{path} is damaged ({short(error)}) and ignored: run hubert-eff doctor --tune again", stacklevel=2)
        return None
