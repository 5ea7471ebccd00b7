"""`hubert_eff_ctc` and `hubert_eff_aed`: fine-tuning of a pre-trained model with a CTC layer, and also with an attention decoder."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Optional  # (fairseq reads the types of a dataclass by these names)

from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from omegaconf import II

import hubert_eff
from hubert_eff.config import HubertConfig
from hubert_eff.encoders.registry import preset_config
from hubert_eff.errors import UserError
from hubert_eff.quant.storage import is_packed
from hubert_eff.recognition.model import TRAINING_KEYS, Recognizer, RecognizerConfig

_START = {
    "w2v_path": "checkpoint or export of a pre-trained model to start from, of this plug-in or of stock HuBERT; not saved in checkpoints",
    "preset": "start from random weights of this preset instead",
}


def recognizer_config(name: str) -> type[FairseqDataclass]:
    """fairseq's dataclass: where to start, the recognizer's keys (of the decoder for `hubert_eff_aed` only), encoder keys to change."""
    fields: list[Any] = [
        (key, Optional[str], dataclasses.field(default=None, metadata={"help": text}))  # noqa: UP045
        for key, text in _START.items()
    ]
    types = typing.get_type_hints(RecognizerConfig)
    for field in dataclasses.fields(RecognizerConfig):
        if name == "hubert_eff_ctc" and (field.name.startswith("decoder_") or field.name in ("ctc_weight", "label_smoothing")):
            continue
        default = 6 if field.name == "decoder_layers" else field.default
        metadata = {key: value for key, value in field.metadata.items() if value}
        fields.append((field.name, types[field.name], dataclasses.field(default=default, metadata=metadata)))
    types = typing.get_type_hints(HubertConfig)
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(HubertConfig)}
    for key in TRAINING_KEYS:
        default = II("common.seed") if key == "seed" else None
        metadata = {"help": f"{helps[key]} (null: as pre-trained)"}
        fields.append((key, Optional[types[key]], dataclasses.field(default=default, metadata=metadata)))  # noqa: UP045
    return dataclasses.make_dataclass(f"Fairseq{name.title().replace('_', '')}Config", fields, bases=(FairseqDataclass,))


class FairseqRecognizer(Recognizer, BaseFairseqModel):
    """`Recognizer` with fairseq's interface."""

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> FairseqRecognizer:
        """Build; at the start of fine-tuning with the weights of `w2v_path`."""
        keys = [field.name for field in dataclasses.fields(RecognizerConfig) if field.name in cfg]
        config = RecognizerConfig.from_dict({key: cfg[key] for key in keys})
        pretrained = None
        if not config.encoder_config:
            if bool(cfg.w2v_path) == bool(cfg.preset):
                raise UserError("set one of model.w2v_path, the pre-trained checkpoint to start from, and model.preset, for random weights")
            if cfg.w2v_path:
                pretrained = hubert_eff.load(cfg.w2v_path)
                if pretrained.fused or is_packed(pretrained):
                    form = "fused" if pretrained.fused else "packed"
                    raise UserError(f"model.w2v_path={cfg.w2v_path} is {form} for inference and cannot be trained: give its source")
            base = preset_config(cfg.preset) if pretrained is None else pretrained.config
            changed = {key: cfg[key] for key in TRAINING_KEYS if cfg[key] is not None}
            config.describe(type(base).from_dict({**base.to_dict(), **changed}))
        if not config.letters:
            config.letters = task.alphabet.letters
            config.sentencepiece = task.alphabet.pieces.packed if task.alphabet.pieces is not None else ""
        model = cls(config)
        if pretrained is not None:
            own = model.hubert.state_dict()
            weights = {key: value for key, value in pretrained.state_dict().items() if key in own and own[key].shape == value.shape}
            # a codebook head may have another number of projections; everything else is the same by its configuration
            model.hubert.load_state_dict({**{key: value for key, value in own.items() if key.startswith("final_proj")}, **weights})
        model.hubert.final_proj.requires_grad_(False)  # not used here
        model.ctc_proj.requires_grad_(model.learns_ctc)
        return model


for _name in ("hubert_eff_ctc", "hubert_eff_aed"):
    register_model(_name, dataclass=recognizer_config(_name))(type(f"Fairseq{_name.title().replace('_', '')}", (FairseqRecognizer,), {}))
