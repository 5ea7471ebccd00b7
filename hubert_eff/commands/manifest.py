"""`hubert-eff manifest`: fairseq manifests of 16 kHz mono audio from a folder of recordings."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import printable, short


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments; their defaults are those of `data.manifest.Options`."""
    from ..data.manifest import MIN_FOLDERS, SPLITS, Options

    parser.add_argument(
        "source", metavar="DIR", type=Path,
        help="folder of wav, flac, ogg or mp3 files of any rate; a lhotse manifest (jsonl, jsonl.gz) or a folder of these; a Kaldi data "
        "folder (wav.scp; segments, text, utt2spk, utt2dur)",
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, help="folder for train.tsv, valid.tsv, test.tsv, parts.tsv, left_out.tsv")
    parser.add_argument("--cache", type=Path, help="folder for converted audio (default: OUT/audio)")
    parser.add_argument(
        "--valid-percent", type=float, default=Options.valid_percent, metavar="P",
        help="wanted share of valid in percent, which whole folders may exceed; 0: no valid.tsv (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--split-by", choices=SPLITS, default=Options.split_by,
        help=f"folder: valid is whole speaker folders (or speakers that a manifest names); auto: folder if there are {MIN_FOLDERS} or "
        "more, else file",
    )  # fmt: skip
    parser.add_argument(
        "--folder-level", type=int, default=Options.folder_level, metavar="N",
        help="the N-th folder below DIR names the speaker, e.g. 2 for LibriSpeech/SUBSET/SPEAKER (default: %(default)d)",
    )  # fmt: skip
    parser.add_argument(
        "--speaker-pattern", metavar="REGEX",
        help="regular expression that finds the speaker in a recording's path below DIR: its first group, or else the whole match, e.g. "
        "'_([a-z]+)_' for 7_theo_0.wav",
    )  # fmt: skip
    for split in ("valid", "test"):
        parser.add_argument(
            f"--{split}-speakers", type=_speakers, default=(), metavar="NAMES|FILE",
            help=f"speakers that make up {split}.tsv: names with commas between them, or a text file with one name a line",
        )  # fmt: skip
    parser.add_argument(
        "--join", type=float, metavar="SECONDS",
        help="join the recordings of each folder (or speaker), shuffled by --seed, into utterances of about this length",
    )  # fmt: skip
    parser.add_argument(
        "--min-seconds", type=float, default=Options.min_seconds, metavar="S",
        help="leave out shorter recordings (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--max-seconds", type=float, metavar="S", help="leave out longer recordings")
    parser.add_argument("--seed", type=int, default=Options.seed, help="seed of the split and of --join (default: %(default)d)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads (default: %(default)d)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def _speakers(text: str) -> tuple[str, ...]:
    """Names of speakers, as --valid-speakers gives them."""
    path = Path(text)
    if path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise argparse.ArgumentTypeError(f"{text} cannot be read as text ({short(error)})") from error
    else:
        lines = text.split(",")
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise argparse.ArgumentTypeError(f"{text or repr(text)} names no speaker")
    return names


def run(args: argparse.Namespace) -> int:
    """Make the manifests and print a summary."""
    from ..data.manifest import Options, make_manifest

    options = Options(**{f.name: getattr(args, f.name) for f in fields(Options)})
    summary = make_manifest(args.source, args.out, args.cache, options)
    if args.json:
        print(json.dumps(summary))
    else:
        print("\n".join(printable(line) for line in _lines(summary, args.out)))
    return 0


def _lines(summary: dict[str, Any], out: Path) -> list[str]:
    splits = summary["splits"]
    total = sum(s["minutes"] for s in splits.values())
    parts = ", ".join(f"{n} {s['utterances']} utterances ({s['minutes']:.1f} min)" for n, s in splits.items())
    kind = "recordings" if summary["layout"] == "folder" else f"utterances of {summary['layout']}"
    joined = ", joined" if summary["options"]["join"] else ""
    lines = [f"{summary['recordings']} {kind} ({summary['converted']} as copies in the cache{joined}): {parts} -> {out}"]
    if summary["left_out"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary["left_out_reasons"].items())
        lines.append(f"left out {summary['left_out']}: {reasons}; each is named in {out / 'left_out.tsv'}")
    if summary["valid_folders"] and not summary["options"]["valid_speakers"]:
        share = 100 * splits["valid"]["minutes"] / total
        lines.append(
            f"valid holds {share:.0f}% of the audio, whole folders: {', '.join(summary['valid_folders'])} "
            "(--split-by file comes closer to --valid-percent)"
        )
    if summary["valid_repeats_train"]:
        lines.append("valid.tsv repeats train.tsv, since one utterance cannot be split: give more for a real validation set")
    elif "valid" not in splits:
        lines.append("no valid.tsv was asked for: train with dataset.disable_validation=true")
    return lines
