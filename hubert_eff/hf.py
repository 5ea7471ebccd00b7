"""Models of this package in transformers: `import hubert_eff.hf` registers them for AutoConfig and AutoModel.

import hubert_eff.hf
from transformers import AutoModel

model = AutoModel.from_pretrained("DIR")  # what `hubert-eff export MODEL --hf DIR` wrote
"""

# B batch, S samples at 16 kHz, T frames of 20 ms, D model dim, L blocks

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoints.huggingface import OWN, WEIGHTS
from .checkpoints.safetensors import read_export
from .encoders.registry import encoder_of, stored_config
from .errors import UserError, missing_extra
from .exporting.huggingface import export_folder
from .models.hubert import HubertModel
from .quant.storage import is_packed

try:
    from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput
    from transformers.utils import cached_file
except ImportError as error:
    raise missing_extra("transformers", "hf", "hubert_eff.hf") from error

# arguments of `from_pretrained` that say where to find a folder
_FINDING = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class HubertEffConfig(PretrainedConfig):
    """The configuration of a model: the name of the encoder, and the keys of its configuration."""

    model_type = OWN

    def __init__(self, encoder: str = "transformer", encoder_config: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        config = stored_config(encoder, encoder_config or {})
        self.encoder, self.encoder_config = encoder, config.to_dict()
        self.hidden_size, self.num_hidden_layers = config.encoder_embed_dim, config.encoder_layers
        super().__init__(**{key: value for key, value in kwargs.items() if key not in ("hidden_size", "num_hidden_layers")})


class HubertEffModel(PreTrainedModel):
    """An encoder of this package, float or one-bit, with transformers' interface; `model` is the HubertModel itself."""

    config_class = HubertEffConfig
    main_input_name = "input_values"

    def __init__(self, config: HubertEffConfig, model: HubertModel | None = None) -> None:
        super().__init__(config)
        self.model = HubertModel(stored_config(config.encoder, config.encoder_config)) if model is None else model

    @classmethod
    def of(cls, model: HubertModel) -> HubertEffModel:
        """Wrap an existing model."""
        return cls(HubertEffConfig(encoder_of(model.config).name, model.config.to_dict()), model)

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None, **_: Any,
    ) -> Any:  # fmt: skip
        """Compute `last_hidden_state` (B, T, D) and, if asked for, `hidden_states`, L + 1 of these.

        input_values (B, S); attention_mask (B, S), 0 on padding. Masks and LayerDrop are off, as in `HubertModel.hidden_states`.
        """
        states, _padding = self.model.hidden_states(input_values, None if attention_mask is None else attention_mask == 0)
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutput(last_hidden_state=states[-1], hidden_states=tuple(states) if asked else None)
        named = self.config.use_return_dict if return_dict is None else return_dict
        return output if named else output.to_tuple()

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *_: Any, config: HubertEffConfig | None = None, **kwargs: Any) -> HubertEffModel:
        """Read the model of a folder, or of a repository on the Hub, in eval mode. `dtype` is the dtype in which a float model computes.

        Raises `UserError` for a file that is not an export of this package, and for quantization by others.
        """
        if kwargs.get("quantization_config") is not None:
            raise UserError("models of hubert_eff cannot be quantized while they are read: use hubert_eff.binarize")
        found = cached_file(name, WEIGHTS[0], **{key: kwargs[key] for key in _FINDING if key in kwargs})
        model = read_export(Path(found))
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        if dtype not in (None, "auto") and not is_packed(model):
            model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        loaded = cls.of(model) if config is None else cls(config, model)
        loaded.name_or_path = str(name)
        loaded.eval()
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike[str], *_: Any, **__: Any) -> None:
        """Write what `from_pretrained` reads: the folder of `hubert-eff export --hf`, without its card."""
        export_folder(self.model, save_directory, packed=is_packed(self.model))


AutoConfig.register(OWN, HubertEffConfig, exist_ok=True)
AutoModel.register(HubertEffConfig, HubertEffModel, exist_ok=True)
