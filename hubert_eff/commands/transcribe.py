"""`hubert-eff transcribe CKPT`: the text of recordings, of a manifest with its error rates, or of a stream as it comes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..config import COUNT
from ..errors import UnusableFile, UserError, printable
from ._numbers import whole

SEARCHES = ("greedy", "beam", "rescore", "attention", "joint")
SHOWN = 100  # a line shows this many characters from the end of a live text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hubert-eff transcribe`."""
    parser.add_argument("checkpoint", metavar="CKPT", help="a fine-tuned checkpoint (configs/finetune)")
    parser.add_argument(
        "audio", nargs="*", type=Path, metavar="AUDIO", help="recordings of any rate; with --stream a 16 kHz mono file, or - for raw PCM"
    )
    parser.add_argument(
        "--search", metavar="NAME[,NAME]",
        help="greedy: the best label of each frame; beam: CTC prefix beam search; rescore: its texts ranked by the attention decoder too; "
        "attention: letter by letter by the decoder alone; joint: the same with CTC's prefix scores (default: greedy, or attention where "
        "the CTC layer has learned nothing; with --score all that the model can do; with --stream beam)",
    )  # fmt: skip
    parser.add_argument("--beam", type=whole(COUNT), default=10, help="number of texts that a beam search keeps (default: %(default)d)")
    parser.add_argument(
        "--ctc-weight", type=float, default=0.5,
        help="weight W of CTC's log-probability; rescore: decoder + W CTC; joint: (1 - W) decoder + W CTC (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--length-penalty", type=float, default=0.0, metavar="A",
        help="attention and joint: divide the score of a text of U symbols by ((5 + U) / 6) ** A, against texts that are too short, such "
        "as by 0.6 (default: %(default)g, none)",
    )  # fmt: skip
    parser.add_argument(
        "--chunk-size", type=int, metavar="N",
        help="frames of 20 ms in a chunk, for a model pre-trained with model.streaming=true (default: the whole recording at once)",
    )  # fmt: skip
    parser.add_argument(
        "--left-chunks", type=int, default=-1, help="number of chunks before its own that a frame attends to (default: -1, all)"
    )
    parser.add_argument(
        "--modes", metavar="MODE[,MODE]",
        help="chunk size and left chunks as FRAMES-CHUNKS, such as 16-4 or 16-inf, or full (default: "
        "full; with --score and a model that streams 16-4,16-inf,full)",
    )  # fmt: skip
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="DIR",
        help="folder that `hubert-eff manifest` wrote, whose utterances are transcribed instead of AUDIO",
    )
    parser.add_argument("--split", default="valid", help="split of the manifest (default: %(default)s)")
    parser.add_argument(
        "--labels", default="ltr", help="transcripts of the manifest: SPLIT.LABELS, or else parts.tsv (default: %(default)s)"
    )
    parser.add_argument("--utterances", type=whole(COUNT), metavar="N", help="use the first N utterances of the manifest (default: all)")
    parser.add_argument(
        "--score", action="store_true", help="print word and character error rates of the manifest for each search and mode"
    )
    parser.add_argument(
        "--stream", metavar="MODE", help="print the text as it comes, chunk by chunk (16-4, 16-inf), and then latency and real-time factor"
    )
    parser.add_argument(
        "--json", action="store_true", help="print texts, scores and all texts of a beam as JSON; for a stream, one JSON line per text"
    )


def run(args: argparse.Namespace) -> int:
    """Recognize and print; returns 1 if recordings were left out, 2 if all were."""
    if args.score and args.manifest is None:
        raise UserError("--score compares texts with transcripts: name the manifest that has them, --manifest DIR --split valid")
    if args.stream is not None:
        return _stream(args)
    if (args.manifest is None) == (not args.audio):
        raise UserError("name recordings, or a manifest with --manifest DIR, and not both")
    return _manifest(args) if args.manifest is not None else _recordings(args)


def _searches(text: str | None, default: list[str]) -> list[str]:
    from ..errors import unknown

    names = default if text is None else text.split(",")
    for name in names:
        if name not in SEARCHES:
            raise unknown("search", name, SEARCHES)
    return list(dict.fromkeys(names))


def _modes(args: argparse.Namespace, default: list[str]) -> list[str]:
    """The names of modes that `parse_mode` reads."""
    if args.chunk_size is not None and args.modes is not None:
        raise UserError("--chunk-size and --modes say the same: leave one out")
    if args.chunk_size is not None:
        return [f"{args.chunk_size}-{'inf' if args.left_chunks == -1 else args.left_chunks}"]
    return default if args.modes is None else list(dict.fromkeys(args.modes.split(",")))


def _one(names: list[str], option: str) -> str:
    if len(names) > 1:
        raise UserError(f"{option} takes one name here, not {', '.join(names)}: several are compared with --manifest DIR --score")
    return names[0]


def _recordings(args: argparse.Namespace) -> int:
    from ..recognition import load_recognizer, transcribe
    from ..recognition.recordings import read_recording
    from ..recognition.search import check_search, default_search
    from ..streaming.stream import parse_mode
    from ..utils.progress import progress

    model = load_recognizer(args.checkpoint)
    search = _one(_searches(args.search, [default_search(model)]), "--search")
    check_search(model, search, args.beam, args.ctc_weight, args.length_penalty)
    if args.chunk_size is None:
        size, left = parse_mode(_one(_modes(args, ["full"]), "--modes"))
    else:
        size, left = args.chunk_size, args.left_chunks
    model.hubert.chunks(size, left)
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
            texts = transcribe(model, wav, search, args.beam, args.ctc_weight, args.length_penalty, chunk_size=size, left_chunks=left)
            if args.json:
                kept = [{"text": h.text, "score": round(h.score, 4)} for h in texts]
                found.append({"audio": printable(path), "text": texts[0].text, "hypotheses": kept})
            else:
                print(f"{printable(path)}\t{texts[0].text}", flush=True)
    if args.json:
        values = {"checkpoint": args.checkpoint, "search": search, "recordings": found, "left_out": [printable(x) for x in left_out]}
        print(json.dumps(values, indent=2, ensure_ascii=False))
    return 0 if not left_out else 1 if len(left_out) < len(args.audio) else 2


def _manifest(args: argparse.Namespace) -> int:
    from ..data.tsv import read_manifest
    from ..recognition import load_recognizer
    from ..recognition.evaluation import evaluate, table
    from ..recognition.search import default_search, searches_of
    from ..recognition.transcripts import read_transcripts
    from ..streaming.stream import MODES

    manifest = read_manifest(args.manifest / f"{args.split}.tsv")
    said, source = read_transcripts(manifest, args.manifest, args.labels) if args.score else ([""] * len(manifest.names), None)
    model = load_recognizer(args.checkpoint)
    said = [model.alphabet.cased(text) for text in said[: args.utterances]]
    searches = _searches(args.search, searches_of(model) if args.score else [default_search(model)])
    modes = _modes(args, list(MODES) if args.score and model.hubert.config.streaming else ["full"])
    if not args.score:
        _one(searches, "--search"), _one(modes, "--modes")
    found = evaluate(model, manifest, said, searches, modes, args.beam, args.ctc_weight, args.length_penalty)
    if args.json:
        names = {"checkpoint": args.checkpoint, "manifest": str(manifest.path), "transcripts": str(source) if source else None}
        texts = [{"audio": name, "text": text} for name, text in zip(found.names, found.rows[0].texts, strict=True)]
        plain = found.plain() if args.score else {"recordings": texts}
        print(json.dumps({**names, **plain}, indent=2, ensure_ascii=False))
    elif args.score:
        print(table(found))
    else:
        for name, text in zip(found.names, found.rows[0].texts, strict=True):
            print(f"{printable(name)}\t{text}")
        print(f"{len(found.names)} utterances, {found.seconds:.1f} s: RTF {found.rtf(found.rows[0]):.4f}", file=sys.stderr)
    return 0


def _stream(args: argparse.Namespace) -> int:
    from ..recognition import load_recognizer
    from ..recognition.live import Partial, live_text
    from ..streaming.live import pieces_of
    from ..streaming.stream import parse_mode

    if args.manifest is not None or len(args.audio) != 1:
        raise UserError(f"--stream takes one file, or - for standard input, not {len(args.audio)}")
    search = _one(_searches(args.search, ["beam"]), "--search")
    if search != "beam":
        raise UserError(f"--stream searches by beam alone: {search} needs the whole recording, or keeps no other text than the best")
    if args.chunk_size is not None or args.modes is not None:
        raise UserError("--stream MODE says what --chunk-size and --modes do: leave them out")
    size, left = parse_mode(args.stream)
    if size is None:
        raise UserError("mode full is the whole recording at once: leave out --stream")
    model = load_recognizer(args.checkpoint)
    model.check_ctc()

    def show(heard: Partial) -> None:
        if args.json:
            line: dict[str, Any] = {"seconds": round(heard.seconds, 3), "text": heard.text, "settled": heard.words, "final": heard.final}
            print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            text = heard.text if heard.final or len(heard.text) <= SHOWN else "..." + heard.text[-SHOWN:]
            print(f"{'final' if heard.final else f'{heard.seconds:5.2f}'} {text}".rstrip(), flush=True)

    report = live_text(model, pieces_of(args.audio[0], sys.stdin.buffer), args.stream, size, left, args.beam, show)
    print(json.dumps(report.plain()) if args.json else report)
    return 0
