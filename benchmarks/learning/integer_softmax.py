"""Measures what attention by integers changes against softmax in a trained one-bit model (hubert_eff/quant/integer_softmax.py).

    python benchmarks/learning/integer_softmax.py CHECKPOINT DATA LABELS

Runs the model on the recordings of DATA/valid.tsv both ways: bits of attention probabilities that softmax would have set otherwise, given
the same input; how far the last hidden states are apart, behind all layers; the masked accuracy of both (LABELS/valid.km).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

import soundfile
import torch
from binarize import masked_accuracy
from torch import Tensor

import hubert_eff
from hubert_eff.quant.attention import Probabilities


@torch.no_grad()
def moved(checkpoint: Path, data: Path, labels: Path) -> dict[str, Any]:
    """What the bits, hidden states and masked accuracy of a trained model are by integers and by softmax."""
    model = hubert_eff.load(checkpoint).eval()
    root, *lines = (data / "valid.tsv").read_text(encoding="utf-8").splitlines()
    counts = {"bits": 0, "set": 0, "moved": 0}
    forward = Probabilities.forward

    def both(self: Probabilities, *args: Any) -> Tensor:
        ours = forward(self, *args)
        with mock.patch.object(Probabilities, "by_softmax", True):
            theirs = forward(self, *args)
        counts["bits"] += ours.numel()
        counts["set"] += int((ours > 0).sum())
        counts["moved"] += int(((ours > 0) != (theirs > 0)).sum())
        return ours

    apart, elements, size, changed = 0.0, 0, 0.0, 0
    for line in lines:
        samples, _ = soundfile.read(Path(root) / line.split("\t")[0], dtype="float32")
        wav = torch.from_numpy(samples).unsqueeze(0)
        with mock.patch.object(Probabilities, "forward", both):
            ours = model.hidden_states(wav)[0][-1]
        with mock.patch.object(Probabilities, "by_softmax", True):
            theirs = model.hidden_states(wav)[0][-1]
        apart += float((ours - theirs).square().sum())
        size += float(theirs.square().sum())
        changed += int(((ours - theirs).abs() > 1e-3).sum())
        elements += ours.numel()
    accuracy = masked_accuracy(checkpoint, data, labels)
    with mock.patch.object(Probabilities, "by_softmax", True):
        by_softmax = masked_accuracy(checkpoint, data, labels)
    found = {"accuracy": accuracy, "accuracy_by_softmax": by_softmax, "recordings": len(lines), **counts}
    found |= {"share_moved": counts["moved"] / counts["bits"], "states_apart": (apart / size) ** 0.5, "states_changed": changed / elements}
    return found


def main() -> None:
    """Compare, print."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("checkpoint", type=Path)
    options.add_argument("data", type=Path, help="folder of valid.tsv")
    options.add_argument("labels", type=Path, help="folder of valid.km")
    args = options.parse_args()
    print(json.dumps(moved(args.checkpoint, args.data, args.labels), indent=2))


if __name__ == "__main__":
    main()
