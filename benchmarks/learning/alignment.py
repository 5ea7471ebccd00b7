"""Measures how far aligned word boundaries are from the true ones: gradients at every place of the encoder, beside CTC forced alignment.

    python benchmarks/learning/alignment.py CKPT DIR/valid.tsv --truth FILE

FILE is `alignments.tsv` of `hubert-eff corpus demo`, or `parts.tsv` of `hubert-eff manifest --join`, where the words are the recordings
that an utterance was joined of. Printed per way: mean and median of |difference| in ms over all starts and ends of words.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path

from hubert_eff.analysis.alignment import Segment, ctc_alignment, direction, gradients, segments, viterbi
from hubert_eff.recognition import load_recognizer, normalize_text
from hubert_eff.recognition.recordings import read_recording


def true_words(file: Path) -> dict[str, list[Segment]]:
    """The true words of every recording, by path."""
    words: dict[str, list[Segment]] = defaultdict(list)
    with file.open(encoding="utf-8", newline="") as stream:
        if file.name == "parts.tsv":
            for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
                words[row["utterance"]].append(Segment(normalize_text(row["transcript"]), float(row["start"]), float(row["end"])))
        else:
            for path, tier, start, end, label in csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
                if tier == "word" and normalize_text(label):
                    words[path].append(Segment(normalize_text(label), float(start), float(end)))
    return words


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("checkpoint", help="fine-tuned checkpoint")
    options.add_argument("manifest", type=Path, help="SPLIT.tsv")
    options.add_argument("--truth", type=Path, required=True, help="alignments.tsv or parts.tsv")
    options.add_argument(
        "--head", choices=("ctc", "attention"), default="ctc", help="head whose letter probabilities are used (default: %(default)s)"
    )
    options.add_argument("--utterances", type=int, default=20, help="maximum number of utterances (default: %(default)d)")
    options.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = options.parse_args()
    model = load_recognizer(args.checkpoint)
    truth = true_words(args.truth)
    root, *rows = args.manifest.read_text(encoding="utf-8").splitlines()
    errors: dict[str, list[float]] = defaultdict(list)
    turned, words, used = 0, 0, 0
    for row in rows[: args.utterances]:
        name = row.partition("\t")[0]
        said = truth[name]
        wav = read_recording(Path(root) / name)
        labels = model.alphabet.spell_any(" ".join(word.label for word in said))
        found = gradients(model, wav, labels, args.head)
        turned += bool(direction(found).turned)
        ways = {"CTC forced alignment (torchaudio)": ctc_alignment(model, wav, labels)}
        ways |= {f"gradients, {'audio' if place == 'input' else 'state ' + place}": viterbi(scores) for place, scores in found.items()}
        for way, spans in ways.items():
            heard = segments(model, labels, spans)[1]
            if [w.label for w in heard] != [w.label for w in said]:
                raise SystemExit(f"{name}: words {[w.label for w in heard]} instead of {[w.label for w in said]}")
            for a, b in zip(heard, said):
                errors[way] += [abs(a.start - b.start) * 1e3, abs(a.end - b.end) * 1e3]
        words, used = words + len(said), used + 1
    table = [{"way": way, "mean_ms": statistics.mean(e), "median_ms": statistics.median(e)} for way, e in errors.items()]
    if args.json:
        print(json.dumps({"words": words, "utterances": used, "turned": turned, "rows": table}, indent=2))
        return
    print(f"{words} words of {used} utterances; the encoder reverses time in {turned}")
    for line in table:
        print(f"{line['way']:36} mean {line['mean_ms']:6.0f} ms   median {line['median_ms']:6.0f} ms")


if __name__ == "__main__":
    main()
