"""ASR and PR: sentences of American voices, laid out as LibriSpeech, and the lexicon that turns its words into phones.

    LibriSpeech/SPEAKERS.TXT                                    ID | SEX | SUBSET | MINUTES | NAME, after a line with these names
    LibriSpeech/{train-clean-100,dev-clean,test-clean}/
        SPEAKER/CHAPTER/SPEAKER-CHAPTER-0000.flac               both numbers; 16 kHz, mono
        SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt               SPEAKER-CHAPTER-0000 THE WORDS IN CAPITALS
    LibriSpeech/lexicon/librispeech-lexicon-200k-g2p.txt        WORD PH0 PH PH1, the name S3PRL downloads

`s3prl.dataio.corpus.LibriSpeech` reads SPEAKERS.TXT and the splits (SuperbASR, SuperbPR); `downstream/asr` and `downstream/ctc` read the
splits through lists of paths and lengths. The lexicon is what `s3prl.dataio.encoder.G2P` and `downstream/ctc` look words up in: phones of
ARPAbet with the stress on vowels (0 none, 1 primary, 2 secondary), the first line of a word counts.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

from hubert_eff.data.synthetic.espeak import pronounce
from hubert_eff.data.synthetic.sentences import sentence
from hubert_eff.errors import UserError
from hubert_eff.utils.files import write_text

from .common import disk, divide, keep_or_make, say, sex, shares, voices, words_of

FOLDER = "LibriSpeech"
LEXICON = "lexicon/librispeech-lexicon-200k-g2p.txt"
SPLITS = {"train-clean-100": 0.76, "dev-clean": 0.12, "test-clean": 0.12}
SPEAKERS = 24
CHAPTER = 8  # utterances

# espeak-ng's American English in IPA -> ARPAbet; a vowel stands without its stress
_VOWELS = {
    "aɪɚ": "AY ER", "aɪə": "AY AH", "aɪ": "AY", "aʊ": "AW", "eɪ": "EY", "oʊ": "OW", "ɔɪ": "OY", "oː": "AO", "ɔː": "AO", "ɑː": "AA",
    "iː": "IY", "uː": "UW", "ɜː": "ER", "ɚ": "ER", "ə": "AH", "ɐ": "AH", "ʌ": "AH", "æ": "AE", "ɛ": "EH", "ɪ": "IH", "ᵻ": "IH",
    "i": "IY", "u": "UW", "ʊ": "UH", "ɔ": "AO", "ɑ": "AA", "a": "AA", "o": "OW", "e": "EH",
}  # fmt: skip
_CONSONANTS = {
    "tʃ": "CH", "dʒ": "JH", "b": "B", "d": "D", "ð": "DH", "f": "F", "ɡ": "G", "h": "HH", "j": "Y", "k": "K", "l": "L", "m": "M",
    "n": "N", "ŋ": "NG", "p": "P", "ɹ": "R", "s": "S", "ʃ": "SH", "t": "T", "ɾ": "T", "θ": "TH", "v": "V", "w": "W", "z": "Z", "ʒ": "ZH",
}  # fmt: skip
_STRESS = {"ˈ": "1", "ˌ": "2"}
_SYMBOL = re.compile("|".join(sorted((*_VOWELS, *_CONSONANTS, *_STRESS), key=len, reverse=True)) + "|.")
_ARTICLE = {"A": "ə"}  # alone, the synthesizer takes it for the letter


def make(out: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Write the data set to `out`; `minutes` of speech by `SPEAKERS` voices, none of them in two splits."""
    return keep_or_make(out, [FOLDER], {"minutes": minutes, "seed": seed}, lambda draft: _write(draft / FOLDER, minutes, seed))


def _write(root: Path, minutes: float, seed: int) -> dict[str, Any]:
    count = min(SPEAKERS, max(len(SPLITS), int(minutes * 6)))
    cast = list(enumerate(voices(count, FOLDER, seed, "en-us"), start=1001))
    seconds, speakers = shares(minutes, SPLITS), divide(cast, SPLITS)
    table = [f"{';ID':<5}|{'SEX':<4}| {'SUBSET':<17}|{'MINUTES':<8}| NAME\n"]
    vocabulary: set[str] = set()
    with disk(root, minutes) as recorder:
        for split in SPLITS:
            for number, voice in speakers[split]:
                rng = random.Random(f"{FOLDER} {seed} {number}")
                before, spoken, wanted = recorder.seconds, 0, seconds[split] / len(speakers[split])
                while spoken == 0 or recorder.seconds - before < wanted:
                    chapter, lines = 100 * number + spoken // CHAPTER, []
                    for index in range(CHAPTER):
                        text = sentence(rng)
                        words = words_of(text)
                        vocabulary.update(words)
                        name = f"{number}-{chapter}-{index:04d}"
                        recorder.save(f"{split}/{number}/{chapter}/{name}.flac", say(text, voice, rng).audio)
                        lines.append(f"{name} {' '.join(words)}\n")
                        spoken += 1
                        if recorder.seconds - before >= wanted:
                            break
                    write_text(root / split / str(number) / str(chapter) / f"{number}-{chapter}.trans.txt", "".join(lines))
                spent = (recorder.seconds - before) / 60
                table.append(f"{number:<5}| {sex(voice)}  | {split:<17}| {spent:<7.2f}| {voice.name}\n")
    write_text(root / "SPEAKERS.TXT", "".join(table))
    lexicon = arpabet(sorted(vocabulary))
    write_text(root / LEXICON, "".join(f"{word} {' '.join(phones)}\n" for word, phones in lexicon.items()))
    return {**recorder.summary(), "speakers": len(cast), "words": len(vocabulary)}


def arpabet(words: list[str]) -> dict[str, list[str]]:
    """The phones of words in capitals, as the synthesizer's American English says them. Raises `UserError` for a foreign phone."""
    said = pronounce([word.lower() for word in words])
    return {word: _phones(word, _ARTICLE.get(word, ipa)) for word, ipa in zip(words, said)}


def _phones(word: str, ipa: str) -> list[str]:
    phones: list[str] = []
    stress = "0"
    for symbol in _SYMBOL.findall(ipa):
        if symbol in _STRESS:
            stress = _STRESS[symbol]
        elif symbol in _CONSONANTS:
            phones.append(_CONSONANTS[symbol])
        elif symbol in _VOWELS:
            first, *rest = _VOWELS[symbol].split()
            phones += [first + stress, *(vowel + "0" for vowel in rest)]
            stress = "0"
        else:
            raise UserError(f"the synthesizer says '{word}' with '{symbol}' ({ipa}), which ARPAbet has no phone for")
    return phones
