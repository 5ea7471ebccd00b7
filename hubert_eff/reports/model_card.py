"""Writes model cards in Markdown: content, cost, loading, origin and limits of a file."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

from ..checkpoints.huggingface import CONFIG, OWN, WEIGHTS
from ..checkpoints.load import load
from ..checkpoints.safetensors import DTYPES, EDGE, PACKED, TRAINING, read_export, read_metadata
from ..edge import FORMS, HALF
from ..models.hubert import HubertModel
from ..profiling import profile
from ..quant.quantization import INT8
from ..utils.files import write_text

SECONDS = 10.0
README = "README.md"
# the Hub's names for licenses
LICENSES = (
    "apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0", "cc-by-nd-4.0", "openrail",
)  # fmt: skip


def write_card(file: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Write the card of an export beside it; returns its path and its figures.

    The file is read back and profiled, so the card describes what others will load.
    """
    path = Path(file)
    metadata, model = read_metadata(path), read_export(path)
    figures = _figures(path, metadata, model)
    card = path.with_suffix(".md")
    use = [
        "```python", "import torch, hubert_eff", "",
        f'model = hubert_eff.load("{path.name}")', "states, padding = model.hidden_states(torch.randn(1, 16000))", "```", "",
        "```", f"hubert-eff run {path.name} AUDIO --out features.npz", "```",
    ]  # fmt: skip
    write_text(card, _text(path.stem, path.name, metadata, figures, use))
    return card, figures


def write_readme(folder: str | os.PathLike[str], metadata: Mapping[str, str], base_model: str = "") -> tuple[Path, dict[str, Any]]:
    """Write README.md of a folder of Hugging Face, with metadata for the Hub; returns its path and its figures.

    metadata: what `hubert_eff.exporting.huggingface.export_folder` returns; base_model: the model that it was trained from.
    """
    path = Path(folder)
    model, values = load(path), json.loads((path / CONFIG).read_text(encoding="utf-8"))
    file = path / WEIGHTS[0]
    figures = _figures(file, metadata, model)
    kind, own = values["architectures"][0], values["model_type"] == OWN
    if not own:  # without the parts for pre-training, with a CTC layer
        with safe_open(file, framework="pt") as stream:
            sizes = [torch.Size(stream.get_slice(name).get_shape()).numel() for name in stream.keys()]  # noqa: SIM118 (not a mapping)
        width = DTYPES[metadata["dtype"]].itemsize
        figures.update(params=sum(sizes), file_mb=sum(sizes) * width / 1e6)
    auto = "AutoModelForCTC" if kind.endswith("ForCTC") else "AutoModel"
    use = [
        "```python", *(["import hubert_eff.hf  # registers the model's classes: pip install 'hubert-eff[hf]'"] if own else []),
        f"from transformers import AutoFeatureExtractor, {auto}", "",
        f'model = {auto}.from_pretrained("DIR")', 'extractor = AutoFeatureExtractor.from_pretrained("DIR")',
        'batch = extractor(recordings, sampling_rate=16000, padding=True, return_tensors="pt")  # arrays of samples',
        "output = model(**batch, output_hidden_states=True)", "```", "",
        "`pipeline(\"automatic-speech-recognition\", model=\"DIR\")` transcribes." if auto != "AutoModel"
        else "`pipeline(\"feature-extraction\", model=\"DIR\")` takes arrays of samples, and gives the last hidden state.",
        *(["", "Without that import, `trust_remote_code=True` has the same classes imported."] if own else []),
    ]  # fmt: skip
    front = {
        **_license(metadata.get("license", "")),
        "library_name": "hubert-eff" if own else "transformers",
        "pipeline_tag": "feature-extraction" if auto == "AutoModel" else "automatic-speech-recognition",
        "tags": ["speech", "hubert", *(["one-bit"] if metadata["weights"] == PACKED else [])],
        "datasets": [part for part in (" ".join(text.split()) for text in metadata.get("trained_on", "").split(",")) if part],
        "metrics": [] if auto == "AutoModel" else ["wer"],
        **({"base_model": base_model} if base_model else {}),
    }
    text = "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---\n\n"
    write_text(path / README, text + _text(path.resolve().name, "DIR", metadata, figures, use))
    return path / README, figures


def _license(said: str) -> dict[str, str]:
    """A license in the Hub's notation."""
    name = "-".join(said.lower().split())
    if not name:
        return {"license": "unknown"}
    return {"license": name} if name in LICENSES else {"license": "other", "license_name": name}


def _figures(file: Path, metadata: Mapping[str, str], model: HubertModel) -> dict[str, Any]:
    cost = profile(model, SECONDS)
    return {
        "bytes": file.stat().st_size,
        "file_mb": cost.storage_mb["file"],
        "weights": metadata["weights"],
        "dtype": metadata["dtype"],
        "params": cost.params,
        "macs": cost.macs,
        "macs_by_bits": {f"{weight}x{activation}": macs for (weight, activation), macs in sorted(cost.macs_by_bits.items(), reverse=True)},
    }


def _text(name: str, file: str, metadata: Mapping[str, str], figures: dict[str, Any], use: list[str]) -> str:
    config, training = json.loads(metadata["config"]), _cell(metadata.get(TRAINING, ""))
    packed, dtype = metadata["weights"] == PACKED, metadata["dtype"]
    kind = "one-bit weights and activations (W1A1), packed" if packed else "float weights"
    int8 = metadata["weights"] == INT8
    if int8:
        kind = "int8 weights, a scale per output, of the encoder's linear layers, whose inputs are quantized per frame; the rest float"
    if not packed and config["quant"] != "none":
        kind = f"float weights of a model that runs at {config['quant']} in simulation"
    rest = {"fp32": "float32", "fp16": "float16, computed in float32", "bf16": "bfloat16, computed in bfloat16"}[dtype]
    edge = metadata.get(EDGE, "")
    if edge == HALF:
        rest = "float16, computed in float16"
    rows = {
        "encoder": f"{metadata['encoder']}, {config['encoder_layers']} blocks, D {config['encoder_embed_dim']}",
        "weights": kind + (f", policy `{metadata['policy']}`" if metadata["policy"] else ""),
        **({"layout": FORMS[edge]} if edge else {}),
        "float tensors": rest,
        **({"streams": _streams(config, file, bool(training))} if config.get("streaming") else {}),
        "file": f"{figures['bytes'] / 1e6:.3f} MB, of which tensors {figures['file_mb']:.3f} MB",
        "parameters": f"{figures['params']:,}",
        f"multiply-accumulates, {SECONDS:g} s of audio": f"{figures['macs']:,}",
        **{f"of them {bits.replace('x', ' x ')} bit": f"{macs:,}" for bits, macs in figures["macs_by_bits"].items()},
    }
    origin = {
        "made from": metadata["source"] or "not stated",
        "written by": f"hubert-eff {metadata['package_version']}, format {metadata['format_version']}; this card: {datetime.date.today()}",
        "trained on": metadata.get("trained_on", "not stated"),
        "license of the weights": metadata.get("license", "not stated: ask whoever gave you this file"),
    }
    limits = [
        "Input is 16 kHz mono; `hubert-eff run` converts other rates. Output is one frame per 20 ms.",
        "Hidden states are features for a task's own head; the file has neither head nor label embeddings, and cannot be trained on."
        if packed or int8
        else "Hidden states are features for a task's own head; the label embeddings of pre-training are left out.",
        "It is unknown who is misrepresented in the training data: test on the voices that the model is meant for.",
    ]
    if config["extractor_mode"] == "default":
        limits.append("Its extractor normalizes over the whole recording: padding a batch changes features.")
    if packed:
        limits.append("Kernels for AVX-512, AVX2 and NEON are compiled at first use; without a C++ compiler it computes the same slowly.")
    if int8:
        limits.append(
            "int8 is fast on processors with VNNI or AMX; on others torch's dynamic quantization runs, with slightly different results."
        )
    if dtype == "bf16":
        limits.append("bfloat16 is fast on processors that have it (AVX-512 BF16, AMX); on others fp16 files of the same size are faster.")
    return "\n".join([
        f"# {name}", "",
        f"A HuBERT of hubert-eff: {rows['encoder']}; {kind}.", "",
        *([f"**weights: {training}.** They show size and speed; what the model computes means nothing.", ""] if training else []),
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), "",
        "## Use", "", *use, "",
        "## Origin", "",
        "| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in origin.items()), "",
        "## Limits", "", *(f"- {line}" for line in limits), "",
    ])  # fmt: skip


def _streams(config: Mapping[str, Any], file: str, untrained: bool) -> str:
    """How a model that streams was trained for it, and the command."""
    sizes, left = str(config["chunk_sizes"]), str(config["left_chunks"])
    trained = f"trained with chunks of {sizes} frames (0: the whole utterance), left chunks {left} (-1: all)"
    if untrained or not sizes:
        trained = "not trained with chunks"
    return f"yes; {trained}; `hubert-eff run {file} - --stream 16-4`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
