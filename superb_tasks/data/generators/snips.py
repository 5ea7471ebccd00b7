"""SF: requests with slots, said by sixteen voices, laid out as Audio SNIPS.

    SNIPS/{train,valid,test}/SPEAKER-snips-SPLIT-NUMBER.wav     16 kHz, mono
    SNIPS/all.iob.snips.txt     ID BOS WORDS IN CAPITALS EOS <tab> O tag tag ... Intent; a tag is O or the name of a slot
    SNIPS/slots.txt             O, then the names of the slots

`s3prl.dataio.corpus.SNIPS` (SuperbSF) and `downstream/ctc` read both files and the recordings of those speakers that their settings name
for the split: the names of Amazon Polly's voices, which stand here for voices of espeak-ng. Equal tags in a row are one slot.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

from hubert_eff.utils.files import write_text

from .common import disk, keep_or_make, say, shares, voices, words_of

FOLDER = "SNIPS"
SPLITS = {"train": 0.7, "valid": 0.12, "test": 0.18}
SPEAKERS = {  # of S3PRL's settings
    "train": ("Ivy", "Joanna", "Joey", "Justin", "Kendra", "Kimberly", "Matthew", "Salli"),
    "valid": ("Aditi", "Amy", "Geraint", "Nicole"),
    "test": ("Brian", "Emma", "Raveena", "Russell"),
}
SLOTS: dict[str, tuple[str, ...]] = {
    "artist": ("Mary Jones", "The Red Foxes", "Oliver Stone", "Blue Harbour", "Anna Lee", "The Night Owls"),
    "playlist": ("morning run", "rainy days", "dinner party", "long drive", "quiet evening", "summer hits"),
    "music_item": ("song", "album", "track", "tune"),
    "genre": ("jazz", "folk", "rock", "country", "opera"),
    "city": ("London", "Boston", "Madrid", "Vienna", "Chicago", "Dublin", "Oslo"),
    "timeRange": ("tomorrow", "on Friday", "next week", "this evening", "at noon", "in two hours"),
    "condition_description": ("rain", "snow", "fog", "storms", "sunshine"),
    "party_size_number": ("two", "three", "four", "five", "six", "nine"),
    "restaurant_type": ("restaurant", "bar", "bistro", "steakhouse", "bakery"),
    "cuisine": ("Italian", "Greek", "Indian", "Mexican", "Thai"),
    "rating_value": ("one", "two", "three", "four", "five"),
    "rating_unit": ("stars", "points"),
    "object_type": ("book", "novel", "painting", "game", "movie"),
    "object_name": ("The Silent River", "Winter Garden", "A Letter Home", "The Last Lighthouse", "Golden Years"),
    "movie_type": ("films", "movies", "cartoons"),
    "location_name": ("Star Cinema", "the Palace", "Grand Theatre", "Park Hall"),
}
TEMPLATES: dict[str, tuple[str, ...]] = {
    "AddToPlaylist": (
        "Add this {music_item} to my {playlist} playlist",
        "Put {artist} on the list called {playlist}",
        "Add a {genre} {music_item} by {artist}",
    ),
    "BookRestaurant": (
        "Book a table for {party_size_number} at a {restaurant_type} in {city}",
        "I need a {cuisine} {restaurant_type} {timeRange}",
        "Find a {restaurant_type} in {city} for {party_size_number} people",
    ),
    "GetWeather": (
        "Will there be {condition_description} in {city} {timeRange}",
        "What is the weather like {timeRange} in {city}",
        "Tell me if {city} gets {condition_description}",
    ),
    "PlayMusic": (
        "Play a {music_item} by {artist}",
        "I want to hear some {genre}",
        "Play the {music_item} by {artist} again",
        "Start my {playlist} playlist",
    ),
    "RateBook": (
        "Give this {object_type} {rating_value} {rating_unit}",
        "I rate {object_name} {rating_value} of five",
        "Rate the {object_type} {object_name} with {rating_value} {rating_unit}",
    ),
    "SearchCreativeWork": (
        "Find the {object_type} called {object_name}",
        "Show me {object_name}",
        "Where can I get the {object_type} {object_name}",
    ),
    "SearchScreeningEvent": (
        "Which {movie_type} are shown at {location_name}",
        "When is {object_name} on at {location_name}",
        "Show me {movie_type} in {city} {timeRange}",
    ),
}


def make(out: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Write the data set to `out`; about `minutes` of speech, at least one sentence per speaker."""
    return keep_or_make(out, [FOLDER], {"minutes": minutes, "seed": seed}, lambda draft: _write(draft / FOLDER, minutes, seed))


def _write(root: Path, minutes: float, seed: int) -> dict[str, Any]:
    names = [name for split in SPLITS for name in SPEAKERS[split]]
    cast = dict(zip(names, voices(len(names), FOLDER, seed)))
    seconds = shares(minutes, SPLITS)
    lines: list[str] = []
    with disk(root, minutes) as recorder:
        for split, speakers in SPEAKERS.items():
            rng = random.Random(f"{FOLDER} {seed} {split}")
            start, number = recorder.seconds, 0
            while number < len(speakers) or recorder.seconds - start < seconds[split]:
                speaker = speakers[number % len(speakers)]
                name = f"{speaker}-snips-{split}-{number}"
                intent, text, words, tags = request(rng)
                recorder.save(f"{split}/{name}.wav", say(text, cast[speaker], rng).audio)
                lines.append(f"{name} BOS {' '.join(words)} EOS\tO {' '.join(tags)} {intent}\n")
                number += 1
    write_text(root / "all.iob.snips.txt", "".join(lines))
    write_text(root / "slots.txt", "\n".join(["O", *SLOTS]))  # without a last line break, which S3PRL would take for a slot
    return {**recorder.summary(), "speakers": len(cast), "slots": len(SLOTS), "intents": len(TEMPLATES)}


def request(rng: random.Random) -> tuple[str, str, list[str], list[str]]:
    """Intent, sentence, its words in capitals and their tags."""
    intent = rng.choice(list(TEMPLATES))
    spoken: list[str] = []
    words: list[str] = []
    tags: list[str] = []
    for part in re.split(r"(\{\w+\})", rng.choice(TEMPLATES[intent])):
        slot = part[1:-1] if part.startswith("{") else ""
        value = rng.choice(SLOTS[slot]) if slot else part
        spoken.append(value)
        words += words_of(value)
        tags += [slot or "O"] * len(words_of(value))
    return intent, "".join(spoken) + ".", words, tags
