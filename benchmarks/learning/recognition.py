"""Word error rates of fine-tuned models: every search, in chunks and with the whole utterance.

    python benchmarks/learning/recognition.py DIR CKPT... --split valid --out FILE.json

Searches: greedy CTC; first pass, CTC prefix beam search; second pass, its texts ranked by the attention decoder as well; attention, beam
search by the decoder alone; joint, the same with CTC's prefix scores. 16-4: chunks of 16 frames that attend to 4 chunks before them;
16-inf: to all before; full: the whole utterance. As `hubert-eff transcribe --score`, for several models in one table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hubert_eff.data.tsv import read_manifest
from hubert_eff.recognition import load_recognizer
from hubert_eff.recognition.evaluation import evaluate
from hubert_eff.recognition.search import SEARCHES, searches_of
from hubert_eff.recognition.transcripts import read_transcripts
from hubert_eff.streaming.stream import MODES, mode_seconds
from hubert_eff.utils.files import write_json


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("manifest", type=Path, help="folder of SPLIT.tsv and parts.tsv")
    options.add_argument("checkpoints", nargs="+", help="fine-tuned checkpoints")
    options.add_argument("--split", default="valid", help="(default: %(default)s)")
    options.add_argument("--beam", type=int, default=10, help="texts that a search keeps (default: %(default)d)")
    options.add_argument(
        "--ctc-weight", type=float, default=0.5, help="weight of CTC in the second pass and the joint search (default: %(default)g)"
    )
    options.add_argument("--utterances", type=int, help="number of utterances, from the first on (default: all)")
    options.add_argument("--out", type=Path, help="write the figures as JSON")
    args = options.parse_args()
    manifest = read_manifest(args.manifest / f"{args.split}.tsv")
    said, source = read_transcripts(manifest, args.manifest, "ltr")
    result: list[dict[str, Any]] = []
    print("; ".join(f"{mode}: {mode_seconds(mode)}" for mode in MODES))
    print(f"{'':34}" + "".join(f"{search:>22}" for search in SEARCHES))
    print(f"{'WER, %':34}" + "".join(f"{mode:>8}" if mode == "16-4" else f"{mode:>7}" for _ in SEARCHES for mode in MODES))
    for checkpoint in args.checkpoints:
        model = load_recognizer(checkpoint)
        modes = list(MODES) if model.hubert.config.streaming else ["full"]
        texts = [model.alphabet.cased(text) for text in said[: args.utterances]]
        found = evaluate(model, manifest, texts, searches_of(model), modes, args.beam, args.ctc_weight).plain()
        decoder = f"{model.config.decoder_type}, {model.config.decoder_norm}" if model.decoder is not None else None
        result.append({"checkpoint": checkpoint, "decoder": decoder, **{key: found[key] for key in ("utterances", "seconds", "ways")}})
        rates = {(way["search"], way["mode"]): way["wer"]["rate"] for way in found["ways"]}
        cells = (rates.get((search, mode)) for search in SEARCHES for mode in MODES)
        widths = (8 if mode == "16-4" else 7 for _ in SEARCHES for mode in MODES)
        print(f"{checkpoint[-34:]:34}" + "".join(f"{'' if c is None else f'{c:.1f}':>{w}}" for c, w in zip(cells, widths)), flush=True)
    if args.out is not None:
        words = result[0]["ways"][0]["wer"]["total"]
        write_json(args.out, {"manifest": str(manifest.path), "transcripts": str(source), "words": words, "models": result})


if __name__ == "__main__":
    main()
