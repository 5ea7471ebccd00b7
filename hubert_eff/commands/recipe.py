"""`hubert-eff recipe SPEECH --config NAME --out DIR`: two phases of pre-training, from recordings to an export; then one bit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..config import COUNT, NOT_NEGATIVE, POSITIVE, Bounds
from ._numbers import real, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("speech", type=Path, metavar="SPEECH", help="folder of recordings, such as LibriSpeech as unpacked")
    parser.add_argument("--config", required=True, metavar="NAME", help="configuration pretrain/NAME.yaml in configs, such as conformer_s")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for all results")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the commands and what they need, and stop")
    parser.add_argument(
        "--gpus", type=whole(COUNT), default=1, metavar="N", help="GPUs of this machine; the batch is that of 32 GPUs (default: 1)"
    )
    parser.add_argument(
        "--updates",
        type=whole(COUNT),
        nargs="+",
        default=(),
        metavar="N",
        help="updates of the two phases (default: the file's, and 2.4 times as many); with --from one number (default: the file's)",
    )
    parser.add_argument(
        "--clusters",
        type=whole(Bounds(least=2)),
        nargs="+",
        default=(),
        metavar="K",
        help="clusters of the two phases' labels (default: 100 500); with --from one number (default: 500)",
    )
    parser.add_argument(
        "--layer",
        type=whole(NOT_NEGATIVE),
        metavar="L",
        help="hidden state to cluster, of phase 1's model or of --from (default: the middle one)",
    )
    parser.add_argument(
        "--folder-level",
        type=whole(COUNT),
        default=1,
        metavar="N",
        help="level of the folder that names the speaker (default: 1; LibriSpeech: 2)",
    )
    parser.add_argument(
        "--valid-percent",
        type=real(Bounds(above=0, below=100)),
        default=1.0,
        metavar="P",
        help="share of the audio in valid, in percent (default: %(default)g)",
    )
    parser.add_argument(
        "--fit-hours",
        type=real(POSITIVE),
        default=10.0,
        metavar="H",
        help="hours of speech that k-means learns from (default: %(default)g)",
    )
    parser.add_argument(
        "--from",
        dest="start",
        metavar="MODEL",
        help="replace phase 1 by a checkpoint or a folder of Hugging Face: take its weights, labels from its --layer, and new codebooks",
    )
    parser.add_argument("--warm", action="store_true", help="start phase 2 from the weights of phase 1, with new codebooks")
    parser.add_argument(
        "--quant",
        nargs="+",
        metavar="STAGE",
        help="continue to one bit, by distillation from phase 2's model: w1a1, or w1a2 w1a1; this can be added to a finished folder",
    )
    parser.add_argument(
        "--quant-updates", type=whole(COUNT), nargs="+", metavar="N", help="updates of each stage of --quant (default: as many as phase 2)"
    )
    parser.add_argument(
        "--policy", metavar="POLICY", help="policy of binarization: default | paper | a YAML file (default: the configuration's)"
    )
    parser.add_argument("--superb", type=Path, metavar="DIR", help="folder of SUPERB's data: evaluate the ten tasks at the end")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further keys of the configurations, for all trainings")
    parser.add_argument(
        "--device", default="a100", help="device whose rates a dry run assumes: a name in configs/device, or a file (default: %(default)s)"
    )
    parser.add_argument(
        "--mfu",
        type=real(Bounds(above=0, most=1)),
        metavar="SHARE",
        help="share of that device's peak that a dry run assumes (default: 0.011, which reproduces the paper's GPU-hours)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the steps that are not finished, or list them."""
    from ..recipes.pretrain import Pretraining

    recipe = Pretraining(
        args.speech, args.out, args.config, args.gpus, tuple(args.updates), tuple(args.clusters), args.layer, args.folder_level,
        args.valid_percent, args.fit_hours, args.superb, args.set, args.warm or None, args.quant and tuple(args.quant),
        args.quant_updates and tuple(args.quant_updates), args.policy, args.start,
    )  # fmt: skip
    found = recipe.dry_run(args.device, args.mfu) if args.dry_run else recipe.run()
    if args.json:
        print(json.dumps(found, indent=2))
    elif args.dry_run:
        _plan(found)
    else:
        for name, best in {**found["phases"], **found.get("quantization", {})}.items():
            accuracy = f"{best['correct_m_0']:.1%} (most frequent label: {best['majority_m_0']:.1%})"
            print(f"{name}: masked accuracy, valid {accuracy}, at update {best['num_updates']:.0f}")
        for name in ("model", "one_bit_model"):
            if name in found:
                print(found[name])
    return 0


def _plan(found: dict[str, Any]) -> None:
    from ..recipes.base import plan_text
    from ..reports.tables import plain_table, show

    print(plan_text(found["steps"]))
    table = plain_table(
        "", "parameters", "updates", "hours of audio", "PFLOP", "GPU-hours", "GB of each GPU, at least", "GB per checkpoint"
    )  # fmt: skip
    first = 3 - len(found["phases"])
    runs = {f"phase {number}": needs for number, needs in enumerate(found["phases"], start=first)} | found["quantization"]
    for name, needs in runs.items():
        hours = needs["updates"] * needs["audio_seconds_per_update"] / 3600
        table.add_row(
            name, f"{needs['params']:,}", f"{needs['updates']:,}", f"{hours:,.0f}", f"{needs['pflop']:,.1f}",
            f"{needs['gpu_hours']:,.1f}", f"{needs['gpu_gb']:.1f}", f"{needs['checkpoint_gb']:.2f}",
        )  # fmt: skip
    show(table)
    disk = ", ".join(f"{what} {size:.2f}" for what, size in found["disk_gb"].items())
    print(f"disk, GB: {sum(found['disk_gb'].values()):.2f} ({disk}); free {found['disk_free_gb']:.0f}")
    print(f"Estimated, not measured: GPU-hours at {found['mfu']:.1%} of {found['device']}'s peak: {found['mfu_source']}. Nothing was run.")
