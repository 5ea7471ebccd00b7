"""`hubert-eff align CKPT AUDIO TEXT`: the time of each letter and word, from gradients; `--check-flip`: does the encoder reverse time?"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import COUNT
from ..errors import UserError, printable, require, unknown
from ._numbers import whole

LONGEST_NAME = 200  # bytes, of 255 that file systems have; suffixes follow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hubert-eff align`."""
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="a fine-tuned checkpoint (configs/finetune); with --manifest also a folder of checkpoints, taken by updates",
    )
    parser.add_argument("audio", nargs="?", type=Path, metavar="AUDIO", help="a recording of any sample rate")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="transcript of the recording, or the path of a text file")
    parser.add_argument(
        "--method",
        choices=("gradient", "ctc"),
        default="gradient",
        help="method: gradients, or CTC forced alignment for comparison (default: %(default)s)",
    )
    parser.add_argument(
        "--layer", default="input", metavar="PLACE",
        help="place of the gradients: the audio (input), what enters block 1 (0) or leaves block L (L)",
    )  # fmt: skip
    parser.add_argument(
        "--head",
        choices=("ctc", "attention"),
        default=None,
        help="head whose letter probabilities are used (default: the decoder's where there is one)",
    )
    parser.add_argument(
        "--check-flip",
        action="store_true",
        help="say whether the encoder reverses time, in which block, and what happens inside the blocks",
    )
    parser.add_argument(
        "--manifest", type=Path, metavar="DIR",
        help="count the utterances of a manifest that each checkpoint reverses; with --check-flip, instead of AUDIO TEXT",
    )  # fmt: skip
    parser.add_argument("--split", default="valid", help="split of the manifest (default: %(default)s)")
    parser.add_argument(
        "--labels", default="ltr", help="transcripts of the manifest: SPLIT.LABELS, or else parts.tsv (default: %(default)s)"
    )
    parser.add_argument(
        "--utterances", type=whole(COUNT), default=20, metavar="N", help="use the first N utterances of the manifest (default: %(default)d)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for NAME.ctm, NAME.TextGrid, NAME.json and pictures")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Align and print; returns 0."""
    from ..analysis.alignment import block_norms, cross_attention, ctc_alignment, direction, gradients, segments, viterbi
    from ..analysis.alignment_files import draw_cross_attention
    from ..recognition import load_recognizer
    from ..recognition.recordings import read_recording
    from ..utils.files import writable

    if args.manifest is not None:
        return _check_manifest(args)
    if args.audio is None or args.text is None:
        raise UserError("name a recording and what is said in it; or, with --check-flip, a manifest with --manifest DIR")
    model = load_recognizer(args.checkpoint)
    places = ["input", *map(str, range(len(model.hubert.encoder.layers) + 1))]
    if args.layer not in places:
        raise unknown("value of --layer", args.layer, places)
    head = args.head or ("attention" if model.decoder is not None else "ctc")
    if args.out is not None:
        require("matplotlib", "plot", "--out")
        writable(args.out)
    text = _text(args.text)
    wav = read_recording(args.audio)
    labels = model.alphabet.spell_any(text)
    model.check_length(labels, wav.size(1), str(args.audio))
    if args.method == "ctc" and (args.check_flip or args.head or args.layer != "input"):
        raise UserError("--method ctc uses no gradients: leave out --check-flip, --head and --layer")
    found = {} if args.method == "ctc" else gradients(model, wav, labels, head)
    spans = ctc_alignment(model, wav, labels) if args.method == "ctc" else viterbi(found[args.layer])
    letters, words = segments(model, labels, spans)
    result: dict[str, Any] = {
        "audio": printable(args.audio), "method": args.method, **({} if args.method == "ctc" else {"layer": args.layer, "head": head}),
        "words": [asdict(word) for word in words], "letters": [asdict(letter) for letter in letters],
    }  # fmt: skip
    norms, energies = block_norms(model, wav) if args.check_flip else ({}, {})
    crossed = cross_attention(model, wav, labels) if args.check_flip and model.decoder is not None else []
    if args.check_flip:
        way = direction(found, crossed)
        result["time"] = {**asdict(way), "verdict": str(way), "norms": norms}
    if args.out is not None:
        _write(args.out, _name(args.audio), result, letters, words, wav, found, args.layer, norms, energies)
        if crossed:
            name, rows = _name(args.audio), [model.alphabet.symbols[label - 1] for label in labels]
            draw_cross_attention(crossed, rows, args.out / f"{name}-attention.png", f"{name}: cross-attention")
    if args.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return 0
    for word in words:
        print(f"{word.start:8.2f} {word.end:8.2f}  {word.label}")
    if args.check_flip:
        print("correlation between the order of the letters and the places of their gradients:")
        for place, value in {**way.places, **way.cross_attention}.items():
            print(f"  {place:16} {value:+.2f}")
        print(way)
    return 0


def _check_manifest(args: argparse.Namespace) -> int:
    """Measure the direction of time over a split, for every checkpoint of a folder."""
    from ..analysis.flips import checkpoints_of, over_utterances, table
    from ..data.tsv import read_manifest
    from ..recognition import load_recognizer
    from ..recognition.recordings import read_recording
    from ..recognition.transcripts import read_transcripts
    from ..utils.files import write_json
    from ..utils.progress import progress

    if not args.check_flip or args.audio is not None or args.method != "gradient" or args.layer != "input":
        raise UserError("--manifest goes with --check-flip and without AUDIO, TEXT, --method and --layer: it counts reversals of time")
    checkpoints = checkpoints_of(Path(args.checkpoint))
    manifest = read_manifest(args.manifest / f"{args.split}.tsv")
    said, source = read_transcripts(manifest, args.manifest, args.labels)
    said = said[: args.utterances]
    wavs = [read_recording(manifest.root / name) for name in manifest.names[: len(said)]]
    rows = []
    with progress("checkpoints", len(checkpoints)) as advance:
        for updates, file in checkpoints:
            model = load_recognizer(file)
            head = args.head or ("attention" if model.decoder is not None else "ctc")
            labels = [model.alphabet.spell(model.alphabet.cased(text), f"{source}: {text[:20]!r}") for text in said]
            rows.append((updates, over_utterances(model, zip(wavs, labels, strict=True), head)))
            advance(1)
    plain = {"manifest": str(manifest.path), "checkpoints": [{"updates": updates, **flips.plain()} for updates, flips in rows]}
    if args.out is not None:
        write_json(args.out / "flips.json", plain)
    print(json.dumps(plain, indent=2) if args.json else table(rows))
    return 0


def _text(given: str) -> str:
    """The text itself, or the content of a file of that name. Raises `UserError` for a file without text and for a folder."""
    from ..data.lines import read_lines

    path = Path(given)
    try:
        if not given or not path.exists() or (path.is_dir() and os.sep not in given):
            return given
    except (OSError, ValueError):  # the text is too long to be a file name
        return given
    if not path.is_file():
        raise UserError(f"{path} is not a text file: give the text itself, or a text file in UTF-8")
    return " ".join(line for _, line in read_lines(path, "give the text itself, or a text file in UTF-8"))


def _name(path: Path) -> str:
    """A name for output files and CTM columns: the recording's, shortened, without blanks and unprintable characters."""
    name = "_".join(printable(path.stem).split()) or "recording"
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return name.encode()[: LONGEST_NAME - 9].decode("utf-8", "ignore") + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]


def _write(
    out: Path, name: str, result: dict[str, Any], letters: Any, words: Any, wav: Any, found: Any, layer: str, norms: Any, energies: Any
) -> None:
    from ..analysis.alignment_files import ctm, draw_alignment, draw_blocks, textgrid
    from ..config import SAMPLE_RATE
    from ..utils.files import write_json, write_text

    write_text(out / f"{name}.ctm", ctm(name, words))
    write_text(out / f"{name}.TextGrid", textgrid({"words": words, "letters": letters}, wav.size(1) / SAMPLE_RATE))
    write_json(out / f"{name}.json", result)
    if found:
        draw_alignment(found, letters, layer, wav, out / f"{name}.png", f"{name}: log L2 norm of gradients")
    if norms:
        draw_blocks(norms, energies, out / f"{name}-blocks.png", f"{name}: inside the blocks")
