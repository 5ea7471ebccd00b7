"""`hubert-eff transcribe CKPT AUDIO...`: texts of recordings by a fine-tuned model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hubert-eff transcribe`."""
    parser.add_argument("checkpoint", metavar="CKPT", help="fine-tuned checkpoint, of configs/finetune")
    parser.add_argument("audio", nargs="+", type=Path, metavar="AUDIO", help="recordings, of any rate")
    parser.add_argument(
        "--search", choices=("greedy", "beam", "rescore"), default="greedy",
        help="the best label of each frame; CTC prefix beam search; its texts ranked by the attention decoder too (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--beam", type=int, default=10, help="texts that the beam search keeps (default: %(default)d)")
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
    """Recognise and print; returns 0."""
    from ..progress import progress
    from ..recognition import load_recognizer, transcribe
    from ..recognition.recordings import read_recording

    model = load_recognizer(args.checkpoint)
    model.check_ctc()
    for path in args.audio:
        if not path.is_file():
            raise UserError(f"no recording at {path}")
    chunks = {} if args.chunk_size is None else {"chunk_size": args.chunk_size, "left_chunks": args.left_chunks}
    found = []
    with progress("recordings", len(args.audio)) as advance:
        for path in args.audio:
            wav = read_recording(path)
            if not model.hubert.num_frames(wav.size(1)):
                raise UserError(f"{path}: {wav.size(1)} samples are too few for one frame")
            texts = transcribe(model, wav, args.search, args.beam, args.ctc_weight, **chunks)
            if args.json:
                kept = [{"text": h.text, "score": round(h.score, 4)} for h in texts]
                found.append({"audio": str(path), "text": texts[0].text, "hypotheses": kept})
            else:
                print(f"{path}\t{texts[0].text}", flush=True)
            advance(1)
    if args.json:
        print(json.dumps({"checkpoint": args.checkpoint, "search": args.search, "recordings": found}, indent=2, ensure_ascii=False))
    return 0
