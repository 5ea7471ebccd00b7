"""`hubert-eff run MODEL AUDIO...`: hidden states of audio files, in one .npz or .pt file, or of a stream as it comes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..errors import UserError, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hubert-eff run`."""
    parser.add_argument("model", metavar="FILE|CHECKPOINT|PRESET", help="an export, a checkpoint, or a preset (with random weights)")
    parser.add_argument(
        "audio",
        nargs="+",
        type=Path,
        metavar="AUDIO",
        help="wav, flac, ogg or mp3 files of any rate, folders of these, or manifests (train.tsv)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="file for features: .npz, or .pt (a dict of tensors); .npy for a stream")
    parser.add_argument(
        "--stream", metavar="MODE",
        help="one 16 kHz file, or - for raw 16-bit PCM on standard input, chunk by chunk: frames of a chunk and chunks before it that are "
        "seen, such as 16-4 (chunks of 0.32 s) or 16-inf; prints the real-time factor",
    )  # fmt: skip
    parser.add_argument(
        "--layer", type=int, metavar="L",
        help="write only this hidden state, (T, D): 0 enters block 1, L leaves block L (default: all, (L + 1, T, D))",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, metavar="N", help="maximum number of files that are computed together (default: 8)")
    parser.add_argument(
        "--window", type=float, metavar="S",
        help="seconds of a window; longer recordings are computed in windows; 0: in one piece (default: 60)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    """Extract and say what was written; returns 1 if files were left out."""
    if args.stream is not None:
        from ..streaming.live import stream_command

        for option in ("layer", "batch", "window"):
            if getattr(args, option) is not None:
                raise UserError(f"--stream gives the last hidden state of one stream, chunk by chunk: leave out --{option}")
        return stream_command(args.model, args.audio, args.stream, args.out, args.json)
    if args.out is None:
        raise UserError("--out is missing: name a .npz or .pt file for the features")
    from ..inference.extraction import CONTEXT, SUFFIXES, WINDOW, extract, summary

    if args.out.suffix not in SUFFIXES:  # checked before torch is imported, which takes half a second
        raise UserError(f"--out {args.out} must end in {' or '.join(SUFFIXES)}")
    given = {option: value for option in ("batch", "window") if (value := getattr(args, option)) is not None}
    left_out: list[str] = []

    def leave_out(line: str) -> None:
        left_out.append(line)
        print(f"hubert-eff run: left out: {printable(line)}", file=sys.stderr, flush=True)

    recordings = extract(args.model, args.audio, args.out, layer=args.layer, left_out=leave_out, **given)
    if args.json:
        print(json.dumps({**summary(recordings, args.out), "left_out": left_out}, indent=2))
        return 1 if left_out else 0
    cut = sum(recording.windows > 1 for recording in recordings)
    seconds = sum(recording.seconds for recording in recordings)
    what = "all hidden states" if args.layer is None else f"hidden state {args.layer}"
    without = f"; {len(left_out)} left out" if left_out else ""
    count = f"{len(recordings)} recording{'s' * (len(recordings) != 1)}"
    print(f"{args.out}: {what} of {count}, {seconds:.1f} s, {sum(r.frames for r in recordings)} frames{without}")
    if cut:
        window = given.get("window", WINDOW)
        print(
            f"{cut} of them longer than {window:g} s: in windows with {CONTEXT:g} s of context, beyond which blocks do not see "
            "(--window 0: in one piece)"
        )
    return 1 if left_out else 0
