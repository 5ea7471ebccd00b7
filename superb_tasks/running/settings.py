"""The settings of a run: the request, S3PRL's configuration for it, and what distinguishes results."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hubert_eff.errors import UserError
from hubert_eff.reports.table2 import GENERATED
from hubert_eff.utils.files import write_json, write_text

from ..data import layouts
from ..tasks import Task
from . import records
from .launch import S3PRL

SETTINGS, RESULT, EARLIER = "settings.json", "result.json", "earlier.jsonl"
PATHS = ("upstream", "data", "out")  # a run goes on only at the same paths: S3PRL's checkpoints hold them; of a result they say nothing


@dataclass(frozen=True)
class Request:
    """How tasks are run.

    `upstream` is a checkpoint, an exported file, `PRESET[@SEED]` for an untrained model, or one of S3PRL's own, such as
    `s3prl:wavlm_base`; `data` the folder of the data sets. `steps` and `learning_rate` are SUPERB's where None; with `sweep`,
    each rate of SUPERB's grid is trained, and the one that is best on the validation set is tested (where there is none, on the test set,
    as SUPERB does). `small` takes narrow heads, small batches and few steps, for generated data: such results compare models with each
    other only. `workers` load data in processes of their own. `cache` is a folder for the hidden states of all recordings, in half
    precision; several tasks and models may share it; S3PRL's own upstreams are computed anew.
    """

    upstream: str
    data: Path
    steps: int | None = None
    learning_rate: float | None = None
    sweep: bool = False
    small: bool = False
    seed: int = 1337
    device: str | None = None
    workers: int | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise UserError(f"--steps {self.steps}: one step or more")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise UserError(f"--lr {self.learning_rate}: a learning rate above zero")
        if self.sweep and self.learning_rate is not None:
            raise UserError("--lr-sweep tries SUPERB's learning rates: leave out --lr")
        object.__setattr__(self, "data", Path(os.path.abspath(self.data)))
        if os.path.exists(self.upstream):
            object.__setattr__(self, "upstream", os.path.abspath(self.upstream))

    @property
    def cached(self) -> bool:
        """Whether states are kept on disk."""
        return self.cache is not None and not self.upstream.startswith(S3PRL)


def settings_of(task: Task, request: Request) -> dict[str, Any]:
    """The configuration for S3PRL, but for paths."""
    config = task.settings(request.small)
    expert, runner = config["downstream_expert"], config["runner"]
    loader = next(expert[key] for key in ("datarc", "corpus", "loaderrc") if "num_workers" in expert.get(key, {}))
    if request.workers is not None or request.device == "cpu":  # the forward pass on a CPU takes far longer than loading
        loader["num_workers"] = request.workers or 0
    if not task.trains:
        return config
    if request.learning_rate is not None:
        config["optimizer"]["lr"] = request.learning_rate
    runner["eval_dataloaders"] = [task.valid] if task.valid else []
    if request.steps is not None or request.small:
        steps = request.steps or runner["total_steps"]
        # up to four times, the last time at the end
        every = next(steps // parts for parts in (4, 3, 2, 1) if steps % parts == 0)
        runner.update(total_steps=steps, eval_step=every, save_step=every, log_step=every)
    return config


def of_result(task: Task, request: Request, origin: dict[str, str | None]) -> dict[str, Any]:
    """The settings that identify a result."""
    from hubert_eff.checkpoints.open import digest_of

    config = settings_of(task, request)
    generated = records.generated(request.data, task.source.folders[0])
    settings = {
        "task": task.name,
        **asdict(request),
        "data": str(request.data),
        "cache": request.cached,
        "steps": config["runner"].get("total_steps", 0),
        "sha256": digest_of(request.upstream),
        **origin,
        "data_sha256": layouts.digest(request.data / name for name in task.source.folders),
        "data_set": GENERATED if generated else task.source.name,
        # SUPERB's settings: only then a result may stand beside published ones
        "superb_settings": not request.small and request.steps is None and not generated,
        "learning_rates": [],
    }
    del settings["device"], settings["workers"], settings["learning_rate"]
    if task.trains:
        settings["learning_rates"] = list(task.learning_rates) if request.sweep else [config["optimizer"]["lr"]]
    return settings


def of_upstream(upstream: str) -> dict[str, str | None]:
    """The identity of an upstream's states: its weights and the code. Raises `UserError` for one that cannot be loaded."""
    from ..teachers import open_s3prl, published  # and with it torch

    if upstream.startswith(S3PRL):
        open_s3prl(upstream.removeprefix(S3PRL))
        return {"weights": None, "code": f"{upstream} of s3prl {version('s3prl')}, torchaudio {version('torchaudio')}"}
    from hubert_eff.checkpoints.open import open_model

    from . import fingerprints

    try:
        model = open_model(upstream)
    except UserError as error:
        # only then is S3PRL worth its import: its names have no hyphen, those of presets have one
        if upstream.isidentifier() and upstream in published():
            raise UserError(
                f"'{upstream}' is an upstream of S3PRL - did you mean {S3PRL}{upstream}? For a checkpoint of your own, give the file"
            ) from error
        raise
    return {"weights": fingerprints.of_model(model), "code": fingerprints.of_code()}


def result_in(task: Task, out: Path) -> dict[str, Any]:
    """The result of a task in a folder; empty if there is none."""
    result = records.read(out / RESULT)
    return result if result.get("task") == task.name and task.key in result else {}


def goes_on(task: Task, settings: dict[str, Any], out: Path) -> bool:
    """Whether a folder holds a result of these settings, or a run at the same paths that can resume."""
    before = records.read(out / SETTINGS)
    paths = before.pop("paths", None)
    same = not [key for key in before | settings if key not in (*PATHS, "sha256") and before.get(key) != settings.get(key)]
    return same and (paths == paths_of(settings, out) or bool(result_in(task, out)))


def paths_of(settings: dict[str, Any], out: Path) -> dict[str, str]:
    """Where a run reads and writes."""
    return {"upstream": settings["upstream"], "data": settings["data"], "out": str(out)}


def begin(task: Task, settings: dict[str, Any], out: Path) -> str:
    """Empty a folder of ours for a run of a task, but for a line for each result that stood there; what to say of what there was."""
    records.check_folder(out)
    before, after = records.read(out / SETTINGS), {**settings, "paths": paths_of(settings, out)}
    result, said = result_in(task, out), ""
    if before:
        differing = sorted(key for key in before | after if key not in PATHS and before.get(key) != after.get(key))
        kept = f"; what it found stands in {EARLIER}" if result else ""
        said = f"{task.name}: {out} held a run of other {', '.join(differing)}: it is begun anew{kept}"
    if result:
        lines = (out / EARLIER).read_text(encoding="utf-8") if (out / EARLIER).is_file() else ""
        write_text(out / EARLIER, f"{lines}{json.dumps(result, ensure_ascii=False)}\n")
    for path in out.iterdir() if out.is_dir() else ():
        if path.name not in (EARLIER, SETTINGS):  # the latter tells that the folder is ours
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_json(out / SETTINGS, after)
    return said
