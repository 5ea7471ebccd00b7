"""A fused FusionFormer against our own Conformer of the same size, inference: float32 and int8, 10 s and streaming chunks.

    python benchmarks/speed/fusionformer.py [--frames 16 499] [--ffn 2048] [--pos-enc-type abs rel_pos]

Both sides are encoder blocks of 12 layers, D 256, 4 heads, kernel 15, in the same code and both through `hubert_eff.fuse`, which takes the
Conformer's BatchNorm too, joins its projections and lays out its weights. What differs is what FusionFormer changes: LayerNorm,
SiLU -> ReLU, GLU -> ReLU, and the first pointwise convolution's width, D (`--expansion 1`) instead of the Conformer's 2D. `--expansion 2`
has the Conformer's width in the whole convolution module. The Conformer comes with the absolute positions that FusionFormer has, and
with the relative ones that are its own default. int8 is torch's dynamic quantization of all linear layers of the blocks.
"""

from __future__ import annotations

from collections import defaultdict

import harness
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import hubert_eff
from hubert_eff.encoders.base import Encoder
from hubert_eff.quant.quantization import int8_linears

TARGETS = {"float32": 1.15, "int8": 1.25}
KINDS = {  # what an operation's name begins with -> kind; the rest is "other"
    "linear": ("mkldnn::_linear", "quantized::linear", "aten::addmm", "aten::mm", "aten::linear"),
    "attention": ("aten::_scaled_dot", "aten::_softmax"),
    "depthwise": ("aten::mkldnn_convolution", "aten::_convolution", "aten::convolution"),
    "LayerNorm": ("aten::native_layer_norm", "aten::layer_norm"),
    "activation": ("aten::silu", "aten::glu", "aten::relu", "aten::clamp_min"),
}


def run(encoder: Encoder, x: Tensor) -> Tensor:
    """The blocks on x (1, T, D), without what lies before and after them, which is the same on both sides."""
    frames = encoder.frames(x)
    for block in encoder.layers:
        x = block(x, frames)
    return x


def fused(preset: str, **keys: object) -> Encoder:
    """The encoder, fused. Its output is that of the encoder it was made from."""
    encoder = hubert_eff.build(preset, **keys).eval().encoder
    for module in encoder.modules():  # statistics that are not those of a fresh BatchNorm
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    result = hubert_eff.fuse(encoder)
    x = torch.randn(1, 50, 256)
    difference = float((run(encoder, x) - run(result, x)).abs().max())
    assert difference < 1e-4, f"fusing {preset} changes its output by {difference}: there is nothing to compare"
    return result


def shares(encoder: Encoder, x: Tensor, passes: int = 5) -> dict[str, float]:
    """Share of each kind of operation in the time inside operations. Attention's own products count as linear where they are such calls."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(passes):
            run(encoder, x)
    times: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "other")
        times[kind] += event.self_cpu_time_total
    return {kind: times[kind] / sum(times.values()) for kind in (*KINDS, "other")}


@torch.inference_mode()
def main() -> None:
    """Build both sides, time them, print, and show where the time goes."""
    options = harness.parser(__doc__.splitlines()[0])
    options.set_defaults(rounds=25)
    options.add_argument("--frames", type=int, nargs="+", default=[16, 499], help="input lengths: a chunk, and 10 s = 499")
    options.add_argument("--ffn", type=int, default=2048, help="inner dimension of the feed-forward modules (default: 2048)")
    options.add_argument("--expansion", type=int, default=1, help="FusionFormer's conv_module_expansion (default: 1)")
    options.add_argument("--pos-enc-type", nargs="+", default=["abs", "rel_pos"], help="positions of the Conformers (default: both kinds)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    before = harness.guard("before the run")
    conformer = {"encoder_layers": 12, "encoder_ffn_embed_dim": args.ffn, "depthwise_conv_kernel_size": 15}
    encoders = {f"conformer {kind}": fused("conformer-m", pos_enc_type=kind, **conformer) for kind in args.pos_enc_type}
    encoders["fusionformer"] = fused("fusionformer-s", encoder_ffn_embed_dim=args.ffn, conv_module_expansion=args.expansion)
    rows, table = [], []
    for precision, target in TARGETS.items():
        sides = {name: int8_linears(encoder) for name, encoder in encoders.items()} if precision == "int8" else encoders
        for frames in args.frames:
            x = torch.randn(1, frames, 256)
            repeats = max(1, 200 // frames)  # of a short call, so that one is long enough to time

            def call(encoder: Encoder, x: Tensor = x, repeats: int = repeats) -> None:
                for _ in range(repeats):
                    run(encoder, x)

            times = harness.compare({name: lambda e=encoder: call(e) for name, encoder in sides.items()}, args.rounds)
            times = {name: [t / repeats for t in values] for name, values in times.items()}
            what = f"{precision}, {frames} frames ({frames / 50:g} s), FFN {args.ffn}"
            for name in list(sides)[:-1]:
                rows.append(harness.row(what, {side: times[side] for side in (name, "fusionformer")}, target))
            table += [(what, name, shares(encoder, x)) for name, encoder in sides.items()]
    after = harness.guard("after the run")
    facts = harness.machine() | {"probe": [round(before, 1), round(after, 1)], "int8_engine": torch.backends.quantized.engine}
    if args.json:
        facts["shares"] = [{"what": what, "side": side, **kinds} for what, side, kinds in table]
    harness.show(rows, facts, args.json)
    if not args.json:
        width = max(len(what) for what, _, _ in table)
        print(f"\n{'share of the time inside operations':<{width + 19}}" + "".join(f"{kind:>11}" for kind in (*KINDS, "other")))
        for what, side, kinds in table:
            print(f"{what:<{width}}  {side:<17}" + "".join(f"{share:>11.1%}" for share in kinds.values()))


if __name__ == "__main__":
    main()
