"""Word error rates of fine-tuned models: first and second pass, in chunks and with the whole utterance.

    python benchmarks/learning/recognition.py DIR/valid.tsv CKPT... --out FILE.json

First pass: CTC prefix beam search. Second pass: its texts ranked by the attention decoder as well. 16-4: chunks of 16 frames that
attend to 4 chunks before them; 16-inf: to all before; full: the whole utterance. Transcripts are those of parts.tsv beside the
manifest. WER by jiwer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jiwer
import torch

from hubert_eff.recognition import load_recognizer
from hubert_eff.recognition.recordings import read_recording
from hubert_eff.recognition.search import decoder_scores, greedy, prefix_beam
from hubert_eff.streaming.stream import MODES, mode_seconds
from hubert_eff.utils.files import write_json
from hubert_eff.utils.progress import progress

from alignment import true_words  # isort: skip  (beside this script)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("manifest", type=Path, help="SPLIT.tsv, with parts.tsv beside it")
    options.add_argument("checkpoints", nargs="+", help="fine-tuned checkpoints")
    options.add_argument("--beam", type=int, default=10, help="texts that the first pass keeps (default: %(default)d)")
    options.add_argument("--ctc-weight", type=float, default=0.5, help="of the second pass (default: %(default)g)")
    options.add_argument("--utterances", type=int, help="the first so many (default: all)")
    options.add_argument("--out", type=Path, help="write the figures as JSON")
    args = options.parse_args()
    truth = true_words(args.manifest.with_name("parts.tsv"))
    root, *rows = args.manifest.read_text(encoding="utf-8").splitlines()
    names = [row.partition("\t")[0] for row in rows[: args.utterances]]
    result: list[dict[str, Any]] = []
    print("; ".join(f"{mode}: {mode_seconds(mode)}" for mode in MODES))
    print(f"{'':34}{'greedy':>28}{'first pass':>28}{'second pass':>28}")
    print(f"{'WER, %':34}" + "".join(f"{mode:>10}" if mode == "16-4" else f"{mode:>9}" for _ in range(3) for mode in MODES))
    for checkpoint in args.checkpoints:
        model = load_recognizer(checkpoint)
        said: list[str] = []
        heard: dict[tuple[str, str], list[str]] = {}
        with progress(checkpoint, len(names)) as advance, torch.no_grad():
            for name in names:
                wav = read_recording(Path(root) / name)
                said.append(" ".join(word.label for word in truth[name]))
                for mode, (size, left) in MODES.items():
                    encoded, _ = model.encode(wav, chunk_size=size, left_chunks=left)
                    log_probs = model.ctc_log_probs(encoded)[0]
                    found = prefix_beam(log_probs, args.beam)
                    heard.setdefault(("greedy", mode), []).append(model.alphabet.text(greedy(log_probs)))
                    heard.setdefault(("first", mode), []).append(model.alphabet.text(found[0][0]))
                    if model.decoder is not None:
                        second = decoder_scores(model, encoded, [labels for labels, _ in found])
                        best = max(zip(found, second), key=lambda pair: pair[1] + args.ctc_weight * pair[0][1])
                        heard.setdefault(("second", mode), []).append(model.alphabet.text(best[0][0]))
                advance(1)
        wer = {f"{way} {mode}": 100 * jiwer.wer(said, texts) for (way, mode), texts in heard.items()}
        result.append({"checkpoint": checkpoint, "decoder": model.config.decoder_norm if model.decoder else None, "wer": wer})
        cells = (wer.get(f"{way} {mode}") for way in ("greedy", "first", "second") for mode in MODES)
        print(f"{checkpoint[-34:]:34}" + "".join(f"{'' if c is None else f'{c:.1f}':>9}" for c in cells), flush=True)
    if args.out is not None:
        write_json(args.out, {"manifest": str(args.manifest), "words": sum(len(t.split()) for t in said), "models": result})


if __name__ == "__main__":
    main()
