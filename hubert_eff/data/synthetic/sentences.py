"""Makes a small English corpus with a synthesizer: transcripts, phone and word timings; offline, and the same for the same seed.

Layout:

    DIR/SPEAKER/SPEAKER-0001.wav   16 kHz, mono, 16-bit PCM, 2 to 6 s
    DIR/transcripts.tsv            path <tab> text
    DIR/alignments.tsv             path <tab> tier (phone | word) <tab> start s <tab> end s <tab> label
    DIR/corpus.json                seed, versions, counts, minutes, the voice of each speaker
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...config import SAMPLE_RATE
from ...errors import UserError
from ...utils.files import replacing, sync_to_disk, temporary_folder, write_json, write_text
from .espeak import Segment, Speech, Voice, speak, version

MIN_SECONDS, MAX_SECONDS = 2.0, 6.0
NOISE_LEVEL = 1e-3  # standard deviation of the added white noise, that of a recording: -60 dB re full scale
MAX_SPEAKERS = 32
MOST_UTTERANCES = 200_000  # more than the longest corpus has

# English accents, and voice variants that sound like people, female and male in turn
_LANGUAGES = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc", "en-gb-x-gbclan", "en-gb-x-gbcwmd")
_VARIANTS = ("f2", "m3", "f5", "m7", "linda", "m1", "f4", "Andy", "steph", "m8", "belinda", "john", "f1", "Lee", "Annie", "m4")

_WORDS: dict[str, tuple[str, ...]] = {
    "name": tuple(
        "Alice Martin Joyce Peter Fiona George Hannah Victor Zoe Thomas Ruth Charles Julia Shawn Beth Oliver Maya Hugh "
        "Agnes Walter Yvonne Keith Laura Edgar".split()
    ),
    "person": tuple(
        "teacher farmer doctor judge nurse sailor baker neighbor painter mother brother cousin engineer child driver "
        "writer singer soldier lawyer guest shepherd keeper".split()
    ),
    "animal": tuple("dog horse rabbit fox spider parrot eagle donkey cow thrush owl monkey goat lion seagull".split()),
    "thing": tuple(
        "letter garden bottle ladder chair window basket picture hammer engine kettle blanket map boat lamp coin bridge "
        "pocket fire box measure vision jacket mirror cushion watch feather needle stamp wheel voice toy path jar".split()
    ),
    "food": tuple("bread cheese soup apples rice fish honey pears butter onions coffee milk carrots cake juice beans oysters".split()),
    "place": tuple(
        "market river village station harbour church kitchen forest mountain school beach library hospital office "
        "valley theatre cottage stable orchard museum".split()
    ),
    "adjective": tuple(
        "old yellow heavy quiet broken strange narrow wooden gentle enormous cheap bright thin rough royal usual loyal "
        "smooth dusty foreign precious shy huge clever tall warm cold unusual younger".split()
    ),
    "past": tuple(
        "carried found painted dropped watched bought repaired followed forgot noticed measured borrowed pushed "
        "remembered chose threw hid polished exchanged enjoyed described counted".split()
    ),
    "verb": tuple("bring sell clean leave show open choose paint check share move fetch watch finish send lose keep join".split()),
    "went": tuple("walked drove hurried travelled wandered ran returned climbed sailed rode moved".split()),
    "adverb": tuple("slowly yesterday again together quickly often carefully alone early never usually gladly".split()),
    "time": tuple(
        (
            "this morning",
            "before lunch",
            "on Thursday",
            "last winter",
            "after the storm",
            "at noon",
            "every evening",
            "in July",
            "two years ago",
            "during the voyage",
            "until midnight",
            "next week",
        )
    ),
    "number": tuple("two three four five six seven eight nine ten twelve fourteen thirty fifty".split()),
    "weather": tuple("rain snow thunder fog sunshine wind ice heat cloud".split()),
    "preposition": tuple("near behind under beside above beyond toward around".split()),
}

_TEMPLATES = (
    "The {adjective} {person} {past} the {thing} {preposition} the {place}.",
    "{name} {past} {number} {thing}s and a {adjective} {thing}.",
    "Would you {verb} the {adjective} {thing} {time}?",
    "{name} and {name} {went} to the {place} {adverb}.",
    "There was too much {weather} {preposition} the {place} {time}.",
    "Please {verb} this {thing} and {verb} the other one.",
    "A {adjective} {animal} {went} {preposition} the {adjective} {place}.",
    "My {person} {adverb} {past} {food} and {food}.",
    "{time}, the {person} {went} home with {number} {animal}s.",
    "I think the {animal} {past} your {thing}.",
    "How did {name} {verb} the {thing} without a {thing}?",
    "No {person} here likes {weather}, {food}, or {adjective} {animal}s.",
    "They {verb} the {food} while we {verb} the {thing}.",
    "Why is the {place} so {adjective} {time}?",
    "{name} said that her {person} {past} a {adjective} {thing}.",
    "If the {weather} stops, {name} will {verb} the {thing}.",
    "The {person} from the {place} {past} both {animal}s {adverb}.",
    "We {went} {preposition} the {place}, then {past} some {food}.",
)  # fmt: skip


def sentence(rng: random.Random) -> str:
    """A random English sentence of about six to thirteen words."""
    used: set[str] = set()

    def fill(slot: re.Match[str]) -> str:
        word = rng.choice([w for w in _WORDS[slot[1]] if w not in used])
        used.add(word)
        return word + ("es" if word.endswith(("x", "s", "ch", "sh")) else "s") * bool(slot[2])

    text = re.sub(r"\{(\w+)\}(s?)", fill, rng.choice(_TEMPLATES))
    text = re.sub(r"\b([Aa]) (?=[aeiou](?!sual))", r"\1n ", text)  # an enormous, but a usual
    return text[0].upper() + text[1:]


def speakers(count: int, seed: int) -> list[Voice]:
    """`count` different voices: accent, variant, pitch, range and rate."""
    rng = random.Random(f"speakers {seed}")
    languages, variants = rng.sample(_LANGUAGES, len(_LANGUAGES)), list(_VARIANTS)
    return [
        Voice(
            languages[i % len(languages)],
            variants[(i + i // len(variants)) % len(variants)],  # a second round shifts against the accents
            pitch=rng.randint(35, 65),
            pitch_range=rng.randint(40, 70),
            rate=rng.randint(145, 185),
        )
        for i in range(count)
    ]


def make_demo(out: str | Path, minutes: float = 20.0, speaker_count: int = 10, seed: int = 1) -> dict[str, Any]:
    """Write the corpus to `out` and return its summary (the content of corpus.json).

    Args:
        out: folder, which appears when it is complete; an earlier demo corpus in it is replaced, anything else is refused.
        minutes: total length of the speech; every speaker gets an equal share, at least one utterance.
        speaker_count: number of voices, each a folder.
        seed: the same seed, numbers and library versions give the same bytes.

    Raises:
        UserError: a number is invalid, the output folder has other content, or a package is missing.
    """
    if not 0 < minutes <= 6000:
        raise UserError(f"--minutes {minutes:g} must be above 0 and at most 6000")
    if not 1 <= speaker_count <= MAX_SPEAKERS:
        raise UserError(f"--speakers {speaker_count} must be 1 to {MAX_SPEAKERS}")
    library = version()
    with _new_folder(Path(out)) as root:
        return _write(root, library, minutes, speaker_count, seed)


def _write(root: Path, library: str, minutes: float, speaker_count: int, seed: int) -> dict[str, Any]:
    import soundfile

    transcripts: list[str] = []
    alignments: list[str] = []
    voices: dict[str, Any] = {}
    total = 0.0
    for number, voice in enumerate(speakers(speaker_count, seed), start=1):
        name = f"speaker{number:02d}"
        (root / name).mkdir(exist_ok=True)
        rng = random.Random(f"text {seed} {number}")
        seconds, count = 0.0, 0
        while seconds < minutes * 60 / speaker_count:
            text = sentence(rng)
            speech = record(text, voice, rng.randrange(2**31))
            if not MIN_SECONDS <= len(speech.audio) / SAMPLE_RATE <= MAX_SECONDS:
                continue
            count += 1
            path = _wav(name, count)
            with replacing(root / path, sync=False) as file:  # reports a full disk
                soundfile.write(file, speech.audio, SAMPLE_RATE, subtype="PCM_16")
            transcripts.append(f"{path}\t{text}\n")
            for tier, segments in (("phone", speech.phones), ("word", speech.words)):
                alignments += [f"{path}\t{tier}\t{s.start:.4f}\t{s.end:.4f}\t{s.label}\n" for s in segments]
            seconds += len(speech.audio) / SAMPLE_RATE
        voices[name] = {**dataclasses.asdict(voice), "utterances": count, "minutes": round(seconds / 60, 3)}
        total += seconds
    write_text(root / "transcripts.tsv", "".join(transcripts))
    write_text(root / "alignments.tsv", "".join(alignments))
    phones = {line.split("\t")[4].strip() for line in alignments if line.split("\t")[1] == "phone"}
    summary = {
        "corpus": "demo",
        "seed": seed,
        "espeak_ng": library,
        "sample_rate": SAMPLE_RATE,
        "utterances": len(transcripts),
        "speakers": speaker_count,
        "minutes": round(total / 60, 3),
        "phones": len(phones),
        "columns": {"transcripts.tsv": ["path", "text"], "alignments.tsv": ["path", "tier", "start", "end", "label"]},
        "voices": voices,
    }
    write_json(root / "corpus.json", summary)
    return summary


def record(text: str, voice: Voice, seed: int, levels: tuple[float, float] = (0.3, 0.8)) -> Speech:
    """Make speech between two silences, at a random peak level in this range, with the faint noise of a recording."""
    speech = speak(text, voice, seed)
    rng = np.random.default_rng(seed)
    before, after = (int(s * SAMPLE_RATE) for s in rng.uniform(0.05, 0.3, 2))
    level = float(rng.uniform(*levels))
    audio = np.pad(speech.audio * (level / max(float(np.abs(speech.audio).max()), 1e-6)), (before, after))
    audio = audio + rng.normal(0.0, NOISE_LEVEL, len(audio))
    shift, end = before / SAMPLE_RATE, len(audio) / SAMPLE_RATE

    def moved(segments: tuple[Segment, ...]) -> list[Segment]:
        return [Segment(s.start + shift, s.end + shift, s.label) for s in segments]

    phones = moved(speech.phones)
    for edge, silence in ((0, Segment(0.0, shift, "sil")), (-1, Segment(end - after / SAMPLE_RATE, end, "sil"))):
        if phones[edge].label == "sil":  # merges two pauses into one
            neighbor = phones[edge]
            phones[edge] = Segment(min(neighbor.start, silence.start), max(neighbor.end, silence.end), "sil")
        else:
            phones.insert(0 if edge == 0 else len(phones), silence)
    return Speech(audio.astype(np.float32), tuple(phones), tuple(moved(speech.words)))


def _content(target: Path) -> set[str]:
    """Relative paths of the files that an earlier run wrote to `target`, by its corpus.json. Raises `UserError` without such a file."""
    record = target / "corpus.json"
    try:
        if not record.is_file() or record.stat().st_size > 1 << 20:
            raise ValueError("no corpus.json of ours")
        summary = json.loads(record.read_text(encoding="utf-8"))
        counts = {str(name): int(voice["utterances"]) for name, voice in summary["voices"].items()}
        if summary["corpus"] != "demo" or sum(counts.values()) > MOST_UTTERANCES:
            raise ValueError("another corpus")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{target} is not empty and has no corpus.json of a demo corpus: name a new folder") from error
    files = {_wav(name, number) for name, count in counts.items() for number in range(1, count + 1)}
    return {"transcripts.tsv", "alignments.tsv", "corpus.json", *counts, *files}


def _wav(speaker: str, number: int) -> str:
    return f"{speaker}/{speaker}-{number:04d}.wav"


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder; its content moves to `out` on success and is deleted on error. An earlier demo corpus is replaced."""
    target = Path(os.path.realpath(out))
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{out} is a file: name a folder for the corpus")
    if target.is_dir() and any(target.iterdir()):
        own = _content(target)
        for path in sorted(target.rglob("*")):
            if (name := path.relative_to(target).as_posix()) not in own:
                raise UserError(f"{target} holds {name!r}, which is not part of its demo corpus: name a new folder")
    with temporary_folder(target) as temporary:
        yield temporary
        sync_to_disk(temporary)
        if not target.is_dir():
            temporary.replace(target)
            return
        for path in target.iterdir():  # the folder itself stays, since it may be the current folder or a mount point
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in sorted(temporary.iterdir(), key=lambda p: p.name == "corpus.json"):
            shutil.move(path, target / path.name)
