"""Turn a float model into a one-bit model, train it for some updates, export it packed, and load the file again."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

import hubert_eff
from hubert_eff.quant import pack

torch.manual_seed(0)
audio = 0.1 * torch.randn(4, 16_000)  # a batch of 1 s each
labels = [torch.randint(0, 20, (4, 50))]  # one codebook of 20 classes, 50 labels per second

# a float model with a head for pre-training, and its one-bit form: weights and activations of one bit (w1a1)
model = hubert_eff.build("transformer-debug", num_classes=[20])
one_bit = hubert_eff.binarize(model, "w1a1")

# the float weights behind the bits are trained; hubert-eff train does this properly, with fairseq
optimizer = torch.optim.Adam(one_bit.parameters(), lr=1e-3)
for update in range(5):
    one_bit.set_num_updates(update)  # masks depend on it
    output = one_bit(audio, labels)
    loss = F.cross_entropy(output.logits_m[0], output.targets_m[0])  # of the masked frames
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"update {update}: loss {loss.item():.3f}")

# packed, it runs on bits (XNOR and popcount) and gives the same states
one_bit.eval()
packed = pack(one_bit)
with torch.no_grad():
    simulated, ran = one_bit.hidden_states(audio)[0][-1], packed.hidden_states(audio)[0][-1]
assert torch.equal(simulated, ran)

with tempfile.TemporaryDirectory() as folder:
    files = {"float32": Path(folder) / "float.safetensors", "one bit": Path(folder) / "bits.safetensors"}
    hubert_eff.export(model.eval(), files["float32"])
    hubert_eff.export(one_bit, files["one bit"])
    for name, file in files.items():
        print(f"{name}: {file.stat().st_size / 1e6:.2f} MB")
    loaded = hubert_eff.load(files["one bit"])
    with torch.no_grad():
        assert torch.equal(loaded.hidden_states(audio)[0][-1], ran)
print("the packed model and the loaded file equal the simulation bit for bit")
