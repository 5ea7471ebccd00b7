"""Streams of a FusionFormer beside those of a Conformer of its size, as they are built, fused, and fused with int8 linear layers: time of
one chunk and RTF; and whether memory stays flat over a long stream.

    python benchmarks/speed/streaming.py --rounds 15
    python benchmarks/speed/streaming.py --minutes 30

RTF is computing time over audio time, extractor included, one stream. The paper that asks (Song et al. 2022, table 3) has 0.1053 for its
Conformer and 0.0896 for FusionFormer, 1.17x, on another machine.
"""

from __future__ import annotations

import statistics

import harness
import torch

import hubert_eff
from hubert_eff.config import FRAME_STRIDE, SAMPLE_RATE
from hubert_eff.models.fuse import fuse
from hubert_eff.models.hubert import HubertModel
from hubert_eff.profiling.precision import at_precision
from hubert_eff.streaming.stream import StreamingModel, parse_mode

SIZE = {"encoder_layers": 12, "encoder_ffn_embed_dim": 2048, "depthwise_conv_kernel_size": 15, "streaming": True}
PRESETS = {  # sides, at FusionFormer-S's size
    "conformer abs": ("conformer-m", {**SIZE, "pos_enc_type": "abs"}),
    "conformer rel_pos": ("conformer-m", SIZE),
    "fusionformer": ("fusionformer-s", SIZE),
}
PEER, OURS, TARGET = "conformer abs", "fusionformer", 1.17


def built(name: str) -> HubertModel:
    """A model as it is built."""
    preset, keys = PRESETS[name]
    return hubert_eff.build(preset, **keys).eval()


def forms(name: str) -> dict[str, HubertModel]:
    """A model as it is built, fused, and at int8."""
    model = built(name)
    return {"float32": model, "fused": fuse(model), "int8": at_precision(model, "int8")}


def warm_stream(model: HubertModel, mode: str, chunks: int) -> tuple[StreamingModel, torch.Tensor]:
    """A stream that has seen so many chunks, and the audio of one more."""
    size, left = parse_mode(mode)
    assert size is not None
    stream = StreamingModel(model, size, left)
    audio = torch.randn(1, size * FRAME_STRIDE)
    stream.feed(torch.randn(1, 400 - FRAME_STRIDE))  # from here on every feed of a chunk's samples computes one chunk
    for _ in range(chunks):
        stream.feed(audio)
    return stream, audio


def memory(minutes: float, mode: str, preset: str) -> None:
    """Feed noise for so long; print what the stream keeps and the process has, every sixth of the way."""
    model = fuse(hubert_eff.build(preset, streaming=True).eval())
    stream, audio = warm_stream(model, mode, 8)
    total = round(minutes * 60 * SAMPLE_RATE / audio.size(1))
    print(f"{preset} fused, mode {mode}, {minutes:g} minutes in {total} chunks of {audio.size(1) / SAMPLE_RATE:g} s")
    spent = 0.0
    for number in range(total + 1):
        if number % max(1, total // 6) == 0:
            kept = 4 * stream.state().elements / 1e6
            print(f"{number * audio.size(1) / SAMPLE_RATE / 60:6.1f} min: {kept:8.3f} MB kept, {resident():8.1f} MB resident, "
                  f"RTF so far {spent / max(number * audio.size(1) / SAMPLE_RATE, 1e-9):.4f}", flush=True)  # fmt: skip
        spent += harness.seconds(lambda: stream.feed(audio))


def resident() -> float:
    """Resident memory of this process in MB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1e3


@torch.inference_mode()
def main() -> None:
    """Time the streams, or watch the memory of one."""
    options = harness.parser(__doc__.splitlines()[0])
    options.add_argument("--modes", nargs="+", default=["16-4", "16-inf"], help="chunk size and chunks to the left (default: 16-4 16-inf)")
    options.add_argument("--context", type=int, default=31, help="chunks that every stream has seen (default: 31, that is 10 s)")
    options.add_argument("--minutes", type=float, help="instead: memory over a stream of so many minutes")
    options.add_argument("--preset", default="conformer-s", help="of that stream (default: conformer-s)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.minutes:
        memory(args.minutes, args.modes[0], args.preset)
        return
    before = harness.guard("before the run")
    models = {(name, form): model for name in PRESETS for form, model in forms(name).items()}
    rows, table = [], []
    for mode in args.modes:
        streams = {key: warm_stream(model, mode, args.context) for key, model in models.items()}
        times = harness.compare({key: lambda s=stream, a=audio: s.feed(a) for key, (stream, audio) in streams.items()}, args.rounds)
        for (name, form), values in times.items():
            stream, audio = streams[name, form]
            table.append((mode, name, form, statistics.median(values) * 1e3, statistics.median(values) / (audio.size(1) / SAMPLE_RATE)))
        for form in ("float32", "fused", "int8"):
            rows.append(harness.row(f"mode {mode}, {form}", {side: times[side, form] for side in (PEER, OURS)}, TARGET))
    after = harness.guard("after the run")
    facts = harness.machine() | {"probe": [round(before, 1), round(after, 1)], "int8_engine": torch.backends.quantized.engine}
    if args.json:
        facts["table"] = [dict(zip(("mode", "model", "form", "chunk_ms", "rtf"), line)) for line in table]
    else:
        print(f"{'mode':<8}{'model':<20}{'form':<10}{'chunk ms':>9}{'RTF':>9}")
        for mode, name, form, chunk, rtf in table:
            print(f"{mode:<8}{name:<20}{form:<10}{chunk:>9.2f}{rtf:>9.4f}")
    harness.show(rows, facts, args.json)


if __name__ == "__main__":
    main()
