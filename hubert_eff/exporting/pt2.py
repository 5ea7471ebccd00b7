"""Writes torch.export programs (.pt2), with dynamic batch and length, for hidden states or a fine-tuned model's letters; torch runs them.

Modules take forms without loops over the length (layers/tracing.py), and attention is computed in one piece.
"""

# B batch, S samples at 16 kHz, T frames of 20 ms, D model dim, L blocks, V letters and the blank

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..checkpoints.safetensors import TRAINING
from ..config import FRAME_STRIDE, SAMPLE_RATE
from ..encoders.base import Encoder
from ..encoders.registry import encoder_of
from ..errors import UserError, short
from ..layers.bits import stored_bits
from ..models.extractor import receptive_field
from ..models.fuse import fuse
from ..models.hubert import HubertModel
from ..quant.quantization import is_int8
from ..recognition import Recognizer
from ..utils.files import replacing

DESCRIPTION = "hubert_eff.json"  # the extra file that describes a program
TRACED = (3, 16_321)  # shape of the traced audio; arbitrary sizes
MOST_UTTERANCES, LONGEST = 1024, 3600 * SAMPLE_RATE
AGREES = 1e-4  # largest difference from torch; usually 1e-6


class _States(nn.Module):
    """wav (B, S), padding_mask (B, S) bool -> L + 1 tensors (B, T, D), padding of frames (B, T) bool."""

    def __init__(self, model: HubertModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, wav: Tensor, padding_mask: Tensor) -> tuple[list[Tensor], Tensor]:
        return self.model.hidden_states(wav, padding_mask)


class _Letters(nn.Module):
    """wav (B, S), padding_mask (B, S) bool -> log-probabilities (B, T, V), padding of frames (B, T) bool."""

    def __init__(self, recognizer: Recognizer) -> None:
        super().__init__()
        self.recognizer = recognizer

    def forward(self, wav: Tensor, padding_mask: Tensor) -> tuple[Tensor, Tensor]:
        encoded, padding = self.recognizer.encode(wav, padding_mask)
        return self.recognizer.ctc_log_probs(encoded), padding


def require_program(model: HubertModel | Recognizer) -> None:
    """Raise `UserError` for a model without a program (one-bit, rewritten for accelerators, or with an untrained CTC layer) and for an old
    torch.
    """
    hubert = model.hubert if isinstance(model, Recognizer) else model
    if not _has_bounds():
        raise UserError(f"--pt2 needs torch 2.7 or newer, this is {torch.__version__}: its torch.export knows no bounds of dynamic sizes")
    if is_int8(hubert):
        raise UserError("int8 layers have no torch.export program: export the float model that they were made from")
    if hubert.config.quant != "none" or any(stored_bits(module) for module in hubert.modules()):
        raise UserError(
            "a one-bit model has no torch.export program: products of bits are kernels of this package, which torch alone does not have; "
            "write --out FILE.safetensors, or --onnx FILE.onnx in the form of +-1 in floats"
        )
    if not isinstance(hubert.encoder, Encoder):
        raise UserError("a rewritten model (edge.rewrite) has no torch.export program: write --out FILE.safetensors or --onnx FILE.onnx")
    if isinstance(model, Recognizer):
        model.check_ctc()


def export_pt2(model: HubertModel | Recognizer, path: str | os.PathLike[str], training: str = "") -> dict[str, Any]:
    """Write `path` (.pt2), which `torch.export.load(path).module()` reads back without this package, in float32.

    The program is called as program(wav (B, S) at 16 kHz, padding_mask (B, S) bool, True = padding) and returns what
    `HubertModel.hidden_states` does, (L + 1 tensors (B, T, D), padding (B, T)); of a recognizer (log-probabilities (B, T, V), padding).
    Audio may have two frames (720 samples) to an hour, a batch up to 1024 utterances. The model is fused first. An attention decoder is
    left out. The extra file `DESCRIPTION` describes the program as JSON, including a recognizer's letters, and what `training` says of the
    weights.

    Returns bytes and the largest difference between the program as it is read back and the model, over four shapes.
    Raises `UserError` as `require_program` does, for another suffix, and for a program that does not compute the same.
    """
    if Path(path).suffix != ".pt2":
        raise UserError(f"a torch.export program is a .pt2 file, not {path}")
    require_program(model)
    fused = fuse(model).float().cpu()
    wrapper = (_Letters(fused) if isinstance(fused, Recognizer) else _States(fused)).eval()
    description = _description(model) | ({TRAINING: training} if training else {})
    with replacing(path) as temporary:
        program = _program(wrapper)
        with temporary.open("wb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fused weights are views, of which it warns
            torch.export.save(program, stream, extra_files={DESCRIPTION: json.dumps(description, indent=2, sort_keys=True)})
        difference = _difference(model, temporary)
    return {"file": os.fspath(path), "bytes": Path(path).stat().st_size, "difference": difference, **description}


def _has_bounds() -> bool:
    try:
        torch.export.Dim.AUTO(min=1, max=2)
    except (AttributeError, TypeError):
        return False
    return True


def _description(model: HubertModel | Recognizer) -> dict[str, Any]:
    hubert = model.hubert if isinstance(model, Recognizer) else model
    described = {
        "package_version": __version__, "encoder": encoder_of(hubert.config).name, "sample_rate": SAMPLE_RATE,
        "inputs": ["wav", "padding_mask"], "outputs": ["hidden_states", "padding"],
    }  # fmt: skip
    if isinstance(model, Recognizer):
        described |= {"outputs": ["log_probs", "padding"], "letters": model.alphabet.letters}
    return described


def _program(wrapper: nn.Module) -> torch.export.ExportedProgram:
    wav, padding = _audio(TRACED)
    bounds = torch.export.Dim.AUTO
    least = receptive_field(_hubert(wrapper).config.conv_layers) + FRAME_STRIDE
    sizes = {0: bounds(min=1, max=MOST_UTTERANCES), 1: bounds(min=least, max=LONGEST)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(wrapper, (wav, padding), dynamic_shapes={"wav": sizes, "padding_mask": dict(sizes)}, strict=False)
        except Exception as error:  # torch's own classes differ between versions
            raise UserError(f"torch.export cannot follow this model: {short(error)}") from error
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # holds paths of this machine
    return program


def _hubert(wrapper: nn.Module) -> HubertModel:
    return next(module for module in wrapper.modules() if isinstance(module, HubertModel))


def _audio(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Noise (B, S), and padding of the last quarter of its last row."""
    wav = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(shape, dtype=torch.bool)
    if shape[0] > 1:
        padding[-1, 3 * shape[1] // 4 :] = True
    return wav, padding


def _difference(model: HubertModel | Recognizer, path: Path) -> float:
    """Largest difference between the program in a file and the model. Raises `UserError` where it is not rounding."""
    wrapper = (_Letters(model) if isinstance(model, Recognizer) else _States(model)).eval()
    with path.open("rb") as stream:
        run = torch.export.load(stream).module()
    worst = 0.0
    for shape in ((1, 1_600), (2, 1_600), (1, 9_001), (2, 23_456)):
        audio = _audio(shape)
        with torch.no_grad():
            try:
                found, found_padding = run(*audio)
            except Exception as error:
                raise UserError(f"the program does not run for audio {shape} ({short(error)}): nothing is written") from error
            expected, padding = wrapper(*audio)
        pairs = zip(found, expected, strict=True) if isinstance(expected, list) else ((found, expected),)
        apart = max(float((a - b).abs().nan_to_num(torch.inf).max()) for a, b in pairs)
        if apart > AGREES or not torch.equal(found_padding, padding):
            raise UserError(f"the program differs from the model by {apart:.2g} for audio {shape}: nothing is written")
        worst = max(worst, apart)
    return worst
