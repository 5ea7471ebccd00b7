"""A model card in Markdown: what a file holds, what it costs, how it is loaded, where it comes from, what it is not good for."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from ..checkpoints.safetensors import PACKED, read_export, read_metadata
from ..profiling import profile
from ..utils.files import write_text

SECONDS = 10.0


def write_card(file: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Write the card of an export beside it, and return its path and the figures in it.

    The file is read back and profiled, so that the card describes what others will load.
    """
    path = Path(file)
    metadata, model = read_metadata(path), read_export(path)
    cost = profile(model, SECONDS)
    figures = {
        "bytes": path.stat().st_size,
        "file_mb": cost.storage_mb["file"],
        "weights": metadata["weights"],
        "dtype": metadata["dtype"],
        "params": cost.params,
        "macs": cost.macs,
        "macs_by_bits": {f"{weight}x{activation}": macs for (weight, activation), macs in sorted(cost.macs_by_bits.items(), reverse=True)},
    }
    card = path.with_suffix(".md")
    write_text(card, _text(path.name, metadata, json.loads(metadata["config"]), figures))
    return card, figures


def _text(name: str, metadata: dict[str, str], config: dict[str, Any], figures: dict[str, Any]) -> str:
    packed, dtype = metadata["weights"] == PACKED, metadata["dtype"]
    kind = "one-bit weights and activations (W1A1), packed" if packed else "float weights"
    if not packed and config["quant"] != "none":
        kind = f"float weights of a model that runs at {config['quant']} in simulation"
    rest = {"fp32": "float32", "fp16": "float16, computed in float32", "bf16": "bfloat16, computed in bfloat16"}[dtype]
    rows = {
        "encoder": f"{metadata['encoder']}, {config['encoder_layers']} blocks, D {config['encoder_embed_dim']}",
        "weights": kind + (f", policy `{metadata['policy']}`" if metadata["policy"] else ""),
        "float tensors": rest,
        "file": f"{figures['bytes'] / 1e6:.3f} MB, of which tensors {figures['file_mb']:.3f} MB",
        "parameters": f"{figures['params']:,}",
        f"multiply-accumulates, {SECONDS:g} s of audio": f"{figures['macs']:,}",
        **{f"of them {bits.replace('x', ' x ')} bit": f"{macs:,}" for bits, macs in figures["macs_by_bits"].items()},
    }
    origin = {
        "made from": metadata["source"] or "not stated",
        "written by": f"hubert-eff {metadata['package_version']}, format {metadata['format_version']}; this card: {datetime.date.today()}",
        "trained on": metadata.get("trained_on", "not stated"),
        "licence of the weights": metadata.get("licence", "not stated: ask whoever gave you this file"),
    }
    limits = [
        "Input is 16 kHz mono; `hubert-eff run` converts other rates. Output is one frame per 20 ms.",
        "Hidden states are features for a task's own head; the file has neither head nor label embeddings, and cannot be trained on."
        if packed
        else "Hidden states are features for a task's own head; the label embeddings of pre-training are left out.",
        "Nothing is known here of who is misrepresented in the training data: test on the voices it is meant for.",
    ]
    if config["extractor_mode"] == "default":
        limits.append("Its extractor normalises over the whole recording: padding a batch changes features.")
    if packed:
        limits.append("Kernels for AVX-512, AVX2 and NEON are compiled at first use; without a C++ compiler it computes the same, slowly.")
    if dtype == "bf16":
        limits.append("bfloat16 is fast on processors that have it (AVX-512 BF16, AMX); on others fp16 files of the same size are faster.")
    return "\n".join([
        f"# {Path(name).stem}", "",
        f"A HuBERT of hubert-eff: {rows['encoder']}; {kind}.", "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), "",
        "## Use", "",
        "```python", "import torch, hubert_eff", "",
        f'model = hubert_eff.load("{name}")', "states, padding = model.hidden_states(torch.randn(1, 16000))", "```", "",
        "```", f"hubert-eff run {name} AUDIO --out features.npz", "```", "",
        "## Origin", "",
        "| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in origin.items()), "",
        "## Limits", "", *(f"- {line}" for line in limits), "",
    ])  # fmt: skip


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
