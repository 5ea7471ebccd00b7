"""Mini-SUPERB: the data of all ten tasks, generated offline in the layouts of the real data sets.

    hubert-eff corpus superb --out DIR [--minutes M] [--task ks,asr,...]

Voices of espeak-ng are the speakers, templates make sentences, intents and slots. It exists so that every task can run and be tested
without licensed data; its scores compare models with each other only. Each module of `superb_tasks.data.generators` makes one data set,
and says in its first lines how it is laid out and which parts of S3PRL read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hubert_eff.data.synthetic.espeak import version
from hubert_eff.errors import UserError, unknown
from hubert_eff.utils.files import write_text

from .generators import diarization, fluent_commands, iemocap, librispeech, quesst14, snips, speech_commands, voxceleb

DATA_SETS: dict[str, ModuleType] = {  # by task
    "pr": librispeech,
    "asr": librispeech,
    "ks": speech_commands,
    "qbe": quesst14,
    "sid": voxceleb,
    "asv": voxceleb,
    "sd": diarization,
    "ic": fluent_commands,
    "sf": snips,
    "er": iemocap,
}

README = """Synthetic speech, made by `hubert-eff corpus superb` with espeak-ng {version}.

The folders are laid out like the data sets of the SUPERB benchmark (LibriSpeech, Speech Commands, QUESST 2014, VoxCeleb1, LibriMix, Fluent
Speech Commands, Audio SNIPS, IEMOCAP), so that programs which read those can run. They hold nothing of them: all sentences are generated
from templates, all voices are synthetic. Scores on this data compare models with each other only; they say nothing about scores on the
real data sets and must not stand beside them.

The recordings, transcripts and labels are free of rights as far as their generator is concerned: use them as you like.
corpus.json says with which arguments each data set was made; the same arguments and the same version of espeak-ng make the same files.
"""


def make_superb(out: Path, tasks: Sequence[str] = ("all",), minutes: float = 10.0, seed: int = 0) -> dict[str, Any]:
    """Make the data sets of some tasks (or `all`) in `out`.

    Args:
        out: folder; data sets made earlier with the same arguments are kept, so that an interrupted call may be repeated.
        minutes: approximate speech in each data set; small ones hold the minimum that their task needs.
        seed: the same seed, minutes and version of espeak-ng give the same files.

    Returns arguments and content of each data set by its first folder. Raises `UserError` for an unknown task, minutes that are not above
    0, a negative seed, a folder with a space in its path (sd), another data set in the way, and a missing package.
    """
    for task in tasks:
        if task not in (*DATA_SETS, "all"):
            raise unknown("task", task, (*DATA_SETS, "all"))
    if not tasks:
        raise UserError(f"no task given: name some of {', '.join(DATA_SETS)}, or all")
    if not 0 < minutes <= 6000:
        raise UserError(f"--minutes {minutes:g} must be above 0 and at most 6000")
    if seed < 0:
        raise UserError(f"--seed {seed} must not be negative")
    library = version()
    wanted = [maker for task, maker in DATA_SETS.items() if task in tasks or "all" in tasks]
    if diarization in wanted:
        diarization.home(out)  # raises before the others are made if this is impossible
    made: dict[str, Any] = {}
    for maker in dict.fromkeys(wanted):
        entry = maker.make(Path(out), minutes, seed)
        made[entry["folders"][0]] = entry
    write_text(Path(out) / "README.txt", README.format(version=library))
    return made
