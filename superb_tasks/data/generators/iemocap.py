"""ER: the same kinds of sentences in four moods of the voice, laid out as IEMOCAP.

    IEMOCAP/Session{1..5}/sentences/wav/DIALOG/DIALOG_F000.wav          16 kHz, mono; DIALOG such as Ses01F_impro01
    IEMOCAP/Session{1..5}/dialog/EmoEvaluation/DIALOG.txt               [start - end] <tab> DIALOG_F000 <tab> neu <tab> [v, a, d]
    IEMOCAP/meta_data/Session{1..5}/{train,test}_meta_data.json     {"labels": {"neu": 0, ...}, "meta_data": [{"path", "label", "speaker"}]}

`s3prl.dataio.corpus.IEMOCAP` (SuperbER) reads the recordings and the evaluations, and the lists under its cache folder as
`test_session1_train_metadata.json`; `downstream/emotion` reads `meta_data`, which its IEMOCAP_preprocess.py makes of the evaluations. Each
of the five folds tests on one session, whose two voices are in no other. `exc` (excited) counts as `hap`, as in SUPERB.

An emotion is prosody: pitch, its range, rate and loudness, on top of each voice's own.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hubert_eff.data.synthetic.espeak import Voice
from hubert_eff.data.synthetic.sentences import sentence
from hubert_eff.utils.files import write_text

from .common import disk, keep_or_make, say, sex, voices

FOLDER = "IEMOCAP"
SESSIONS = 5
LABELS = {"neu": 0, "hap": 1, "ang": 2, "sad": 3}
MERGED = {"exc": "hap"}


@dataclass(frozen=True)
class Mood:
    """What an emotion adds to a voice (units of espeak-ng), its peak levels, and how it is rated: valence, activation, dominance."""

    pitch: int
    pitch_range: int
    rate: int
    levels: tuple[float, float]
    rating: tuple[float, float, float]


MOODS = {  # the levels overlap: by loudness alone, over the noise of the recording, no emotion could be told
    "neu": Mood(0, -15, 0, (0.3, 0.6), (3.0, 2.5, 3.0)),
    "hap": Mood(35, 30, 15, (0.35, 0.7), (4.0, 3.5, 3.0)),
    "ang": Mood(12, 40, 56, (0.45, 0.9), (2.0, 4.0, 4.0)),
    "sad": Mood(-28, -40, -48, (0.2, 0.45), (2.0, 2.0, 2.0)),
    "exc": Mood(41, 35, 25, (0.4, 0.75), (4.5, 4.0, 3.5)),
}
ROUND = ("neu", "hap", "ang", "sad", "neu", "exc", "ang", "sad")  # the emotions of a dialog, in a new order each time


def make(out: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Write the data set to `out`; about `minutes` of speech, at least one dialog for each of the ten voices."""
    return keep_or_make(out, [FOLDER], {"minutes": minutes, "seed": seed}, lambda draft: _write(draft / FOLDER, minutes, seed))


def _write(root: Path, minutes: float, seed: int) -> dict[str, Any]:
    cast = voices(2 * SESSIONS, FOLDER, seed)
    women, men = ([voice for voice in cast if sex(voice) == kind] for kind in "FM")
    entries: dict[int, list[dict[str, str]]] = {}
    with disk(root, minutes) as recorder:
        for session in range(1, SESSIONS + 1):
            entries[session] = []
            for kind, voice in (("F", women[session - 1]), ("M", men[session - 1])):
                rng = random.Random(f"{FOLDER} {seed} {session} {kind}")
                start, dialogs = recorder.seconds, 0
                while dialogs == 0 or recorder.seconds - start < minutes * 60 / (2 * SESSIONS):
                    act = "impro" if dialogs % 2 == 0 else "script"
                    dialog = f"Ses{session:02d}{kind}_{act}{dialogs // 2 + 1:02d}"
                    clock, report = 0.0, ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"]
                    for number, emotion in enumerate(rng.sample(ROUND, len(ROUND))):
                        name = f"{dialog}_{kind}{number:03d}"
                        path = f"Session{session}/sentences/wav/{dialog}/{name}.wav"
                        seconds = recorder.save(path, say(sentence(rng), in_mood(voice, emotion), rng, MOODS[emotion].levels).audio)
                        rating = ", ".join(f"{value:.4f}" for value in MOODS[emotion].rating)
                        report.append(f"[{clock:.4f} - {clock + seconds:.4f}]\t{name}\t{emotion}\t[{rating}]\n\n")
                        clock += seconds + rng.uniform(0.2, 1.0)
                        label = MERGED.get(emotion, emotion)
                        entries[session].append({"path": path, "label": label, "speaker": name.split("_")[0]})
                    write_text(root / f"Session{session}/dialog/EmoEvaluation/{dialog}.txt", "".join(report))
                    dialogs += 1
    for session in entries:
        rest = [entry for other in entries if other != session for entry in entries[other]]
        for part, chosen in (("train", rest), ("test", entries[session])):
            text = json.dumps({"labels": LABELS, "meta_data": chosen})
            write_text(root / f"meta_data/Session{session}/{part}_meta_data.json", text)
    return {**recorder.summary(), "speakers": 2 * SESSIONS, "emotions": len(LABELS)}


def in_mood(voice: Voice, emotion: str) -> Voice:
    """The voice as it speaks in an emotion, within the synthesizer's limits."""
    mood = MOODS[emotion]

    def limited(value: int) -> int:
        return min(94, max(5, value))  # the takes of one mood vary by a few units

    return replace(
        voice,
        pitch=limited(voice.pitch + mood.pitch),
        pitch_range=limited(voice.pitch_range + mood.pitch_range),
        rate=voice.rate + mood.rate,
    )
