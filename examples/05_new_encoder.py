"""Add an encoder: a config, a block and one decorator; then it profiles, trains and binarizes as the others do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hubert_eff
from hubert_eff.config import Bounds, HubertConfig, option
from hubert_eff.encoders.base import Encoder, Frames
from hubert_eff.layers.kinds import DEPTHWISE, FEED_FORWARD, Kind


@dataclass
class MixerConfig(HubertConfig):
    """A key of its own, beside those of all encoders."""

    mixer_kernel: int = option(9, "kernel of the convolution over time, in frames", bounds=Bounds(least=1, odd=True))


class MixerBlock(nn.Module):
    """A convolution over time and a linear layer, with a residual connection."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        dim = config.encoder_embed_dim
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.conv = nn.Conv1d(dim, dim, config.mixer_kernel, padding="same", groups=dim)

    def kinds(self) -> Mapping[str, Kind]:  # what one bit is for; a part that is not named stays float
        return {"conv": Kind(DEPTHWISE), "out": Kind(FEED_FORWARD)}

    def forward(self, x: Tensor, frames: Frames) -> Tensor:  # x (B, T, D)
        y = self.norm(x)
        if frames.valid is not None:  # (B, T): padding must not reach valid frames
            y = y * frames.valid.unsqueeze(-1)
        return x + self.out(self.conv(y.transpose(1, 2)).transpose(1, 2))


SIZE = {"encoder_layers": 2, "encoder_embed_dim": 64, "encoder_attention_heads": 4, "conv_pos_groups": 4}


@hubert_eff.register_encoder("mixer", config=MixerConfig, presets={"mixer-debug": SIZE})
class MixerEncoder(Encoder):
    def build_block(self, config: MixerConfig, index: int) -> nn.Module:
        return MixerBlock(config)


print("encoders:", ", ".join(hubert_eff.list_encoders()))
for name in ("mixer-debug", "mixer-debug+w1a1"):
    cost = hubert_eff.profile(name, seconds=1.0)
    print(f"{name}: {cost.params:,} parameters, {cost.storage_mb['file']:.2f} MB")

torch.manual_seed(0)
model = hubert_eff.build("mixer-debug", num_classes=[20], mixer_kernel=5)
audio, labels = 0.1 * torch.randn(2, 16_000), [torch.randint(0, 20, (2, 50))]
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for update in range(3):
    model.set_num_updates(update)
    output = model(audio, labels)
    loss = F.cross_entropy(output.logits_m[0], output.targets_m[0])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"update {update}: loss {loss.item():.3f}")
