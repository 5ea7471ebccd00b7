"""Write a one-bit model as a folder for transformers and read it with AutoModel; nothing is downloaded."""

from __future__ import annotations

import tempfile

import torch
from transformers import AutoFeatureExtractor, AutoModel

import hubert_eff
import hubert_eff.hf  # registers the classes
from hubert_eff.exporting.huggingface import export_folder

model = hubert_eff.build("sparseformer-debug+w1a1")
wav = 0.1 * torch.randn(1, 16_000)
model.train()
model.hidden_states(wav)  # the first batch in train mode sets the scales of the activations
model.eval()

with tempfile.TemporaryDirectory() as folder:
    export_folder(model, folder)
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    theirs = AutoModel.from_pretrained(folder)

inputs = extractor(wav[0].numpy(), sampling_rate=16_000, return_tensors="pt")
with torch.no_grad():
    output = theirs(**inputs, output_hidden_states=True)
    ours = model.hidden_states(inputs["input_values"])[0]
print("last_hidden_state:", tuple(output.last_hidden_state.shape), f"  {len(output.hidden_states)} hidden states")
assert torch.equal(output.last_hidden_state, ours[-1])
print("equal to the model that was exported")
