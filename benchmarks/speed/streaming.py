"""Streams of a FusionFormer beside those of a Conformer of its size, as they are built, fused, and fused with int8 linear layers: time of
one chunk and RTF; of one-bit models beside their own float forms; and whether memory stays flat over a long stream.

    python benchmarks/speed/streaming.py --rounds 15 --modes 16-4 32-4 16-inf
    python benchmarks/speed/streaming.py --one-bit sparseformer-debug sparseformer-dn-s --modes 16-4 --rounds 15
    python benchmarks/speed/streaming.py --minutes 30

RTF is computing time over audio time, extractor included, one stream. The paper that asks (Song et al. 2022, table 5) has 0.1053 for its
Conformer and 0.0896 for FusionFormer, 1.17x, on another machine; its mode 16-4, of frames of 40 ms, is 32-4 here. HUBERT_EFF_KERNEL
chooses the kernel of the one-bit models, of which the packed stream is compared with the simulated one, bit by bit, before anything is
timed.
"""

from __future__ import annotations

import statistics

import harness
import torch

import hubert_eff
from hubert_eff.config import FRAME_STRIDE, SAMPLE_RATE
from hubert_eff.models.fuse import fuse
from hubert_eff.models.hubert import HubertModel
from hubert_eff.profiling.cost import noise
from hubert_eff.profiling.precision import at_precision
from hubert_eff.quant import pack
from hubert_eff.quant.packing import packed_copy
from hubert_eff.quant.runtime import kernel_in_use
from hubert_eff.streaming.stream import StreamingModel, mode_seconds, parse_mode

SIZE = {"encoder_layers": 12, "encoder_ffn_embed_dim": 2048, "depthwise_conv_kernel_size": 15, "streaming": True}
PRESETS = {  # sides, at FusionFormer-S's size
    "conformer abs": ("conformer-m", {**SIZE, "pos_enc_type": "abs"}),
    "conformer rel_pos": ("conformer-m", SIZE),
    "fusionformer": ("fusionformer-s", SIZE),
}
PEER, OURS, TARGET = "conformer abs", "fusionformer", 1.17
FLOATS, ONE_BIT, ONE_BIT_BFLOAT16 = ("float32", "bfloat16", "int8"), "one bit", "one bit, bfloat16 rest"


def built(name: str) -> HubertModel:
    """A model as it is built."""
    preset, keys = PRESETS[name]
    return hubert_eff.build(preset, **keys).eval()


def forms(name: str) -> dict[str, HubertModel]:
    """A model as it is built, fused, and at int8."""
    model = built(name)
    return {"float32": model, "fused": fuse(model), "int8": at_precision(model, "int8")}


def one_bit_forms(preset: str) -> dict[str, HubertModel]:
    """A fused float model, also in bfloat16 and with int8 linear layers, and its one-bit form from bits, with either rest."""
    fused = fuse(hubert_eff.build(preset, streaming=True).eval())
    binary = hubert_eff.build(f"{preset}+w1a1", streaming=True).train()
    binary(noise(binary, 2.0, 2), mask=False, features_only=True)  # scales as after a first batch
    packed, wave = pack(binary.eval()), noise(binary, 3.0)
    simulated, bits = (stream_of(model, wave) for model in (binary, packed))
    differing = int((simulated.view(torch.int32) != bits.view(torch.int32)).sum())
    assert not differing, f"{differing} elements of {preset}'s stream differ from the simulation: there is nothing to compare"
    floats = {precision: at_precision(fused, precision) for precision in FLOATS}
    return {**floats, ONE_BIT: packed, ONE_BIT_BFLOAT16: pack(binary, rest=torch.bfloat16)}


def stream_of(model: HubertModel, wave: torch.Tensor) -> torch.Tensor:
    """All frames of a stream in mode 16-4."""
    stream = StreamingModel(model)
    return torch.cat([y for y in (stream.feed(wave), stream.flush()) if y is not None], 1)


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
    model = hubert_eff.build(preset, streaming=True).eval()
    model = fuse(model) if model.config.quant == "none" else packed_copy(model)
    stream, audio = warm_stream(model, mode, 8)
    total = round(minutes * 60 * SAMPLE_RATE / audio.size(1))
    form = "fused" if model.fused else "from bits"
    print(f"{preset} {form}, mode {mode}, {minutes:g} minutes in {total} chunks of {audio.size(1) / SAMPLE_RATE:g} s")
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
    options.add_argument("--minutes", type=float, help="minutes of a stream whose memory is measured instead")
    options.add_argument("--preset", default="conformer-s", help="preset of that stream, such as conformer-s (default) or conformer-s+w1a1")
    options.add_argument("--one-bit", nargs="+", metavar="PRESET", help="presets to time at one bit beside their float forms, instead")
    options.add_argument("--cpu-time", action="store_true", help=harness.CPU_TIME)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.minutes:
        memory(args.minutes, args.modes[0], args.preset)
        return
    clock = harness.cpu_seconds if args.cpu_time else harness.seconds
    before = harness.guard("before the run")
    names, built_as = (args.one_bit, one_bit_forms) if args.one_bit else (tuple(PRESETS), forms)
    models = {(name, form): model for name in names for form, model in built_as(name).items()}
    rows, table = [], []
    for mode in args.modes:
        streams = {key: warm_stream(model, mode, args.context) for key, model in models.items()}
        calls = {key: lambda s=stream, a=audio: s.feed(a) for key, (stream, audio) in streams.items()}
        times = harness.compare(calls, args.rounds, clock)
        medians = {key: statistics.median(values) for key, values in times.items()}
        for (name, form), median in medians.items():
            table.append((mode, name, form, median * 1e3, median / (streams[name, form][1].size(1) / SAMPLE_RATE)))
        if not args.one_bit:
            for form in ("float32", "fused", "int8"):
                rows.append(harness.row(f"mode {mode}, {form}", {side: times[side, form] for side in (PEER, OURS)}, TARGET))
            continue
        for name in names:
            best = min(FLOATS, key=lambda form, name=name: medians[name, form])
            for ours in (ONE_BIT, ONE_BIT_BFLOAT16):
                rows.append(harness.row(f"mode {mode}, {name}", {form: times[name, form] for form in (best, ours)}, 1.0))
    after = harness.guard("after the run")
    facts = harness.machine() | {
        "probe": [round(before, 1), round(after, 1)],
        "int8_engine": torch.backends.quantized.engine,
        "kernel": kernel_in_use(),
        "clock": "CPU" if args.cpu_time else "wall",
    }
    if args.json:
        facts["modes"] = {mode: mode_seconds(mode) for mode in args.modes}
        facts["table"] = [dict(zip(("mode", "model", "form", "chunk_ms", "rtf"), line)) for line in table]
    else:
        for mode in args.modes:
            print(f"mode {mode}: {mode_seconds(mode)}")
        print(f"{'mode':<8}{'model':<20}{'form':<24}{'chunk ms':>9}{'RTF':>9}")
        for mode, name, form, chunk, rtf in table:
            print(f"{mode:<8}{name:<20}{form:<24}{chunk:>9.2f}{rtf:>9.4f}")
    harness.show(rows, facts, args.json)


if __name__ == "__main__":
    main()
