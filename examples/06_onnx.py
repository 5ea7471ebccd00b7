"""Write a model as ONNX and run it with onnxruntime; the export compares both on several lengths before it keeps the file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnxruntime
import torch

import hubert_eff
from hubert_eff.exporting.onnx import export_onnx

model = hubert_eff.build("conformer-debug").eval()
wav = 0.1 * torch.randn(2, 12_345)  # batch and length are free

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.onnx"
    written = export_onnx(model, path)
    print(f"{written['bytes'] / 1e6:.2f} MB, opset {written['opset']}, largest difference {written['difference']:.1e}")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (states,) = session.run(["hidden_states"], {"wav": wav.numpy()})  # (L + 1, B, T, D)

with torch.no_grad():
    ours = torch.stack(model.hidden_states(wav)[0])
print("shape:", states.shape, f"  difference on this batch: {(torch.from_numpy(states) - ours).abs().max().item():.1e}")
assert torch.allclose(torch.from_numpy(states), ours, atol=1e-3)
