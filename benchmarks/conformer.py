"""Conformer-S with relative positions, forward and backward: our blocks against a stack of fairseq's Conformer layers.

    python benchmarks/conformer.py [--seconds 10] [--threads 1]

fairseq's ConformerEncoder cannot run in this version; its layer can, and is stacked here. Both sides hold the same weights, and
their outputs are compared before anything is timed. Both are in train mode with the preset's dropout, at the same precision.
"""

from __future__ import annotations

import harness
import torch
from fairseq.modules.conformer_layer import ConformerWav2Vec2EncoderLayer
from fairseq.modules.positional_encoding import RelPositionalEncoding
from torch import Tensor, nn

import hubert_eff
from hubert_eff.encoders.base import Frames

TARGET = 1.5
NAMES = {"linear_q": "q_proj", "linear_k": "k_proj", "linear_v": "v_proj", "linear_out": "out_proj"}


class FairseqStack(nn.Module):
    """fairseq's Conformer layers, one after the other, on (B, T, D)."""

    def __init__(self, config) -> None:
        super().__init__()
        self.positions = RelPositionalEncoding(2048, config.encoder_embed_dim)
        self.layers = nn.ModuleList(
            ConformerWav2Vec2EncoderLayer(
                embed_dim=config.encoder_embed_dim,
                ffn_embed_dim=config.encoder_ffn_embed_dim,
                attention_heads=config.encoder_attention_heads,
                dropout=config.dropout,
                use_fp16=False,
                depthwise_conv_kernel_size=config.depthwise_conv_kernel_size,
                attn_type="espnet",
                pos_enc_type="rel_pos",
            )
            for _ in range(config.encoder_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        positions = self.positions(x)
        for layer in self.layers:
            x, _ = layer(x, position_emb=positions)
        return x.transpose(0, 1)


class OurStack(nn.Module):
    """The encoder's blocks without its positional convolution and LayerNorm, as the other side has none."""

    def __init__(self, encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        frames = Frames(positions=self.encoder.positions(x))
        for block in self.encoder.layers:
            x = block(x, frames)
        return x


def copy_weights(stock: FairseqStack, ours: OurStack) -> None:
    """Give our blocks the weights of fairseq's layers."""
    shapes = ours.encoder.layers.state_dict()
    state = {}
    for name, value in stock.layers.state_dict().items():
        for theirs, mine in NAMES.items():
            name = name.replace(theirs, mine)
        state[name] = value.reshape(shapes[name].shape)  # pointwise convolutions are linear layers here
    ours.encoder.layers.load_state_dict(state)


def main() -> None:
    """Check that both sides compute the same, time them, print."""
    options = harness.parser(__doc__.splitlines()[0])
    options.add_argument("--seconds", type=float, default=10.0, help="length of the input (default: 10)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    before = harness.guard("before the run")

    model = hubert_eff.build("conformer-s")
    stock, ours = FairseqStack(model.config), OurStack(model.encoder)
    copy_weights(stock, ours)
    x = torch.randn(1, model.num_frames(round(args.seconds * 16_000)), model.config.encoder_embed_dim)
    with torch.no_grad():
        error = float((stock.eval()(x) - ours.eval()(x)).abs().max())
    assert error < 1e-4, f"the two sides differ by {error}: there is nothing to compare"
    direction = torch.randn_like(x)  # the gradient of a sum of LayerNorm's outputs would vanish

    def step(side: nn.Module) -> None:
        side.zero_grad(set_to_none=True)
        side(x.requires_grad_()).mul(direction).sum().backward()

    stock.train(), ours.train()
    times = harness.compare({"fairseq": lambda: step(stock), "hubert_eff": lambda: step(ours)}, args.rounds)
    after = harness.guard("after the run")
    facts = harness.machine() | {"largest_difference": error, "probe": [round(before, 1), round(after, 1)]}
    what = f"Conformer-S, relative positions, {args.seconds:g} s, forward + backward"
    harness.show([harness.row(what, times, TARGET)], facts, args.json)


if __name__ == "__main__":
    main()
