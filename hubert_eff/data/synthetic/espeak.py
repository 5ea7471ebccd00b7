"""Text to speech with phone and word timings by libespeak-ng of the package `espeakng-loader`, called through ctypes.

`speak` is a pure function: the same text, voice and seed give the same samples, in any order of calls. The library alone is not:
its synthesizer keeps counters and noise states in static variables that its own re-initialization does not reset. Each call therefore
loads a fresh image of the shared library and unloads it afterwards (about 3 ms). Consequences:

- threads of one process take turns (one lock);
- processes are independent of each other, also after a fork, since no state outlives a call;
- if a process also loads libespeak-ng through another package, both share one image: samples may then vary from call to call, and the
  other package has to initialize the library again.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...config import SAMPLE_RATE
from ...errors import UserError, missing_extra, unknown
from ...utils.signals import held

SILENCE = "sil"  # label of a pause in the phone tier

# constants of espeak-ng's speak_lib.h (API revision 12)
_SYNCHRONOUS = 2  # audio is handed to the callback before espeak_Synth returns
_PHONEME_EVENTS, _PHONEME_IPA, _DONT_EXIT = 0x1, 0x2, 0x8000
_UTF8, _POSITION_CHARACTER = 1, 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_EVENT_END_OF_LIST, _EVENT_WORD, _EVENT_PHONEME = 0, 1, 7
_IPA_TEXT = 0x02  # phoneme mode of espeak_TextToPhonemes

_lock = threading.Lock()


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # 1-based, in characters
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True)
class Voice:
    """A speaker: language of espeak-ng, optional voice variant, and how it speaks.

    Args:
        language: espeak-ng language, e.g. "en-us", "en-gb-scotland", "de".
        variant: voice variant of espeak-ng, e.g. "f2", "m3", "klatt2"; empty for the language's own voice.
        pitch: 0 to 99, 50 is the variant's own.
        pitch_range: 0 (monotone) to 99, 50 is normal.
        rate: words per minute, 80 to 450.
    """

    language: str = "en-us"
    variant: str = ""
    pitch: int = 50
    pitch_range: int = 50
    rate: int = 165

    @property
    def name(self) -> str:
        """espeak-ng's name of the voice: language, or language+variant."""
        return f"{self.language}+{self.variant}" if self.variant else self.language


@dataclass(frozen=True)
class Segment:
    """An interval of audio with its label; times in seconds."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Speech:
    """Synthesized audio, float32 at 16 kHz in [-1, 1], with its phones (IPA without stress marks, pauses as `sil`) and words."""

    audio: npt.NDArray[np.float32]
    phones: tuple[Segment, ...]
    words: tuple[Segment, ...]


def version() -> str:
    """Version of libespeak-ng, e.g. "1.52.0". Raises `UserError` if the package is missing."""
    library_path, _ = _paths()
    with _lock:
        library = ctypes.CDLL(library_path)
        try:
            library.espeak_Info.restype = ctypes.c_char_p
            number = library.espeak_Info(None).decode()
        finally:
            _unload(library)
    return f"{number} (espeakng-loader {metadata.version('espeakng-loader')})"


def speak(text: str, voice: Voice | None = None, seed: int = 1) -> Speech:
    """Synthesize `text` with `voice` (default: US English).

    Args:
        text: the text to speak, words separated by spaces. Digits are read out; their word label is the digits as written.
        voice: the speaker.
        seed: seed of the synthesizer's noise sources; the same seed gives the same samples.

    Returns:
        The audio at 16 kHz with its phone tier, which covers the whole audio, and its word tier, which leaves the pauses out.

    Raises:
        UserError: the text has no word, the voice or variant is unknown, or the package is missing.
    """
    voice = voice or Voice()
    if not re.search(r"\w", text):
        raise UserError(f"nothing to say in {text!r}: give at least one word")
    try:
        import soxr
    except ImportError as error:
        raise missing_extra("soxr", "data", "speech synthesis") from error
    native, rate, events = _synthesize(text, voice, seed)
    audio = soxr.resample(native.astype(np.float32) / 32768.0, rate, SAMPLE_RATE)
    peak = float(np.abs(audio).max(initial=0.0))
    if peak > 1.0:  # overshoot of the resampling filter
        audio = audio / peak
    seconds = len(audio) / SAMPLE_RATE
    phones, words = _segments(text, events, rate, seconds)
    return Speech(audio.astype(np.float32, copy=False), phones, words)


def pronounce(words: Sequence[str], language: str = "en-us") -> list[str]:
    """Pronounce each word on its own: IPA with stress marks before the stressed vowels, e.g. "lˈæɾɚ".

    Raises `UserError` for a word without a letter or digit, an unknown language and a missing package.
    """
    for word in words:
        if not re.search(r"\w", word):
            raise UserError(f"nothing to say in {word!r}: give at least one word")
    said: list[str] = []
    with _loaded() as (library, _, data_path):
        _set_voice(library, Voice(language), data_path)
        library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        for word in words:
            buffer = ctypes.create_string_buffer(word.encode("utf-8"))
            rest = ctypes.c_void_p(ctypes.addressof(buffer))
            clauses = []
            while rest.value:  # one clause at a time; null at the end of the text
                clauses.append(library.espeak_TextToPhonemes(ctypes.byref(rest), _UTF8, _IPA_TEXT).decode("utf-8"))
            said.append("".join(clauses).replace(" ", ""))
    return said


def _paths() -> tuple[str, str]:
    try:
        import espeakng_loader
    except ImportError as error:
        raise missing_extra("espeakng-loader", "data", "speech synthesis") from error
    return str(espeakng_loader.get_library_path()), str(espeakng_loader.get_data_path())


def _unload(library: ctypes.CDLL) -> None:
    import _ctypes

    close: Any = getattr(_ctypes, "dlclose", None) or _ctypes.FreeLibrary  # type: ignore[attr-defined,unused-ignore]
    close(library._handle)


@contextmanager
def _loaded() -> Iterator[tuple[Any, int, str]]:
    """A fresh image of the library, initialized: the library, its sampling rate and its data folder. One thread at a time."""
    library_path, data_path = _paths()
    with _lock:
        library = ctypes.CDLL(library_path)
        try:
            rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data_path.encode(), _PHONEME_EVENTS | _PHONEME_IPA | _DONT_EXIT)
            if rate <= 0:
                raise UserError(f"espeak-ng cannot read its data in {data_path}: reinstall the package espeakng-loader")
            try:
                yield library, int(rate), data_path
            finally:
                library.espeak_Terminate()
        finally:
            _unload(library)


def _synthesize(text: str, voice: Voice, seed: int) -> tuple[npt.NDArray[np.int16], int, list[tuple[int, int, int, str]]]:
    """Samples, their rate, and the events (type, sample, text position, phoneme)."""
    chunks: list[npt.NDArray[np.int16]] = []
    events: list[tuple[int, int, int, str]] = []

    def receive(samples: Any, count: int, event: Any) -> int:
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while event[index].type != _EVENT_END_OF_LIST:
            e = event[index]
            phoneme = bytes(e.id.string).decode("utf-8", "ignore") if e.type == _EVENT_PHONEME else ""
            events.append((e.type, e.sample, e.text_position, phoneme))
            index += 1
        return 0

    callback = _Callback(receive)
    with held(), _loaded() as (library, rate, data_path):
        library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        _set_voice(library, voice, data_path)
        library.espeak_SetSynthCallback(callback)
        encoded = text.encode("utf-8") + b"\0"
        status = library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded)), 0, _POSITION_CHARACTER, 0, _UTF8, None, None)
    if status != 0 or not chunks:
        raise UserError(f"espeak-ng made no audio of {text[:60]!r} with the voice {voice.name} (status {status})")
    return np.concatenate(chunks), rate, events


def _set_voice(library: ctypes.CDLL, voice: Voice, data_path: str) -> None:
    if voice.variant:  # an unknown variant would be ignored silently
        variants = {p.name for p in (Path(data_path) / "voices" / "!v").iterdir()}
        if voice.variant not in variants:
            raise unknown("voice variant", voice.variant, variants)
    if library.espeak_SetVoiceByName(voice.name.encode()) != 0:
        raise UserError(f"espeak-ng has no voice '{voice.name}': languages are such as en-us, en, en-gb-scotland, de, fr")
    for parameter, value, low, high in ((_RATE, voice.rate, 80, 450), (_PITCH, voice.pitch, 0, 99), (_RANGE, voice.pitch_range, 0, 99)):
        if not low <= value <= high:
            raise UserError(f"{voice} is out of range: {value} is not within {low} to {high}")
        library.espeak_SetParameter(parameter, value, 0)


def _segments(
    text: str, events: list[tuple[int, int, int, str]], rate: int, seconds: float
) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Phone and word tiers. A phone lasts until the next one starts; a word from its first phone to its last."""
    tokens = [(m.start() + 1, m.end(), re.sub(r"^\W+|\W+$", "", m.group()).lower()) for m in re.finditer(r"\S+", text)]
    starts: list[tuple[float, str, int]] = []  # start, phone, index of its token
    token = 0
    for kind, sample, position, phoneme in events:
        if kind == _EVENT_WORD:  # numbers give several events in or just after one token: never go back
            token = max(token, next((i for i, t in enumerate(tokens) if t[0] <= position <= t[1]), token))
        elif kind == _EVENT_PHONEME:
            label = re.sub(r"[ˈˌ]", "", phoneme).strip()
            starts.append((min(sample / rate, seconds), label or SILENCE, token))
    phones: list[Segment] = []
    owners: list[int] = []
    if starts and starts[0][0] > 0:
        phones.append(Segment(0.0, starts[0][0], SILENCE))
        owners.append(-1)
    for (start, label, owner), end in zip(starts, [s[0] for s in starts[1:]] + [seconds]):
        if end <= start:  # the synthesizer merged it into its neighbor
            continue
        if label == SILENCE and phones and phones[-1].label == SILENCE:
            phones[-1] = Segment(phones[-1].start, end, SILENCE)
            continue
        phones.append(Segment(start, end, label))
        owners.append(-1 if label == SILENCE else owner)
    words: list[Segment] = []
    spoken = sorted({o for o in owners if o >= 0})
    for owner, following in zip(spoken, [*spoken[1:], len(tokens)]):
        own = [p for p, o in zip(phones, owners) if o == owner]
        # words that espeak-ng runs together ("of the") have one event: they share one segment
        label = " ".join(t[2] for t in tokens[owner:following] if t[2])
        words.append(Segment(own[0].start, own[-1].end, label))
    return tuple(phones), tuple(words)
