"""IC: spoken commands with an action, an object and a location, laid out as Fluent Speech Commands.

    fluent_speech_commands_dataset/data/{train,valid,test}_data.csv     ,path,speakerId,transcription,action,object,location
    fluent_speech_commands_dataset/data/speaker_demographics.csv        speakerId,sex,accent
    fluent_speech_commands_dataset/wavs/speakers/SPEAKER/ID.wav         `path` of the tables, 16 kHz, mono

`s3prl.dataio.corpus.FluentSpeechCommands` (SuperbIC) and `downstream/fluent_commands` read the three tables. The values of the three
labels are those of the training table: it has to hold every one of them. What is not said is `none`. The 31 intents are the real set's.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hubert_eff.utils.files import write_text

from .common import Disk, disk, divide, keep_or_make, say, sex, shares, voices

FOLDER = "fluent_speech_commands_dataset"
SPLITS = {"train": 0.7, "valid": 0.12, "test": 0.18}
SPEAKERS = 20

_ROOMS = {"kitchen": "in the kitchen", "bedroom": "in the bedroom", "washroom": "in the washroom"}
_PHRASES = {
    "activate": (
        "Turn on the {object}{place}.",
        "Switch on the {object}{place}.",
        "{object}{place} on, please.",
        "Start the {object}{place}.",
    ),
    "deactivate": (
        "Turn off the {object}{place}.",
        "Switch off the {object}{place}.",
        "{object}{place} off, please.",
        "Stop the {object}{place}.",
    ),
    "increase": (
        "Turn up the {object}{place}.",
        "More {object}{place}, please.",
        "Increase the {object}{place}.",
        "Make the {object} higher{place}.",
    ),
    "decrease": (
        "Turn down the {object}{place}.",
        "Less {object}{place}, please.",
        "Decrease the {object}{place}.",
        "Make the {object} lower{place}.",
    ),
    "bring": ("Bring me the {object}.", "Fetch my {object}, please.", "Get me some {object}.", "I need the {object}."),
    "change language": ("Speak {object}.", "Set the language to {object}.", "Switch to {object}, please.", "Use {object} from now on."),
}
_ANY_LANGUAGE = ("Change the language.", "Speak another language.", "Open the language settings.", "I want a different language.")

Intent = tuple[str, str, str]  # action, object, location
INTENTS: tuple[Intent, ...] = (
    *((action, thing, place) for action in ("activate", "deactivate") for thing, place in (
        ("lights", "none"), *(("lights", room) for room in _ROOMS), ("lamp", "none"), ("music", "none"))),
    *((action, thing, place) for action in ("increase", "decrease") for thing, place in (
        ("volume", "none"), ("heat", "none"), *(("heat", room) for room in _ROOMS))),
    *(("bring", thing, "none") for thing in ("newspaper", "juice", "socks", "shoes")),
    *(("change language", language, "none") for language in ("none", "Chinese", "English", "German", "Korean")),
)  # fmt: skip


def make(out: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Write the data set to `out`; about `minutes` of speech, but each intent at least once in training; no voice in two splits."""
    return keep_or_make(out, [FOLDER], {"minutes": minutes, "seed": seed}, lambda draft: _write(draft / FOLDER, minutes, seed))


def _write(root: Path, minutes: float, seed: int) -> dict[str, Any]:
    cast = [(f"synthetic{number:02d}", voice) for number, voice in enumerate(voices(SPEAKERS, FOLDER, seed), start=1)]
    seconds, speakers = shares(minutes, SPLITS), divide(cast, SPLITS)
    with disk(root, minutes) as recorder:
        for split in SPLITS:
            rows = _split(recorder, split, speakers[split], seconds[split], seed)
            write_text(
                root / "data" / f"{split}_data.csv",
                _table(["", "path", "speakerId", "transcription", "action", "object", "location"], rows),
            )
    people = [(name, sex(voice), voice.language) for name, voice in cast]
    write_text(root / "data" / "speaker_demographics.csv", _table(["speakerId", "sex", "accent"], people))
    return {**recorder.summary(), "speakers": len(cast), "intents": len(INTENTS)}


def _split(recorder: Disk, split: str, speakers: Sequence[tuple[str, Any]], seconds: float, seed: int) -> list[tuple[Any, ...]]:
    """Rounds through all intents in a new order each time, the speakers taking turns, until the time is filled."""
    rng = random.Random(f"{FOLDER} {seed} {split}")
    rows: list[tuple[Any, ...]] = []
    least, start = (len(INTENTS) if split == "train" else 1), recorder.seconds
    order: list[Intent] = []
    while len(rows) < least or recorder.seconds - start < seconds:
        order = order or rng.sample(INTENTS, len(INTENTS))
        intent, (name, voice) = order.pop(), speakers[len(rows) % len(speakers)]
        text = command(intent, rng)
        path = f"wavs/speakers/{name}/{split}-{len(rows):05d}.wav"
        recorder.save(path, say(text, voice, rng).audio)
        rows.append((len(rows), path, name, text, *intent))
    return rows


def command(intent: Intent, rng: random.Random) -> str:
    """One of the ways to say an intent."""
    action, thing, place = intent
    if (action, thing) == ("change language", "none"):
        return rng.choice(_ANY_LANGUAGE)
    text = rng.choice(_PHRASES[action]).format(object=thing, place=f" {_ROOMS[place]}" if place != "none" else "")
    return text[0].upper() + text[1:]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()
