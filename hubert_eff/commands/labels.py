"""`hubert-eff labels`: k-means labels of a manifest; `hubert-eff labels quality`: how well they agree with phones."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ..errors import UserError

# numbers of clusters in HuBERT's first and second iteration
DEFAULT_CLUSTERS = {"mfcc": 100, "checkpoint": 500}
FIT_HOURS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments for making labels (`DIR`) and for measuring them (`quality DIR`)."""
    parser.usage = (
        "hubert-eff labels DIR --out LABELDIR (--features mfcc | --checkpoint SPEC --layer L) [--clusters K] ...\n"
        "       hubert-eff labels quality LABELDIR --alignments FILE [--manifest DIR] [--json]\n"
        "       hubert-eff labels quality DIR --layers all --alignments FILE [--checkpoint SPEC] [--clusters K] ..."
    )
    parser.add_argument(
        "paths", nargs="+", metavar="DIR", help="folder that `hubert-eff manifest` wrote; or the word quality and a folder of labels"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    make = parser.add_argument_group("making labels")
    make.add_argument("--out", type=Path, metavar="LABELDIR", help="folder for SPLIT.km, dict.km.txt, labels.json; may be DIR")
    make.add_argument("--features", choices=("mfcc",), help="cluster MFCC with deltas: 100 labels per second")
    make.add_argument(
        "--checkpoint", metavar="SPEC",
        help="encoder whose hidden state is clustered, 50 labels per second: a checkpoint, a preset, a folder of Hugging Face (HuBERT, "
        "wav2vec 2.0, WavLM, Whisper), or s3prl:NAME",
    )  # fmt: skip
    make.add_argument("--layer", type=int, metavar="L", help="hidden state to cluster: 0 enters block 1, L leaves block L")
    make.add_argument(
        "--clusters", type=int, metavar="K", help=f"number of labels (default: {DEFAULT_CLUSTERS['mfcc']} for MFCC, "
        f"{DEFAULT_CLUSTERS['checkpoint']} for a checkpoint)",
    )  # fmt: skip
    make.add_argument("--splits", nargs="+", metavar="SPLIT", help="splits to label (default: every TSV in DIR)")
    make.add_argument("--fit-split", default="train", metavar="SPLIT", help="split that k-means learns from (default: %(default)s)")
    make.add_argument(
        "--fit-hours", type=float, metavar="H",
        help=f"maximum hours of that split that k-means learns from, drawn at random; the features "
        f"are kept on disk meanwhile (default: {FIT_HOURS:g}; 1 with --layers)",
    )  # fmt: skip
    make.add_argument(
        "--kmeans", default="minibatch", metavar="KIND",
        help="k-means implementation: minibatch, or faiss (needs faiss-cpu), which holds all frames "
        "of --fit-hours in memory: 56 MB per hour of MFCC, 0.55 GB of "
        "a layer of 768 channels (default: %(default)s)",
    )  # fmt: skip
    make.add_argument("--workers", type=int, help="number of processes (default: one per core; one on an accelerator)")
    make.add_argument("--device", default="auto", help="torch device of the checkpoint (default: cuda where there is one)")
    make.add_argument(
        "--batch-seconds", type=float, default=60.0, metavar="S", help="seconds of audio per forward pass (default: %(default)g)"
    )
    make.add_argument(
        "--nshard",
        type=int,
        metavar="N",
        help="number of jobs that share LABELDIR, one per machine; each labels the part that its --rank names",
    )
    make.add_argument(
        "--rank", type=int, metavar="I",
        help="number of this job, 0 to N-1; rank 0 also fits k-means, the others wait for it; once "
        "all have ended, the same command without these two options collects the parts",
    )  # fmt: skip
    make.add_argument("--seed", type=int, default=1, help="seed of k-means (default: %(default)d)")
    measure = parser.add_argument_group("measuring labels")
    measure.add_argument("--alignments", type=Path, metavar="FILE", help="file of phone alignments, a TSV: path, tier, start, end, label")
    measure.add_argument(
        "--layers", metavar="L[,L...]",
        help="compare hidden states: all, or their numbers; k-means is fitted on each, and --splits (default: valid) are measured",
    )  # fmt: skip
    measure.add_argument("--manifest", type=Path, metavar="DIR", help="folder of the manifests, if it has moved since")


def run(args: argparse.Namespace) -> int:
    """Make or measure, and print the figures."""
    if args.paths[0] == "quality" and len(args.paths) == 2:
        return _quality(args)
    if len(args.paths) != 1:
        raise UserError(f"one folder of manifests is needed, not {len(args.paths)}: {' '.join(args.paths)}")
    return _make(args)


def _make(args: argparse.Namespace) -> int:
    from ..labels.features import FeatureSource
    from ..labels.make import make_labels
    from ..utils.locks import locked

    if args.out is None:
        raise UserError("--out LABELDIR is missing: the folder for the labels")
    if args.alignments or args.manifest or args.layers:
        raise UserError("--alignments, --manifest and --layers belong to `hubert-eff labels quality DIR`")
    if (args.features is None) == (args.checkpoint is None):
        raise UserError("name one source of features: --features mfcc, or --checkpoint CKPT --layer L")
    if args.features and args.layer is not None:
        raise UserError("--layer goes with --checkpoint, not with --features mfcc")
    if (args.nshard is None) != (args.rank is None):
        raise UserError("--nshard N and --rank I go together: the number of jobs, and which of them this is, from 0")
    kind = "checkpoint" if args.checkpoint else "mfcc"
    device = _device(args.device) if args.checkpoint else "cpu"
    part = "" if args.rank is None else f"rank-{args.rank}-of-{args.nshard}"  # the other ranks write to the same folder
    with locked(args.out, part):
        summary = make_labels(
            args.paths[0],
            args.out,
            FeatureSource(args.checkpoint, args.layer, device, args.batch_seconds),
            clusters=DEFAULT_CLUSTERS[kind] if args.clusters is None else args.clusters,
            splits=args.splits,
            fit_split=args.fit_split,
            fit_hours=FIT_HOURS if args.fit_hours is None else args.fit_hours,
            seed=args.seed,
            workers=_workers(args.workers, device),
            kmeans=args.kmeans,
            share=None if args.rank is None else (args.rank, args.nshard),
        )
    if args.json:
        print(json.dumps(summary, ensure_ascii=False))
        return 0
    if "finished" in summary:
        print(
            f"rank {args.rank} of {args.nshard} has labeled its part; {summary['finished']} of all {summary['shards']} shards are "
            "finished: once every rank has ended, the same command without --nshard and --rank collects them"
        )
        return 0
    for name, split in summary["splits"].items():
        print(
            f"{args.out / name}.km: {split['frames']} labels of {split['utterances']} utterances at {summary['rate']:g} Hz, "
            f"{split['used_clusters']} of {summary['k']} clusters used, the most frequent label has {split['majority_share']:.1%}"
        )
    if summary["reused"]:
        print("nothing to do: these labels were made before, with the same settings")
    return 0


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _workers(given: int | None, device: str) -> int:
    if given is not None:
        return given
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if device == "cpu" else 1


def _quality(args: argparse.Namespace) -> int:
    from ..labels.quality import label_quality

    if args.alignments is None:
        raise UserError("--alignments FILE is missing: the times of phones; docs/labels.md, 'Times of phones', says how to make it")
    if args.layers is not None:
        return _layers(args)
    if args.checkpoint is not None:
        raise UserError("--checkpoint goes with --layers in `hubert-eff labels quality`: --layers all compares its layers")
    report: dict[str, Any] = label_quality(args.paths[1], args.alignments, args.manifest)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
        return 0
    print(f"{'split':10} {'phone purity':>12} {'cluster purity':>14} {'PNMI':>6} {'frames':>9} {'phones':>6}")
    for name, row in [*report["splits"].items(), ("all", report["all"])]:
        print(
            f"{name:10} {row['phone_purity']:12.3f} {row['cluster_purity']:14.3f} {row['pnmi']:6.3f} "
            f"{row['aligned_frames']:9d} {row['phones']:6d}"
        )
    return 0


def _layers(args: argparse.Namespace) -> int:
    from ..labels.layers import LayerChoice, layer_quality
    from ..utils.locks import locked

    numbers = [] if args.layers == "all" else args.layers.split(",")
    if not all(number.isascii() and number.isdecimal() for number in numbers):
        raise UserError(f"--layers {args.layers}: give all, or numbers of hidden states with commas between them, such as 6,9,12")
    if not os.path.isdir(args.paths[1]):
        raise UserError(f"{args.paths[1]} is not a folder: name one made by `hubert-eff labels` or `hubert-eff manifest`")
    device = _device(args.device)
    given = {"hours": args.fit_hours, "splits": tuple(args.splits or ())}
    choice = LayerChoice(
        args.checkpoint, tuple(map(int, numbers)), args.clusters, args.fit_split, seed=args.seed,
        **{key: value for key, value in given.items() if value is not None},
    )  # fmt: skip
    with locked(args.paths[1], "layers"):
        found = layer_quality(
            args.paths[1], args.alignments, choice, args.manifest, _workers(args.workers, device), device, args.batch_seconds
        )
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    print(f"{found['k']} clusters of {found['fit_frames']} frames of {found['fit_split']}, measured on {', '.join(found['splits'])}")
    print(f"{'layer':>5} {'phone purity':>12} {'cluster purity':>14} {'PNMI':>6} {'used':>5} {'frames':>9}")
    for row in found["layers"]:
        whole, mark = row["all"], "  <- highest PNMI" if row["layer"] == found["best"] else ""
        print(
            f"{row['layer']:5d} {whole['phone_purity']:12.3f} {whole['cluster_purity']:14.3f} {whole['pnmi']:6.3f} "
            f"{row['used_clusters']:5d} {whole['aligned_frames']:9d}{mark}"
        )
    return 0
