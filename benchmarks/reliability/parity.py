"""Compares hidden states with those of the libraries from which models are read, or for which they are written.

    python benchmarks/reliability/parity.py                  # two blocks of 64 channels
    python benchmarks/reliability/parity.py --published      # the published sizes, some minutes and 6 GB of memory

Each model has random weights, all of which are moved so that none is 0 or 1. Two recordings of noise, 1 s and 0.7 s, share a batch, with a
padding mask where the other library has one. The figure is the largest difference of any number in any hidden state, on valid frames,
beside the largest number. Models are read from files as a user has them, and written models are read by the other library.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hubert_eff
from hubert_eff.encoders.registry import preset_config
from hubert_eff.exporting.huggingface import export_folder

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "conv_dim": [48] * 7,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
DISTILLED = {"num_hidden_layers": 2, "feat_proj_layer_norm": False}
STATES = "every hidden state"


@dataclass(frozen=True)
class Row:
    """The largest difference, and the largest number, of what is compared."""

    way: str
    model: str
    by: str
    compared: str
    difference: float
    largest: float


def recordings() -> tuple[Tensor, Tensor]:
    """Audio (2, S) and its padding."""
    wav, padding = 0.1 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(1)), torch.zeros(2, 16_000, dtype=torch.bool)
    padding[1, 11_200:] = True
    return wav.masked_fill(padding, 0.0), padding


def shaken(model: nn.Module) -> Any:
    """The model in eval mode, with every parameter moved."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def row(way: str, model: str, by: str, ours: Sequence[Tensor], theirs: Sequence[Tensor], padding: Tensor, compared: str = STATES) -> Row:
    if len(ours) != len(theirs):
        raise SystemExit(f"{model}: {len(ours)} states and {len(theirs)}")
    apart = max(float((a - b)[~padding].abs().max()) for a, b in zip(ours, theirs, strict=True))
    return Row(way, model, by, compared, apart, max(float(b[~padding].abs().max()) for b in theirs))


def of_transformers(published: bool, folder: Path) -> Iterator[Row]:
    """HuBERT and wav2vec 2.0 as `save_pretrained` writes them."""
    import transformers

    wav, padding = recordings()
    for title, kind, keys in (
        ("HuBERT base", "Hubert", {}), ("HuBERT large", "Hubert", {**STABLE, **LARGE}), ("DistilHuBERT", "Hubert", DISTILLED),
        ("wav2vec 2.0 base", "Wav2Vec2", {}), ("wav2vec 2.0 large", "Wav2Vec2", {**STABLE, **LARGE}),
    ):  # fmt: skip
        sizes = keys if published else {**keys, **SMALL}
        model = shaken(getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)))
        model.save_pretrained(folder / title)
        theirs = model(wav, attention_mask=(~padding).long(), output_hidden_states=True).hidden_states
        states, frames = hubert_eff.load(folder / title).hidden_states(wav, padding)
        yield row("in", title, "transformers", states, theirs, frames)


def of_torchaudio(published: bool, folder: Path) -> Iterator[Row]:
    """State dicts; of the Transformer's outputs, which is what torchaudio gives."""
    import torchaudio

    wav, padding = recordings()
    small = {
        "extractor_conv_layer_config": [(48, 10, 5), *[(48, 3, 2)] * 4, *[(48, 2, 2)] * 2], "encoder_embed_dim": 64,
        "encoder_pos_conv_kernel": 16, "encoder_pos_conv_groups": 4, "encoder_num_layers": 2, "encoder_num_heads": 4,
        "encoder_ff_interm_features": 128,
    }  # fmt: skip
    sizes = {
        "extractor_conv_layer_config": None, "extractor_conv_bias": False, "encoder_embed_dim": 768, "encoder_projection_dropout": 0.1,
        "encoder_pos_conv_kernel": 128, "encoder_pos_conv_groups": 16, "encoder_num_layers": 12, "encoder_num_heads": 12,
        "encoder_attention_dropout": 0.1, "encoder_ff_interm_features": 3072, "encoder_ff_interm_dropout": 0.0, "encoder_dropout": 0.1,
        "encoder_layer_drop": 0.0, "aux_num_out": None, "extractor_mode": "group_norm", "encoder_layer_norm_first": False,
        **({} if published else small),
    }  # fmt: skip
    model = shaken(torchaudio.models.wav2vec2_model(**sizes))
    torch.save({"arguments": sizes, "state_dict": model.state_dict()}, folder / "torchaudio.pt")
    theirs, _ = model.extract_features(wav, (~padding).sum(1))
    states, frames = hubert_eff.load(folder / "torchaudio.pt").hidden_states(wav, padding)
    yield row("in", "HuBERT base", "torchaudio", states[1:], theirs, frames, "outputs of the blocks")


def of_s3prl(published: bool, folder: Path) -> Iterator[Row]:
    """What S3PRL's converter writes of fairseq's checkpoint."""
    from s3prl.upstream.hubert.hubert_model import HubertConfig, HubertModel, HubertPretrainingConfig

    wav, padding = recordings()
    small = {
        "encoder_layers": 2, "encoder_embed_dim": 64, "encoder_ffn_embed_dim": 128, "encoder_attention_heads": 4, "conv_pos": 16,
        "conv_pos_groups": 4, "conv_feature_layers": "[(48,10,5)] + [(48,3,2)] * 4 + [(48,2,2)] * 2",
    }  # fmt: skip
    cfg = HubertConfig(label_rate=50.0, final_dim=256, **({} if published else small))
    model = shaken(HubertModel(cfg, HubertPretrainingConfig(sample_rate=16_000), [["a", "b", "c"]]))
    values = {key: value.value if hasattr(value, "value") else value for key, value in asdict(cfg).items()}
    content = {"task_cfg": {"sample_rate": 16_000, "normalize": False}, "model_cfg": values, "model_weight": model.state_dict()}
    torch.save({**content, "dictionaries_symbols": [["a", "b", "c"]]}, folder / "s3prl.pt")
    theirs = [model.extract_features(wav, padding, mask=False, output_layer=layer)[0] for layer in range(1, cfg.encoder_layers + 1)]
    states, frames = hubert_eff.load(folder / "s3prl.pt").hidden_states(wav, padding)
    yield row("in", "HuBERT base (fairseq)", "S3PRL", states[1:], theirs, frames, "outputs of the blocks")


def for_transformers(published: bool, folder: Path) -> Iterator[Row]:
    """Folders of `hubert-eff export --hf`, read by AutoModel."""
    import transformers

    import hubert_eff.hf  # noqa: F401  (registers the classes of other encoders)
    from hubert_eff.recognition import Recognizer, RecognizerConfig

    wav, padding = recordings()
    names = [
        "transformer-base", "conformer-s", "squeezeformer-xs", "sparseformer-dn-s", "fusionformer-s", "zipformer-s", "conformer-s+w1a1"
    ]  # fmt: skip
    if not published:
        names = [re.sub(r"-[^+]*", "-debug", name) for name in names]
    for name in names:
        model = shaken(hubert_eff.build(name))
        if "+" in name:
            model.train().hidden_states(wav, padding)  # the first batch sets the scales
            model.eval()
        export_folder(model, folder / name)
        loaded = transformers.AutoModel.from_pretrained(folder / name)
        theirs = loaded(wav, attention_mask=(~padding).long(), output_hidden_states=True).hidden_states
        states, frames = (hubert_eff.load(folder / name) if "+" in name else model).hidden_states(wav, padding)
        yield row("out", name, type(loaded).__name__, states, theirs, frames)
    config = RecognizerConfig(letters="|ABCDEFGHIJ")
    config.describe(preset_config(names[0]))
    recognizer = shaken(Recognizer(config))
    export_folder(recognizer, folder / "ctc")
    encoded, frames = recognizer.encode(wav, padding)
    ctc = transformers.AutoModelForCTC.from_pretrained(folder / "ctc")
    scores = ctc(wav, attention_mask=(~padding).long()).logits.log_softmax(-1)
    yield row(
        "out", "transformer, CTC layer", type(ctc).__name__, [recognizer.ctc_log_probs(encoded)], [scores], frames, "log probabilities"
    )


PARTS: tuple[Callable[[bool, Path], Iterator[Row]], ...] = (of_transformers, of_torchaudio, of_s3prl, for_transformers)


def parity(published: bool = False) -> list[Row]:
    """All rows."""
    found = []
    for part in PARTS:
        with tempfile.TemporaryDirectory() as name, torch.no_grad():
            found += list(part(published, Path(name)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--published", action="store_true", help="models of the published sizes")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    rows = parity(args.published)
    if args.json:
        print(json.dumps([asdict(r) for r in rows], indent=2))
        return 0
    print("| | model | other side | compared | largest difference | largest number |\n|---|---|---|---|---:|---:|")
    for r in rows:
        print(f"| {r.way} | {r.model} | {r.by} | {r.compared} | {r.difference:.1e} | {r.largest:.1f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
