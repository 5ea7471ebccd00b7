"""SUPERB's ten tasks (Yang et al. 2021): for each, S3PRL's downstream and metric, settings, data, and a check of the data.

The settings are the complete configurations of `superb_tasks/configs`, one per task. Importing this module imports neither torch nor
S3PRL, and a check of data reads text and a few headers: it answers at once.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hubert_eff.errors import UserError, unknown

from .data import layouts

CONFIGS = Path(__file__).parent / "configs"
LEARNING_RATES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)  # SUPERB allows tuning these per task and upstream


@dataclass(frozen=True)
class Source:
    """A data set: folders below the data folder, layout, license, origin."""

    name: str
    folders: tuple[str, ...]
    layout: str
    license: str
    url: str


@dataclass(frozen=True)
class Task:
    """A SUPERB task as S3PRL runs it.

    `key` is its metric in result.json, as `hubert_eff.reports.table2.METRICS` has it (which imports torch, so it is said again here);
    `config` the name of its settings in `superb_tasks/configs`, `scalar` the figure that S3PRL logs for it per split (of which `unit`
    makes the paper's shares in [0, 1]), `best` the checkpoint that S3PRL keeps of the best validation, None where there is no validation.
    `small` are the settings of the heads and batches for the generated data sets, dotted keys of the configuration.
    """

    name: str
    title: str
    key: str
    downstream: str
    config: str
    source: Source
    check: Callable[[Path], None]
    scalar: str
    unit: float = 1.0
    valid: str | None = "dev"
    test: str = "test"
    best: str | None = "dev-best.ckpt"
    variants: tuple[str, ...] = ("",)  # runs that are averaged
    trains: bool = True
    more_is_better: bool = True
    small: Mapping[str, Any] = field(default_factory=dict)

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The grid of the sweep; empty if nothing is trained."""
        return LEARNING_RATES if self.trains else ()

    def settings(self, small: bool = False) -> dict[str, Any]:
        """The configuration of S3PRL's run_downstream: SUPERB's, or with the small heads."""
        config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{self.config}.yaml").read_text(encoding="utf-8"))
        for key, value in (self.small if small else {}).items():
            assign(config, key, copy.deepcopy(value))
        return config

    def describe(self) -> dict[str, Any]:
        """The entry of the task in `hubert-eff superb list --json`."""
        config = self.settings()
        runner, optimizer = config["runner"], config.get("optimizer", {})
        return {
            "task": self.name,
            "title": self.title,
            "metric": self.key,
            "more_is_better": self.more_is_better,
            "downstream": self.downstream,
            "config": f"{self.config}.yaml",
            "steps": runner.get("total_steps", 0),
            "learning_rate": optimizer.get("lr"),
            "learning_rates": list(self.learning_rates),
            "data": self.source.name,
            "folders": list(self.source.folders),
            "layout": self.source.layout,
            "license": self.source.license,
            "url": self.source.url,
        }


def assign(config: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key of nested mappings. Every part but the last must exist, so a misspelled key of S3PRL's is noticed."""
    *path, last = dotted.split(".")
    for key in path:
        config = config[key]
    config[last] = value


_LIBRISPEECH = Source(
    "LibriSpeech", (layouts.LIBRISPEECH,), "LibriSpeech/{train-clean-100,dev-clean,test-clean}/SPEAKER/CHAPTER/*.flac and *.trans.txt",
    "CC BY 4.0", "https://www.openslr.org/12",
)  # fmt: skip
_LIBRIPHONE = Source(
    "LibriSpeech and its lexicon", (layouts.LIBRISPEECH,), f"as for asr, and LibriSpeech/{layouts.LEXICONS}: WORD PHONE PHONE ...",
    "CC BY 4.0; the lexicon: public domain", "https://www.openslr.org/12 and https://www.openslr.org/11",
)  # fmt: skip
_KEYWORDS = Source(
    "Speech Commands v1", ("speech_commands_v0.01", "speech_commands_test_set_v0.01"),
    "speech_commands_v0.01/WORD/*.wav and _background_noise_/, speech_commands_test_set_v0.01/CLASS/*.wav",
    "CC BY 4.0", "https://download.tensorflow.org/data/speech_commands_v0.01.tar.gz and speech_commands_test_set_v0.01.tar.gz",
)  # fmt: skip
_SNIPS = Source(
    "Audio SNIPS", (layouts.SNIPS,), "SNIPS/{train,valid,test}/*.wav, SNIPS/all.iob.snips.txt, SNIPS/slots.txt",
    "CC BY 4.0", "https://github.com/aws-samples/aws-lex-noisy-spoken-language-understanding",
)  # fmt: skip
_VOXCELEB = Source(
    "VoxCeleb1", (layouts.VOXCELEB,), "VoxCeleb1/{dev,test}/wav/SPEAKER/VIDEO/*.wav, VoxCeleb1/iden_split.txt",
    "CC BY 4.0 (metadata); the audio by agreement", "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html",
)  # fmt: skip
_TRIALS = Source(
    "VoxCeleb1", (layouts.VOXCELEB,), "VoxCeleb1/{dev,test}/wav/SPEAKER/VIDEO/*.wav, VoxCeleb1/voxceleb1_test_v2.txt",
    _VOXCELEB.license, f"{_VOXCELEB.url}; trials: https://www.openslr.org/49",
)  # fmt: skip
_QUESST = Source(
    "QUESST 2014", (layouts.QUESST,), "quesst14Database/{Audio,dev_queries,eval_queries}/*.wav and scoring/, as in the archive",
    "for research, see the archive", "https://speech.fit.vutbr.cz/files/quesst14Database.tgz",
)  # fmt: skip
_FLUENT = Source(
    "Fluent Speech Commands", (layouts.FLUENT,), "fluent_speech_commands_dataset/data/{train,valid,test}_data.csv and wavs/speakers/",
    "Fluent Speech Commands Public License (academic research)", "https://fluent.ai/fluent-speech-commands-a-dataset-for-spoken-language-understanding-research",
)  # fmt: skip
_LIBRIMIX = Source(
    "Libri2Mix for diarization", (layouts.DIARIZATION,),
    "diarization/{train,dev,test}/ with wav.scp, utt2spk, segments, reco2dur, spk2utt, as LibriMix's prepare_diarization.py writes them",
    "CC BY 4.0 (LibriSpeech), CC BY-SA 3.0 (WHAM! noise is not used)", "https://github.com/ftshijt/LibriMix",
)  # fmt: skip
_IEMOCAP = Source(
    "IEMOCAP", (layouts.IEMOCAP,), "IEMOCAP/Session{1...5}/sentences/wav/DIALOG/*.wav and dialog/EmoEvaluation/*.txt, as in the archive",
    "by agreement with USC", "https://sail.usc.edu/iemocap/",
)  # fmt: skip


def _check_snips(data: Path) -> None:
    corpus = TASKS["sf"].settings()["downstream_expert"]["corpus"]
    layouts.check_snips(data, {split: corpus[f"{split}_speakers"] for split in ("train", "valid", "test")})


_EXPERT = "downstream_expert"


# of --small: steps that a CPU takes a minute or two for
_STEPS, _BATCH, _RATE = "runner.total_steps", f"{_EXPERT}.datarc.train_batch_size", "optimizer.lr"
_ACCUMULATE = "runner.gradient_accumulate_steps"


def _small_lstm(section: str, batch_size: str, steps: int) -> dict[str, Any]:
    return {
        f"{_EXPERT}.{section}.project_dim": 64,
        f"{_EXPERT}.{section}.RNNs.dim": [64, 64],
        f"{_EXPERT}.{section}.RNNs.total_rate": 640,  # pairs of frames: half of the LSTMs' work
        f"{_EXPERT}.{batch_size}": 16,
        _STEPS: steps,
        _RATE: 1e-2,
        "specaug": None,  # its four masks of up to 50 channels are for 768: of a small model's they leave nothing
    }


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "asr", "speech recognition", "wer", "asr", "asr", _LIBRISPEECH, layouts.check_librispeech,
            scalar="wer", unit=0.01, more_is_better=False,
            valid="dev-clean", test="test-clean", best="dev-clean-best.ckpt",
            small=_small_lstm("modelrc", "datarc.batch_size", 400),
        ),
        Task(
            "ks", "keyword spotting", "accuracy", "speech_commands", "speech_commands", _KEYWORDS, layouts.check_keywords,
            scalar="acc", small={_STEPS: 300, _RATE: 1e-2},
        ),
        Task(
            "sf", "slot filling", "f1", "ctc", "snips", _SNIPS, _check_snips,
            scalar="slot_type_f1", small=_small_lstm("model", "corpus.batch_size", 300),
        ),
        Task(
            "sid", "speaker identification", "accuracy", "voxceleb1", "voxceleb1", _VOXCELEB, layouts.check_speakers,
            scalar="acc", small={_STEPS: 200, _RATE: 1e-2, _BATCH: 32, _ACCUMULATE: 1},
        ),
        Task(
            "pr", "phoneme recognition", "per", "ctc", "libriphone", _LIBRIPHONE, layouts.check_lexicon,
            scalar="per", more_is_better=False, small={_STEPS: 200},
        ),
        Task(
            "qbe", "spoken term detection by example", "mtwv", "quesst14_dtw", "quesst14_dtw", _QUESST, layouts.check_quesst,
            scalar="mtwv", best=None, trains=False,
        ),
        Task(
            "ic", "intent classification", "accuracy", "fluent_commands", "fluent_commands", _FLUENT, layouts.check_commands,
            scalar="acc", small={_STEPS: 300, _RATE: 1e-2},
        ),
        Task(
            "asv", "speaker verification", "eer", "sv_voxceleb1", "sv_voxceleb1", _TRIALS, layouts.check_trials,
            scalar="EER", more_is_better=False, valid=None, best=None,
            small={
                f"{_EXPERT}.modelrc.input_dim": 128,
                f"{_EXPERT}.modelrc.module_config.XVector.agg_dim": 256,
                _STEPS: 100, _RATE: 1e-3, _ACCUMULATE: 1,
            },
        ),
        Task(
            "sd", "diarization", "der", "diarization", "diarization", _LIBRIMIX, layouts.check_diarization,
            scalar="der", more_is_better=False, best="best-states-dev.ckpt",
            small={
                f"{_EXPERT}.modelrc.hidden_size": 64,
                _STEPS: 200, _RATE: 1e-2, _ACCUMULATE: 1,
            },
        ),
        Task(
            "er", "emotion recognition", "accuracy", "emotion", "emotion", _IEMOCAP, layouts.check_iemocap,
            scalar="acc", variants=("fold1", "fold2", "fold3", "fold4", "fold5"),
            small={_STEPS: 80, _RATE: 1e-2, _BATCH: 32, _ACCUMULATE: 1},
        ),
    )
}  # fmt: skip


def choose(names: str | Iterable[str] | None) -> list[Task]:
    """Tasks by short names, `ks,asr`, in the given order; `all` or None for all ten. Raises `UserError` for an unknown name or none."""
    wanted = ["all"] if names is None else names.split(",") if isinstance(names, str) else list(names)
    if not wanted:
        raise UserError(f"no task given: name some of {', '.join(TASKS)}, or all")
    for name in wanted:
        if name not in (*TASKS, "all"):
            raise unknown("SUPERB task", name, TASKS)
    return [TASKS[name] for name in dict.fromkeys(TASKS if "all" in wanted else wanted)]


def check(task: Task, data: Path) -> None:
    """Raise `UserError`, one line with the remedy, unless the task's data are below `data` in the layout that S3PRL reads."""
    if not data.is_dir():
        raise UserError(f"no folder at {data}")
    try:
        task.check(data)
    except UserError as error:
        place = Path(os.path.abspath(data))
        absent = [folder for folder in task.source.folders if not (data / folder).is_dir()]
        if place.name in absent:
            parent = os.path.relpath(place.parent)
            raise UserError(f"{task.name}: {data} is the data set itself: give the folder that holds it, --data {parent}") from error
        needed = f"needed: {task.source.layout}; from {task.source.url}" if absent else "the layout: hubert-eff superb list"
        generated = f"hubert-eff corpus superb --task {task.name} --out {data if absent else 'DIR'}"
        raise UserError(f"{task.name}: {error} ({needed}; or generated: {generated})") from error
