"""Conformer-S, inference and training: our blocks against fairseq's layers (relative positions) and torchaudio's (absolute ones).

    python benchmarks/speed/conformer.py [--seconds 30] [--threads 1]

fairseq's ConformerEncoder cannot run in this version; its layer can, and is stacked here. Both sides hold the same weights, and
their outputs are compared before anything is timed. Training is forward and backward in train mode with the preset's dropout; both
sides run at the same precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import torch
import torchaudio
from fairseq.modules.positional_encoding import RelPositionalEncoding
from stock import conformer_layers
from torch import Tensor, nn

import hubert_eff

TARGETS = {("fairseq", False): 4.0, ("fairseq", True): 2.5, ("torchaudio", False): 1.7, ("torchaudio", True): 1.2}


class FairseqStack(nn.Module):
    """fairseq's Conformer layers with relative positions, one after the other, on (B, T, D)."""

    NAMES = {"linear_q": "q_proj", "linear_k": "k_proj", "linear_v": "v_proj", "linear_out": "out_proj"}
    OURS = {"pos_enc_type": "rel_pos"}

    def __init__(self, config) -> None:
        super().__init__()
        self.positions = RelPositionalEncoding(2048, config.encoder_embed_dim)
        self.layers = conformer_layers(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        positions = self.positions(x)
        for layer in self.layers:
            x, _ = layer(x, position_emb=positions)
        return x.transpose(0, 1)

    def renamed(self) -> dict[str, Tensor]:
        """Its weights under the names of our blocks."""
        state = {}
        for name, value in self.layers.state_dict().items():
            for theirs, mine in self.NAMES.items():
                name = name.replace(theirs, mine)
            state[name] = value
        return state


class TorchaudioStack(nn.Module):
    """torchaudio's Conformer on (B, T, D)."""

    OURS = {"pos_enc_type": "abs", "conv_module_bias": True}

    def __init__(self, config) -> None:
        super().__init__()
        self.model = torchaudio.models.Conformer(
            config.encoder_embed_dim,
            config.encoder_attention_heads,
            config.encoder_ffn_embed_dim,
            config.encoder_layers,
            config.depthwise_conv_kernel_size,
            dropout=config.dropout,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, torch.tensor([x.size(1)]))[0]

    def renamed(self) -> dict[str, Tensor]:
        """Its weights under the names of our blocks."""
        state: dict[str, Tensor] = {}
        for i, layer in enumerate(self.model.conformer_layers):
            conv = layer.conv_module.sequential
            parts: dict[str, nn.Module] = {
                "self_attn.out_proj": layer.self_attn.out_proj, "self_attn_layer_norm": layer.self_attn_layer_norm,
                "final_layer_norm": layer.final_layer_norm, "conv_module.layer_norm": layer.conv_module.layer_norm,
                "conv_module.pointwise_conv1": conv[0], "conv_module.depthwise_conv": conv[2], "conv_module.batch_norm": conv[3],
                "conv_module.pointwise_conv2": conv[5],
            }  # fmt: skip
            for name, ff in (("ffn1", layer.ffn1.sequential), ("ffn2", layer.ffn2.sequential)):
                parts |= {f"{name}.layer_norm": ff[0], f"{name}.w_1": ff[1], f"{name}.w_2": ff[4]}
            for name, part in parts.items():
                state |= {f"{i}.{name}.{key}": value for key, value in part.state_dict().items()}
            for key in ("weight", "bias"):
                joint = getattr(layer.self_attn, f"in_proj_{key}").detach()
                state |= {f"{i}.self_attn.{n}_proj.{key}": value for n, value in zip("qkv", joint.chunk(3), strict=True)}
        return state


class OurStack(nn.Module):
    """The encoder's blocks without its positional convolution and LayerNorm, as the other sides have none."""

    def __init__(self, encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        frames = self.encoder.frames(x)
        for block in self.encoder.layers:
            x = block(x, frames)
        return x


def pair(peer: type[FairseqStack] | type[TorchaudioStack]) -> tuple[nn.Module, OurStack]:
    """A peer and our blocks with its weights."""
    model = hubert_eff.build("conformer-s", **peer.OURS)
    stock, ours = peer(model.config), OurStack(model.encoder)
    shapes = ours.encoder.layers.state_dict()
    # pointwise convolutions are linear layers here
    ours.encoder.layers.load_state_dict({name: value.reshape(shapes[name].shape) for name, value in stock.renamed().items()})
    return stock, ours


def inference(side: nn.Module, x: Tensor) -> Callable[[], object]:
    """One forward pass without gradient."""

    def run() -> None:
        with torch.no_grad():
            side.eval()(x)

    return run


def training(side: nn.Module, x: Tensor) -> Callable[[], object]:
    """One forward and backward pass."""
    direction = torch.randn_like(x)  # the gradient of a sum of LayerNorm's outputs would vanish

    def run() -> None:
        side.train().zero_grad(set_to_none=True)
        side(x.clone().requires_grad_()).mul(direction).sum().backward()

    return run


def rows(seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Check that both sides compute the same, and time them."""
    result = []
    for name, peer, kind in (("fairseq", FairseqStack, "relative"), ("torchaudio", TorchaudioStack, "absolute")):
        stock, ours = pair(peer)
        x = torch.randn(1, int(seconds * 50) - 1, 144)
        with torch.no_grad():
            error = float((stock.eval()(x) - ours.eval()(x)).abs().max())
        assert error < 1e-4, f"the two sides differ by {error}: there is nothing to compare"
        for train in (False, True):
            make = training if train else inference
            times = harness.compare({name: make(stock, x), "hubert_eff": make(ours, x)}, rounds)
            what = f"Conformer-S, {kind} positions, {seconds:g} s, {'forward + backward' if train else 'inference'}"
            result.append(harness.row(what, times, TARGETS[name, train]))
    return result


def main() -> None:
    """Time, print."""
    options = harness.parser(__doc__.splitlines()[0])
    options.add_argument("--seconds", type=float, default=30.0, help="length of the input (default: 30)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    before = harness.guard("before the run")
    result = rows(args.seconds, args.rounds)
    facts = harness.machine() | {"probe": [round(before, 1), round(harness.guard("after the run"), 1)]}
    harness.show(result, facts, args.json)


if __name__ == "__main__":
    main()
