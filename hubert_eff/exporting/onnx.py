"""Writes ONNX, checked in onnxruntime: all hidden states of a batch of equally long waveforms, or a recognizer's log-probabilities, in
float32, with dynamic batch and length.

torch's TorchScript exporter traces the model; modules then take forms without loops over the length (layers/tracing.py).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..checkpoints.safetensors import TRAINING
from ..config import FRAME_STRIDE
from ..edge import HALF
from ..encoders.base import Encoder
from ..encoders.registry import encoder_of
from ..errors import UserError, missing_extra
from ..layers.position import PositionalConv1d
from ..models.extractor import receptive_field
from ..models.fuse import fuse
from ..models.hubert import HubertModel
from ..quant.attention import Probabilities
from ..recognition import Recognizer
from ..utils.files import replacing

OPSET = 17
INPUT, STATES, LETTERS = "wav", "hidden_states", "log_probs"
TRACED = (2, 16_000)  # shape of the audio that is traced
ATTEMPTS = 6  # recordings of one shape, of which one must agree for a one-bit model; in others a tie may flip a bit
TIE = 0.1  # largest relative difference (L2) of the first state that such a bit changes; it may have changed others in its block
AGREES = 1e-3  # largest difference from torch of hidden states, which are of order 1; usually 1e-5
LETTERS_AGREE = 1e-4  # largest difference of log-probabilities
HALF_AGREES = 0.05  # in float16, where rounding a number of order 1 costs 5e-4 and runtimes round at other places than torch
FLOAT_FORM, SIGN_FORM = "float weights", "one-bit model in its form of +-1 in floats"
HALF_FORM = "float16 weights"


class _States(nn.Module):
    """wav (B, S) -> (L + 1, B, T, D)."""

    def __init__(self, model: HubertModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, wav: Tensor) -> Tensor:
        return torch.stack(self.model.hidden_states(wav)[0])


class _Letters(nn.Module):
    """wav (B, S) -> log-probabilities (B, T, V)."""

    def __init__(self, recognizer: Recognizer) -> None:
        super().__init__()
        self.recognizer, self.model = recognizer, recognizer.hubert

    def forward(self, wav: Tensor) -> Tensor:
        return self.recognizer.ctc_log_probs(self.recognizer.encode(wav)[0])


def require_onnx() -> tuple[Any, Any]:
    """Import onnx and onnxruntime. Raises `UserError` if one is not installed."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise missing_extra(error.name or "onnx", "onnx", "ONNX export") from error
    return onnx, onnxruntime


def require_onnx_form(model: HubertModel | Recognizer) -> None:
    """Raise `UserError` for a packed model, for activations of 2 to 8 bits, for a w1a1 model whose scales never saw data, and for a
    recognizer that is one-bit or int8, or whose CTC layer has learned nothing."""
    if isinstance(model, Recognizer):
        model.check_ctc()
        if model.hubert.config.quant != "none":
            raise UserError("a one-bit recognizer has no ONNX form: --encoder-only writes its encoder")
        model = model.hubert
    from ..quant.modules import unstarted
    from ..quant.quantization import is_int8
    from ..quant.storage import is_packed

    if is_packed(model):
        raise UserError("packed bits have no ONNX form: export the checkpoint that they were made from, or a file written with --float")
    if is_int8(model):
        raise UserError("int8 layers have no ONNX form: export the float model that they were made from")
    if model.config.quant not in ("none", "w1a1"):
        raise UserError(f"a {model.config.quant} model has no ONNX form: only float and w1a1 models do")
    if said := unstarted(model):
        raise UserError(f"nothing to write as ONNX yet: {said}")


def export_onnx(model: HubertModel | Recognizer, path: str | os.PathLike[str], training: str = "") -> dict[str, Any]:
    """Write `path` (.onnx): input `wav` (batch, samples) at 16 kHz, output `hidden_states` (L + 1, batch, frames, D); of a recognizer
    `log_probs` (batch, frames, letters) of its CTC layer, its letters and configuration in the metadata, without an attention decoder.

    A float model is fused first. A model from `edge.rewrite` keeps its layout and, if it is half, float16, also for `hidden_states`. A w1a1
    model is written in its simulated form, +-1 in float32: it loses the speed and size of bits, and keeps its outputs except for what bits
    of attention probabilities at their threshold change, since the graph keeps softmax, as in training (quant/integer_softmax.py). There is
    no padding mask. The metadata keep what `training` says of the weights.

    Returns bytes, form, opset, the largest difference between onnxruntime and torch with softmax over four shapes (among them one frame,
    two frames and a batch), and the share of elements that differ by more than `AGREES` (in float16 `HALF_AGREES`). That share is zero for
    a float model; in a one-bit model only elements behind a bit that a tie flipped, in a long input, may differ.

    Raises `UserError` for a packed model, activations of more than one bit, scales that never saw data, another suffix, and a graph that
    does not compute the same.
    """
    onnx, runtime = require_onnx()
    if Path(path).suffix != ".onnx":
        raise UserError(f"an ONNX model is an .onnx file, not {path}")
    require_onnx_form(model)
    hubert = model.hubert if isinstance(model, Recognizer) else model
    form = (HALF_FORM if hubert.edge == HALF else FLOAT_FORM) if hubert.config.quant == "none" else SIGN_FORM
    traced = (_Letters(fuse(model).float().cpu()) if isinstance(model, Recognizer) else _States(_prepared(model))).eval()
    with replacing(path) as temporary:
        _trace(traced, temporary)
        graph = onnx.load(os.fspath(temporary))
        described = {
            "producer": f"hubert-eff {__version__}", "encoder": encoder_of(hubert.config).name, "form": form, "sample_rate": "16000",
            **({"edge": hubert.edge} if hubert.edge else {}), **(_letters_of(model) if isinstance(model, Recognizer) else {}),
            "layout": "(batch, frames, channels)" if isinstance(hubert.encoder, Encoder) else "(batch, channels, 1, frames)",
            **({TRAINING: training} if training else {}),
        }  # fmt: skip
        for key, value in described.items():
            graph.metadata_props.add(key=key, value=value)
        onnx.save(graph, os.fspath(temporary))
        difference, share = _compare(traced, temporary, runtime)
    size = Path(path).stat().st_size
    figures = {"bytes": size, "form": form, "opset": OPSET, "difference": difference, "share_off": share}
    return {"file": os.fspath(path), "output": _output(traced), **figures}


def _letters_of(recognizer: Recognizer) -> dict[str, str]:
    """What the metadata say of a recognizer: symbols as JSON in the order of the outputs behind the blank, heads, configuration."""
    return {
        "heads": recognizer.hubert.heads, "symbols": json.dumps(recognizer.alphabet.symbols, ensure_ascii=False),
        "recognizer": json.dumps(dataclasses.asdict(recognizer.config), sort_keys=True),
    }  # fmt: skip


def _output(traced: nn.Module) -> str:
    return LETTERS if isinstance(traced, _Letters) else STATES


def _prepared(model: HubertModel) -> HubertModel:
    """A copy for tracing: fused, or at least without weight normalization and with softmax in its attention, in float32 on the CPU."""
    if model.config.quant == "none":
        ready = fuse(model)
    else:
        ready = copy.deepcopy(model).eval()
        with torch.no_grad():
            for module in ready.modules():
                if isinstance(module, PositionalConv1d):
                    module.fold()
                elif isinstance(module, Probabilities):
                    module.by_softmax = True
    ready = ready if model.edge == HALF else ready.float()
    return ready.cpu().requires_grad_(False)


def _trace(traced: nn.Module, path: Path) -> None:
    # the other exporter is the default from torch 2.9 on; it takes minutes, and fails where the number of blocks depends on the length
    keys: dict[str, Any] = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    output, batch = _output(traced), 0 if isinstance(traced, _Letters) else 1
    axes = {INPUT: {0: "batch", 1: "samples"}, output: {batch: "batch", batch + 1: "frames"}}
    printed = contextlib.redirect_stdout(io.StringIO())  # on failure the exporter prints the whole graph
    with torch.no_grad(), printed, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every shape that a trace makes constant raises one; the check covers what matters
        try:
            torch.onnx.export(
                traced, (_noise(TRACED),), os.fspath(path), input_names=[INPUT], output_names=[output], dynamic_axes=axes,
                opset_version=OPSET, **keys,
            )  # fmt: skip
        except (RuntimeError, TypeError, ValueError) as error:  # the exporter's own errors are RuntimeErrors
            reason = " ".join(str(error).partition("Please feel free")[0].split())[:200]
            raise UserError(f"this model has an operation without an ONNX form (opset {OPSET}): {reason}") from error


def _noise(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _compare(traced: _States | _Letters, path: Path, runtime: Any) -> tuple[float, float]:
    """Largest difference between the graph and torch, and the share of elements that differ by more than `AGREES`.

    Raises `UserError` for a graph that does not run, or does not compute the same.
    """
    traced.eval()  # the exporter sets all modules to their parent's mode
    config = traced.model.config
    one = receptive_field(config.conv_layers)
    try:
        with _onnxruntime():
            session = runtime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
        compared = [_agreement(traced, session, shape) for shape in ((1, one), (2, one + FRAME_STRIDE), (1, 9_001), TRACED)]
    except UserError as error:
        raise UserError(f"the ONNX graph of this {encoder_of(config).name} {error}: nothing is written") from error
    differences = torch.cat([difference.flatten() for difference in compared])
    return float(differences.max()), float((differences > _tolerance(traced)).float().mean())


def _tolerance(traced: _States | _Letters) -> float:
    return LETTERS_AGREE if isinstance(traced, _Letters) else HALF_AGREES if traced.model.edge == HALF else AGREES


@contextlib.contextmanager
def _onnxruntime() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # its own errors have no other common class
        raise UserError(f"does not run in onnxruntime ({' '.join(str(error).split())[:200]})") from error


@torch.no_grad()
def _agreement(traced: _States | _Letters, session: Any, shape: tuple[int, int]) -> Tensor:
    """The differences (L + 1, B, T, D) for audio of a shape. Raises `UserError`, with what the graph does, where they are not rounding."""
    binary = traced.model.config.quant != "none"
    worst, kept = 0.0, None
    for attempt in range(ATTEMPTS if binary else 1):
        wav = _noise(shape, attempt)
        with _onnxruntime():
            (states,) = session.run(None, {INPUT: wav.numpy()})
        expected: Tensor = traced(wav)
        if states.shape != tuple(expected.shape):
            raise UserError(f"returns {states.shape} for audio {shape}, not {tuple(expected.shape)}")
        difference = (torch.from_numpy(states).float() - expected.float()).abs()
        off = [not bool((state <= _tolerance(traced)).all()) for state in difference]
        if not any(off):
            return difference
        first = off.index(True)
        relative = float(difference[first].norm() / expected[first].norm())
        worst = max(worst, float(difference.nan_to_num(nan=torch.inf).max()))
        if binary and first > 0 and relative <= TIE:
            kept = difference
    if kept is not None and traced.model.num_frames(shape[1]) > 2:
        return kept  # a deep model has so many bits that every recording may have one at a tie
    raise UserError(f"differs from torch by {worst:.2g} for audio {shape}")
