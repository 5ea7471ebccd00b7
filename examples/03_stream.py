"""Run a model on audio that comes piece by piece, and compare it with the same model on the whole utterance."""

from __future__ import annotations

import torch

import hubert_eff
from hubert_eff.streaming import StreamingModel

model = hubert_eff.build("fusionformer-debug", streaming=True).eval()
stream = StreamingModel(model, chunk_size=16, left_chunks=4)  # chunks of 0.32 s that see 1.28 s before them
print(f"a chunk can be computed {stream.latency * 1000:.0f} ms after its first sample")

wav = 0.1 * torch.randn(1, 48_000)  # 3 s at 16 kHz
outputs = []
for number, piece in enumerate(wav.split(4_000, dim=1)):  # 0.25 s at a time, as a microphone may deliver it
    frames = stream.feed(piece)  # (1, T, D) when a chunk is complete, else None
    if frames is not None:
        print(f"after {(number + 1) * 0.25:.2f} s: {frames.size(1)} frames")
        outputs.append(frames)
rest = stream.flush()  # the frames of the last, shorter chunk
if rest is not None:
    outputs.append(rest)
streamed = torch.cat(outputs, 1)

with torch.no_grad():
    whole = model.hidden_states(wav, chunk_size=16, left_chunks=4)[0][-1]
print(f"{streamed.size(1)} frames; largest difference from the whole utterance: {(streamed - whole).abs().max().item():.1e}")
assert torch.allclose(streamed, whole, atol=1e-4)
