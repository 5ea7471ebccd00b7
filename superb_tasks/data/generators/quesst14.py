"""QbE: spoken queries and sentences that hold them or not, laid out as QUESST 2014.

    quesst14Database/Audio/quesst14_00001.wav                               what is searched; 16 kHz, mono
    quesst14Database/{dev,eval}_queries/quesst14_{dev,eval}_0001.wav        what is searched for
    quesst14Database/scoring/language_key_{utterances,dev,eval}.lst         quesst14Database/Audio/quesst14_00001.wav nnenglish
    quesst14Database/scoring/groundtruth_quesst14_{dev,eval}/               which sentences hold which query, in NIST's STD formats:
        quesst14_{dev,eval}.rttm                                            LEXEME quesst14_00001 1 START DURATION QUERY lex <NA> <NA>
        quesst14_{dev,eval}.ecf.xml, quesst14_{dev,eval}.tlist.xml          the recordings; the queries

`downstream/quesst14_dtw` and `s3prl.dataio.corpus.Quesst14` read the three lists, take what is `nnenglish` in them and drop the first
folder of its path. Nothing is trained. Queries are two words, said by other voices than the sentences.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from hubert_eff.config import SAMPLE_RATE
from hubert_eff.data.synthetic.sentences import sentence
from hubert_eff.utils.files import write_text

from .common import disk, keep_or_make, say, voices

FOLDER = "quesst14Database"
LANGUAGE = "nnenglish"
SPEAKERS, QUERY_SPEAKERS = 16, 6
QUERIES_PER_MINUTE, SENTENCES_PER_MINUTE = 1.5, 6.0  # of each of the two sets: of queries, and of sentences that hold one
_FIRST = tuple("velvet silver hungry frozen curious modern golden wicked noisy purple hollow secret central busy famous".split())
_SECOND = tuple("dolphin captain sandwich island guitar volcano garage cabbage tunnel package dentist carpet meadow rocket puppet".split())
_CARRIERS = (
    "We talked about the {} all afternoon.", "Nobody had ever seen a {} in that town.", "Is there another {} behind the fence?",
    "She wrote a long letter to the {}.", "A {} is what I would like to see.", "They left the {} where it was.",
    "My uncle remembers the {} very well.", "Please tell the children about the {}.",
)  # fmt: skip


def make(out: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Write the data set to `out`; about `minutes` of sentences, of which two thirds hold a query, and the queries."""
    return keep_or_make(out, [FOLDER], {"minutes": minutes, "seed": seed}, lambda draft: _write(draft / FOLDER, minutes, seed))


def _write(root: Path, minutes: float, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{FOLDER} {seed}")
    cast = voices(SPEAKERS, FOLDER, seed)
    askers, readers = cast[:QUERY_SPEAKERS], cycle(cast[QUERY_SPEAKERS:])
    queries = min(max(2, round(minutes * QUERIES_PER_MINUTE)), len(_FIRST) * len(_SECOND) // 2)
    chosen = rng.sample([f"{first} {second}" for first in _FIRST for second in _SECOND], 2 * queries)
    sets = {"dev": chosen[:queries], "eval": chosen[queries:]}
    wanted = chosen * max(2, round(minutes * SENTENCES_PER_MINUTE / queries))
    rng.shuffle(wanted)
    texts: list[str | None] = []
    for number, term in enumerate(wanted, start=1):  # a sentence without a query follows two with one
        texts += [term] if number % 2 else [term, None]
    names: dict[str, list[str]] = {"utterances": []}
    durations: dict[str, float] = {}
    found: dict[str, list[tuple[str, float, float]]] = {text: [] for text in chosen}
    with disk(root, minutes) as recorder:
        for asked in texts:
            said = sentence(rng) if asked is None else rng.choice(_CARRIERS).format(asked)
            speech = say(said, next(readers), rng)
            name = f"quesst14_{len(durations) + 1:05d}"
            durations[name] = recorder.save(f"Audio/{name}.wav", speech.audio)
            names["utterances"].append(f"Audio/{name}.wav")
            if asked is not None:
                found[asked].append((name, *_span(speech.words, asked)))
        for part, terms in sets.items():
            names[part] = []
            for number, term in enumerate(terms, start=1):
                speech = say(f"{term}.", rng.choice(askers), rng)
                start, end = (round(t * SAMPLE_RATE) for t in (speech.words[0].start, speech.words[-1].end))
                path = f"{part}_queries/quesst14_{part}_{number:04d}.wav"
                recorder.save(path, speech.audio[start:end])
                names[part].append(path)
    for key, paths in names.items():
        write_text(root / "scoring" / f"language_key_{key}.lst", "".join(f"{FOLDER}/{path} {LANGUAGE}\n" for path in paths))
    for part, terms in sets.items():
        _truth(root / "scoring" / f"groundtruth_quesst14_{part}", f"quesst14_{part}", [found[term] for term in terms], durations)
    return {**recorder.summary(), "queries": 2 * queries, "sentences": len(durations)}


def _span(words: Sequence[Any], term: str) -> tuple[float, float]:
    """Start and duration of the term in a sentence, in seconds; words that were run together are taken whole."""
    inside = [word for word in words if set(word.label.split()) & set(term.split())]
    return inside[0].start, inside[-1].end - inside[0].start


def _truth(folder: Path, name: str, occurrences: Sequence[Sequence[tuple[str, float, float]]], durations: dict[str, float]) -> None:
    """The three files of NIST's spoken term detection for one set of queries."""
    terms = [f"{name}_{number:04d}" for number in range(1, len(occurrences) + 1)]
    lines = [
        f"LEXEME {recording} 1 {start:.3f} {duration:.3f} {term} lex <NA> <NA>\n"
        for term, places in zip(terms, occurrences)
        for recording, start, duration in places
    ]
    write_text(folder / f"{name}.rttm", "".join(lines))
    ecf = ElementTree.Element("ecf", source_signal_duration=f"{sum(durations.values()):.3f}", language="english", version="1")
    for recording, seconds in durations.items():
        ElementTree.SubElement(
            ecf, "excerpt", audio_filename=f"{recording}.wav", channel="1", tbeg="0.000", dur=f"{seconds:.3f}", source_type="bnews"
        )
    tlist = ElementTree.Element("termlist", ecf_filename=f"{name}.ecf.xml", language="english", encoding="UTF-8", version="1")
    for term in terms:
        ElementTree.SubElement(ElementTree.SubElement(tlist, "term", termid=term), "termtext").text = term
    for ending, tree in (("ecf", ecf), ("tlist", tlist)):
        ElementTree.indent(tree)
        write_text(folder / f"{name}.{ending}.xml", ElementTree.tostring(tree, encoding="unicode", xml_declaration=False) + "\n")
