"""`hubert-eff transcribe CKPT AUDIO...`: texts of recordings by a fine-tuned model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..config import COUNT
from ..errors import UnusableFile, printable
from ._numbers import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hubert-eff transcribe`."""
    parser.add_argument("checkpoint", metavar="CKPT", help="fine-tuned checkpoint, of configs/finetune")
    parser.add_argument("audio", nargs="+", type=Path, metavar="AUDIO", help="recordings, of any rate")
    parser.add_argument(
        "--search", choices=("greedy", "beam", "rescore"), default="greedy",
        help="the best label of each frame; CTC prefix beam search; its texts ranked by the attention decoder too (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--beam", type=whole(COUNT), default=10, help="texts that the beam search keeps (default: %(default)d)")
    parser.add_argument(
        "--ctc-weight", type=float, default=0.5, help="weight of CTC's log-probability beside the decoder's (default: %(default)g)"
    )
    parser.add_argument(
        "--chunk-size", type=int, metavar="N",
        help="hear N frames of 20 ms at a time, as a stream does: a model pre-trained with model.streaming=true (default: all at once)",
    )  # fmt: skip
    parser.add_argument("--left-chunks", type=int, default=-1, help="chunks before its own that a frame attends to (default: -1, all)")
    parser.add_argument("--json", action="store_true", help="print texts, scores and, of a beam, all it kept as JSON")


def run(args: argparse.Namespace) -> int:
    """Recognize and print; returns 1 if recordings were left out, 2 if all were."""
    from ..recognition import load_recognizer, transcribe
    from ..recognition.recordings import read_recording
    from ..utils.progress import progress

    model = load_recognizer(args.checkpoint)
    model.check_ctc()
    chunks = {} if args.chunk_size is None else {"chunk_size": args.chunk_size, "left_chunks": args.left_chunks}
    found, left_out = [], []
    with progress("recordings", len(args.audio)) as advance:
        for path in args.audio:
            try:
                wav = read_recording(path)
                if not model.hubert.num_frames(wav.size(1)):
                    raise UnusableFile(f"{path}: {wav.size(1)} samples are too few for one frame")
            except UnusableFile as fault:
                if len(args.audio) == 1:
                    raise
                left_out.append(str(fault))
                print(f"hubert-eff transcribe: left out: {printable(fault)}", file=sys.stderr, flush=True)
                continue
            finally:
                advance(1)
            texts = transcribe(model, wav, args.search, args.beam, args.ctc_weight, **chunks)
            if args.json:
                kept = [{"text": h.text, "score": round(h.score, 4)} for h in texts]
                found.append({"audio": printable(path), "text": texts[0].text, "hypotheses": kept})
            else:
                print(f"{printable(path)}\t{texts[0].text}", flush=True)
    if args.json:
        values = {"checkpoint": args.checkpoint, "search": args.search, "recordings": found, "left_out": [printable(x) for x in left_out]}
        print(json.dumps(values, indent=2, ensure_ascii=False))
    return 0 if not left_out else 1 if len(left_out) < len(args.audio) else 2
