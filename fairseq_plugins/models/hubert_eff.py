"""`hubert_<encoder>` in fairseq for every registered encoder; a new encoder needs no line here."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from omegaconf import II

from hubert_eff.encoders.registry import EncoderEntry, get_encoder, list_encoders
from hubert_eff.models.hubert import HubertModel

# keys that other groups of a fairseq config decide
_INTERPOLATED = {"label_rate": II("task.label_rate"), "normalize": II("task.normalize"), "seed": II("common.seed")}


def fairseq_config(entry: EncoderEntry) -> type[FairseqDataclass]:
    """Make fairseq's dataclass of an encoder: the fields of the encoder's config with the same defaults and help.

    It does not inherit the config's checks: its defaults are interpolations such as `${task.label_rate}` until fairseq has
    resolved them, and `build_model` checks the values when it makes the encoder's config from them.
    """
    types = typing.get_type_hints(entry.config)
    fields = []
    for field in dataclasses.fields(entry.config):
        default = _INTERPOLATED.get(field.name, field.default)
        # argparse, behind fairseq-train, would take an empty tuple of choices for "nothing is allowed"
        metadata = {key: value for key, value in field.metadata.items() if value}
        fields.append((field.name, types[field.name], dataclasses.field(default=default, metadata=metadata)))
    return dataclasses.make_dataclass(f"FairseqHubert{entry.name.title()}Config", fields, bases=(FairseqDataclass,))


def fairseq_model(entry: EncoderEntry) -> type[BaseFairseqModel]:
    """The model class of an encoder: `HubertModel` with fairseq's interface, so that parameter names have no prefix."""

    def build_model(cls: Any, cfg: Any, task: Any) -> BaseFairseqModel:
        config = entry.config.from_dict({field.name: cfg[field.name] for field in dataclasses.fields(entry.config)})
        return cls(config, num_classes=[len(dictionary) for dictionary in task.dictionaries])

    return type(
        f"FairseqHubert{entry.name.title()}",
        (HubertModel, BaseFairseqModel),
        {"build_model": classmethod(build_model), "__doc__": f"HuBERT with the encoder `{entry.name}`.", "__module__": __name__},
    )


for _name in list_encoders():
    _entry = get_encoder(_name)
    register_model(f"hubert_{_name}", dataclass=fairseq_config(_entry))(fairseq_model(_entry))
