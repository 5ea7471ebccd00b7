"""Compare what models cost before anything is trained: parameters, operations, storage, and where the operations are."""

from __future__ import annotations

import hubert_eff

print(f"{'model':24}{'parameters':>14}{'GFLOP':>8}{'MB':>8}")
for name in ("conformer-s", "conformer-s+w1a1", "squeezeformer-xs"):
    cost = hubert_eff.profile(name, seconds=10.0)  # nothing is computed: shapes are followed through the model
    print(f"{name:24}{cost.params_without_labels:14,}{cost.gflop:8.1f}{cost.storage_mb['file']:8.1f}")

cost = hubert_eff.profile("conformer-s", seconds=10.0)
print("\nconformer-s by kind of layer:")
for kind, tally in sorted(cost.kinds.items(), key=lambda item: -item[1].macs)[:6]:
    print(f"  {kind or '(other)':24}{100 * tally.macs / cost.macs:5.1f}% of the MACs")

shorter = hubert_eff.build("conformer-s", encoder_layers=8)  # keys of the configuration can be changed
print(f"\nwith 8 blocks: {hubert_eff.profile(shorter).gflop:.1f} GFLOP instead of {cost.gflop:.1f}")
