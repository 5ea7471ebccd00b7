"""Trains and tests SUPERB's tasks on a frozen upstream through S3PRL's run_downstream, and keeps each result as JSON.

    hubert-eff superb run --task ks,asr --upstream CKPT --data DIR --out DIR

Per task, `OUT/TASK/` holds `result.json`, `utterances.json` (what it is made of, utterance by utterance), `settings.json` (what the result
is of), `earlier.jsonl` (results of other settings that stood there), `prepared/` (lists that S3PRL reads) and S3PRL's own folders of
experiments: `lr-RATE/` of each learning rate tried, with a folder per fold in it where there are folds, or `layer-N/SPLIT/` where nothing
is trained. Predictions of the test set are in those, under S3PRL's names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from hubert_eff.config import SAMPLE_RATE
from hubert_eff.errors import UserError, printable
from hubert_eff.utils.files import write_json, write_text
from hubert_eff.utils.locks import locked

from .. import register, require_s3prl
from ..data import layouts
from ..data.prepare import prepare
from ..data.utterances import utterances
from ..tasks import Task, check, choose
from . import records
from .launch import S3PRL, command_line, upstream_arguments
from .progress import lines_for_bars
from .settings import RESULT, Request, begin, goes_on, of_result, of_upstream, result_in, settings_of

VERSIONS = ("hubert-eff", "s3prl", "torch", "torchaudio", "numpy")
SCALARS = "scalars.jsonl"  # what S3PRL logs, a line per figure


def run_tasks(names: str | Iterable[str], request: Request, out: Path) -> list[dict[str, Any]]:
    """Run tasks one after the other into `out/TASK`; returns their results.

    All data and the upstream are checked first. A task that is done, by the same settings, upstream and data, is not repeated; one that
    was interrupted goes on from S3PRL's last checkpoint (which begins an epoch anew, so figures differ a little). Raises `UserError` for
    bad names, data, upstreams or folders.
    """
    tasks = choose(names)
    for task in tasks:
        check(task, request.data)
    require_s3prl()
    out = Path(os.path.abspath(out))
    for task in tasks:
        records.check_folder(out / task.name)
    request = replace(request, device=_device(request.device))
    origin = of_upstream(request.upstream)
    planned = [(task, of_result(task, request, origin), out / task.name) for task in tasks]
    begun_anew = [task for task, settings, place in planned if not goes_on(task, settings, place)]
    layouts.check_recordings(request.data / name for name in dict.fromkeys(name for task in begun_anew for name in task.source.folders))
    if request.cached:
        from .cache import check_space

        hours, size = _cache_size(request, {name for task in tasks for name in task.source.folders})
        _say(f"states of {hours:.1f} h of speech: about {size / 1e9:.2f} GB in {request.cache}")
        assert request.cache is not None
        check_space(request.cache, size)
    results = []
    for task, settings, place in planned:
        try:
            with locked(out, task.name):
                results.append(run_task(task, request, settings, place))
        except KeyboardInterrupt as stop:
            saved = sorted(place.rglob("states-*.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True)
            last = next((f" from {file.relative_to(out)}" for file in saved if _readable(file)), "")
            raise KeyboardInterrupt(f"the same command resumes {task.name}{last}") from stop
    return results


def run_task(task: Task, request: Request, settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run one task into `out`; its result, also in `out/result.json`: settings, the metric in [0, 1] under its key, how it was found."""
    if not goes_on(task, settings, out):
        if said := begin(task, settings, out):
            _say(said)
    elif result := result_in(task, out):
        return result

    start = time.monotonic()
    config = settings_of(task, request)
    rates = settings["learning_rates"]
    with contextlib.redirect_stdout(sys.stderr), _s3prl(task, request, settings, out / "prepared"):  # S3PRL's remarks are not results
        config = prepare(task, config, request.data, out / "prepared")
        found = _trained(task, request, config, rates, out) if task.trains else _best_layer(task, request, config, out)
    if task.trains:
        folders = [(out / checkpoint).parent for checkpoint in found["checkpoints"]]
        write_json(out / "utterances.json", utterances(task, folders, request.data))
    result = {**settings, **found, "versions": {name: version(name) for name in VERSIONS}}
    write_json(out / RESULT, result)
    _say(f"{task.name}: {task.key} {result[task.key]:.4f}, {time.monotonic() - start:,.0f} s")
    return result


# -- S3PRL's runner --------------------------------------------------------------------------------------------------


def _cache_size(request: Request, folders: Iterable[str]) -> tuple[float, int]:
    """Hours of the recordings in the data folders, and the bytes of their states."""
    from .cache import estimate

    states = _states(request.upstream)
    return estimate((request.data / name for name in folders), len(states), states[0].shape[-1])


def _states(upstream: str) -> list[Any]:
    """The hidden states of a second of silence."""
    import torch

    if upstream.startswith(S3PRL):
        from ..teachers import open_s3prl

        with torch.no_grad():
            return list(open_s3prl(upstream.removeprefix(S3PRL))(torch.zeros(1, SAMPLE_RATE)))
    from hubert_eff.checkpoints.open import open_model

    with torch.no_grad():
        return open_model(upstream).eval().hidden_states(torch.zeros(1, SAMPLE_RATE))[0]


@contextlib.contextmanager
def _s3prl(task: Task, request: Request, settings: dict[str, Any], lists: Path) -> Iterator[None]:
    """S3PRL, patched, with our upstream, cached if wanted; it also logs its figures to `scalars.jsonl` of the experiment."""
    register()
    from .. import patches

    patches.prepare(task.downstream, lists.resolve())
    from s3prl import hub
    from s3prl.downstream import runner
    from tensorboardX import SummaryWriter

    class Writer(SummaryWriter):
        def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None, **more: Any) -> None:
            super().add_scalar(tag, scalar_value, global_step, **more)
            with (Path(self.logdir) / SCALARS).open("a", encoding="utf-8") as file:
                # on a line of its own, even behind one that a kill has cut off
                file.write("\n" + json.dumps({"tag": tag, "value": float(scalar_value), "step": global_step}) + "\n")

    upstream, writer = hub.hubert_eff, runner.SummaryWriter
    runner.SummaryWriter = Writer
    if request.cached:
        from .cache import CachedUpstream

        model = f"{settings['weights']} {settings['code']} {version('torch')}"
        data = f"{task.source.folders[0]}-{settings['data_sha256'][:8]}"
        assert request.cache is not None
        folder = request.cache / hashlib.sha256(model.encode()).hexdigest()[:16] / data
        limit = 2 * _cache_size(request, task.source.folders)[1]

        def cached(**arguments: Any) -> CachedUpstream:
            found = CachedUpstream(upstream(**arguments), folder, limit)
            found.verify()
            return found

        hub.hubert_eff = cached
    try:
        with lines_for_bars(runner):  # bars are no lines of a log
            yield
    finally:
        runner.SummaryWriter, hub.hubert_eff = writer, upstream


class _Scalars(dict[str, float]):
    """A logger that keeps the last value of each tag."""

    def add_scalar(self, tag: str, value: Any, global_step: int | None = None) -> None:
        self[tag.rpartition("/")[2]] = float(value)


def _build(arguments: Sequence[str]) -> Any:
    """S3PRL's runner for the arguments of run_downstream, random states seeded as its main program does."""
    import numpy as np
    import torch
    from s3prl.downstream.runner import Runner
    from s3prl.run_downstream import get_downstream_args

    with command_line(*arguments):
        args, config, _ = get_downstream_args()
    if config["downstream_expert"].get("datarc", {}).get("num_workers", 0):
        torch.multiprocessing.set_sharing_strategy("file_system")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    return Runner(args, config)


def _train(task: Task, request: Request, config: dict[str, Any], folder: Path) -> None:
    """Train in `folder`, or resume what was begun there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    for checkpoint in _checkpoints(folder)[::-1]:  # the last one may have been cut off; S3PRL takes it unseen
        if _readable(checkpoint):
            break
        checkpoint.unlink()
    _build([
        "-m", "train", "-a", *upstream_arguments(request.upstream), "-d", task.downstream, "-c", str(folder / "config.yaml"),
        "-p", str(folder), "--seed", str(request.seed), "--device", str(request.device),
    ]).train()  # fmt: skip


def _test(task: Task, request: Request, folder: Path, checkpoint: Path) -> dict[str, float]:
    """The figures of a checkpoint on the test set, the task's own metric under its key."""
    from ..results import scoring

    scalars = _Scalars()
    _build(["-m", "evaluate", "-e", str(checkpoint), "-t", task.test, "--device", str(request.device)]).evaluate(task.test, scalars, 1)
    figures = {tag.removeprefix(f"{task.test}-"): value for tag, value in scalars.items()}
    figures[task.key] = figures.pop(task.scalar) * task.unit
    if task.name == "sd":
        reference = list(layouts.segments(request.data / layouts.DIARIZATION / "test"))
        figures["frame_der"], figures["der"] = figures["der"], scoring.lowest_der(reference, folder)
    return figures


def _trained(task: Task, request: Request, config: dict[str, Any], rates: Sequence[float], out: Path) -> dict[str, Any]:
    """Train with each learning rate and test the best; returns the metric, the rate and the other figures."""
    tried: dict[float, float] = {}  # the figure that decides
    tested: dict[float, list[tuple[Path, dict[str, float]]]] = {}
    sign = 1 if task.more_is_better else -1
    for rate in rates:
        folders = [out / f"lr-{rate:g}" / variant for variant in task.variants]
        for variant, folder in zip(task.variants, folders):
            _say(f"{task.name}: training {variant or 'the head'}, {config['runner']['total_steps']} steps, learning rate {rate:g}")
            config["optimizer"]["lr"] = rate
            if variant:
                config["downstream_expert"]["datarc"]["test_fold"] = variant
            _train(task, request, config, folder)
        if task.valid:
            tried[rate] = sum(_best_validation(task, folder, sign) for folder in folders) / len(folders)
        else:
            tested[rate] = [_best_test(task, request, folder, sign) for folder in folders]
            tried[rate] = sum(figures[task.key] for _, figures in tested[rate]) / len(folders)
    best = max(rates, key=lambda rate: sign * tried[rate])
    folders = [out / f"lr-{best:g}" / variant for variant in task.variants]
    if best not in tested:
        _say(f"{task.name}: testing")
        tested[best] = [(_chosen(task, folder), _test(task, request, folder, _chosen(task, folder))) for folder in folders]
    figures = [values for _, values in tested[best]]
    return {
        **{key: sum(values[key] for values in figures) / len(figures) for key in figures[0]},
        "learning_rate": best,
        "chosen_on": "validation" if task.valid else "test",
        "tried": {f"{rate:g}": value for rate, value in tried.items()},
        "checkpoints": [str(path.relative_to(out)) for path, _ in tested[best]],
        **({"folds": [values[task.key] for values in figures]} if len(folders) > 1 else {}),
        **records.truth(folders),
    }


def _best_validation(task: Task, folder: Path, sign: int) -> float:
    """The best figure on the validation set while training."""
    lines = []
    for line in (folder / SCALARS).read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # cut off by a kill: what it said is said again
            lines.append(json.loads(line))
    values = [line["value"] * task.unit for line in lines if line["tag"].endswith(f"/{task.valid}-{task.scalar}")]
    return sign * max(sign * value for value in values)


def _best_test(task: Task, request: Request, folder: Path, sign: int) -> tuple[Path, dict[str, float]]:
    """The checkpoint that is best on the test set, as SUPERB does without a validation set; its predictions are those kept."""
    best: tuple[Path, dict[str, float]] | None = None
    predictions = folder / f"{task.test}_predict.txt"
    for checkpoint in _checkpoints(folder):
        _say(f"{task.name}: testing {checkpoint.name}")
        figures = _test(task, request, folder, checkpoint)
        if best is None or sign * figures[task.key] > sign * best[1][task.key]:
            best = checkpoint, figures
            shutil.copy(predictions, folder / "best_predict.txt")
    assert best is not None  # training saves at its end
    shutil.move(folder / "best_predict.txt", predictions)
    return best


def _chosen(task: Task, folder: Path) -> Path:
    """The checkpoint of the best validation; the last one if none was better than S3PRL's start."""
    best = folder / str(task.best)
    return best if best.is_file() else _checkpoints(folder)[-1]


def _checkpoints(folder: Path) -> list[Path]:
    """S3PRL's regular checkpoints, oldest first."""
    return sorted(folder.glob("states-*.ckpt"), key=lambda file: int(file.stem.rpartition("-")[2]))


def _readable(checkpoint: Path) -> bool:
    from hubert_eff.checkpoints.torchfile import TorchFile, Unreadable

    try:
        with TorchFile(checkpoint) as opened:
            opened.whole()
    except Unreadable:
        return False
    return True


def _best_layer(task: Task, request: Request, config: dict[str, Any], out: Path) -> dict[str, Any]:
    """Search with each hidden state, choose by the development queries, count the evaluation queries."""
    layers = range(len(_states(request.upstream)))
    tried = {layer: _search(task, request, config, out, layer, "dev") for layer in layers}
    best = max(tried, key=lambda layer: tried[layer])
    return {
        task.key: _search(task, request, config, out, best, "test"),
        "layer": best,
        "chosen_on": "validation",
        "tried": {f"layer {layer}": value for layer, value in tried.items()},
    }


def _search(task: Task, request: Request, config: dict[str, Any], out: Path, layer: int, split: str) -> float:
    """The metric of one hidden state on the queries of `dev` or `test`."""
    from ..results import scoring

    folder = out / f"layer-{layer}" / split
    known = records.read(folder / "score.json")
    if task.key in known:
        return float(known[task.key])
    _say(f"{task.name}: searching with layer {layer}, {split} queries")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    _build([
        "-m", "evaluate", "-t", split, *upstream_arguments(request.upstream), "-l", str(layer), "-d", task.downstream,
        "-c", str(folder / "config.yaml"), "-p", str(folder), "--seed", str(request.seed), "--device", str(request.device),
    ]).evaluate(split, _Scalars(), 1)  # fmt: skip
    truth = layouts.quesst_truth(request.data / layouts.QUESST, "dev" if split == "dev" else "eval")
    value = scoring.mtwv(scoring.read_detections(folder / "benchmark.stdlist.xml"), truth)
    write_json(folder / "score.json", {task.key: value})
    return value


def _device(device: str | None) -> str:
    """A device by name, or the GPU if there is one."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return device


def _say(line: str) -> None:
    print(f"-- {printable(line)}", file=sys.stderr, flush=True)
