"""A folder for the SUPERB leaderboard (superbbenchmark.org): `predict/TASK_public/` with the predictions of a task's test set, and
`predict.zip`, which is what the site takes. Names and contents are those that S3PRL's `submit/submit.py` makes of the same experiments."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubert_eff.utils.files import replacing

from ..tasks import TASKS

# by task: the leaderboard's name, the predictions in S3PRL's folder of the experiment, their name in the submission
FILES = {
    "pr": ("pr", "test-hyp.ark", "predict.ark"),
    "sid": ("sid", "test_predict.txt", "predict.txt"),
    "ks": ("ks", "test_predict.txt", "predict.txt"),
    "ic": ("ic", "test_predict.csv", "predict.csv"),
    "asr": ("asr", "test-clean-noLM-hyp.ark", "predict.ark"),
    "qbe": ("qbe", "benchmark.stdlist.xml", "benchmark.stdlist.xml"),
    "sf": ("sf", "test-hyp.ark", "predict.ark"),
    "asv": ("sv", "test_predict.txt", "predict.txt"),
    "sd": ("sd", "scoring/predictions", "scoring/predictions"),  # a folder
    **{f"er_{fold}": (f"er_{fold}", f"test_{fold}_predict.txt", "predict.txt") for fold in TASKS["er"].variants},
}
FRAME_SHIFT = "frame_shift"  # samples per frame, which an experiment of diarization writes and its scoring reads


def experiments(results: Mapping[str, tuple[Path, Mapping[str, Any]]]) -> dict[str, Path]:
    """S3PRL's folders of the experiments that count, by the keys of `FILES`. `results`: by task, the folder of a run and its result."""
    folders: dict[str, Path] = {}
    for task, (folder, result) in results.items():
        if task == "qbe":
            folders[task] = folder / f"layer-{result['layer']}" / "test"
            continue
        tested = [folder / Path(checkpoint).parent for checkpoint in result["checkpoints"]]
        names = [f"er_{fold}" for fold in TASKS["er"].variants] if task == "er" else [task]
        folders |= dict(zip(names, tested, strict=True))
    return folders


def write_submission(results: Mapping[str, tuple[Path, Mapping[str, Any]]], out: Path) -> list[str]:
    """Write `out/predict/` and `out/predict.zip`, replacing old ones. Returns the tasks in them; those without predictions are left out."""
    predict = out / "predict"
    shutil.rmtree(predict, ignore_errors=True)
    (out / "predict.zip").unlink(missing_ok=True)
    included: list[str] = []
    for key, folder in experiments(results).items():
        name, source, target = FILES[key]
        place = predict / f"{name}_public"
        if (folder / source).is_dir():
            shutil.copytree(folder / source, place / target)
            if (folder / FRAME_SHIFT).is_file():
                shutil.copyfile(folder / FRAME_SHIFT, place / FRAME_SHIFT)
        elif (folder / source).is_file():
            place.mkdir(parents=True)
            shutil.copyfile(folder / source, place / target)
        else:
            continue
        included.append(place.name)
    if included:
        with replacing(out / "predict.zip") as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(path for path in predict.rglob("*") if path.is_file()):
                archive.write(file, file.relative_to(out))
    return included
