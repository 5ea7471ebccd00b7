"""Run a SUPERB task on an upstream through S3PRL's own code and keep the result as JSON.

    python -m superb_tasks.runner --upstream CKPT --data DIR --out DIR
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hubert_eff.errors import UserError
from hubert_eff.files import write_json

from . import register, require_s3prl
from .corpus import KEYWORDS, SILENCE, UNKNOWN, check_keywords, folders
from .launch import check_upstream, exit_code, folder


def run_keyword_spotting(
    upstream: str,
    data: Path,
    out: Path,
    steps: int = 300,
    learning_rate: float = 1e-2,
    batch_size: int = 32,
    seed: int = 0,
    device: str | None = None,
) -> dict[str, Any]:
    """Train and test SUPERB's keyword spotting probe (S3PRL's SuperbKS) on a frozen upstream; writes `out/result.json`.

    `upstream` is a checkpoint file or `PRESET[@SEED]` for an untrained model, `data` the folder that holds the two folders of Speech
    Commands v1, by the names of their archives. The probe starts and sees its batches alike for every upstream: results
    compare the upstreams. The checkpoint with the best validation accuracy of four is tested. A run that was interrupted goes
    on from its last quarter (S3PRL then begins an epoch anew, so figures differ a little); one that is done, for the same
    arguments and the same checkpoint, is not repeated.

    Returns the arguments and `accuracy` (test, in [0, 1]), `loss`, `chance` (share of the largest class of the test set) and
    `utterances` (of the test set). Raises `UserError` for bad arguments, data or checkpoints.
    """
    require_s3prl()
    if steps < 4 or batch_size < 1 or not learning_rate > 0:
        raise UserError(f"steps={steps}, batch_size={batch_size}, learning_rate={learning_rate}: four steps or more, above zero")
    root, test_root = folders(folder(str(data), "--data"))
    check_keywords(root, test_root)
    check_upstream("hubert_eff", upstream)
    settings = {
        "task": "ks", "upstream": upstream, "sha256": _digest(upstream), "data": str(data),
        "data_sha256": _listing_digest(root, test_root), "steps": steps,
        "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    result_file, settings_file = Path(out) / "result.json", Path(out) / "settings.json"
    if _read(settings_file) == settings:
        if result_file.is_file():
            return _read(result_file)
    else:
        if Path(out).is_dir() and any(Path(out).iterdir()) and not settings_file.is_file():
            raise UserError(f"{out} holds other files: choose a new folder for the run")
        for name in ("train", "evaluate"):
            shutil.rmtree(Path(out) / name, ignore_errors=True)
        result_file.unlink(missing_ok=True)
        write_json(settings_file, settings)
    with contextlib.redirect_stdout(sys.stderr):  # S3PRL's remarks are no result
        _superb_ks(settings, root, test_root, Path(out), device)

    metrics = yaml.safe_load((Path(out) / "evaluate" / "valid_best" / "test" / "result.yaml").read_text(encoding="utf-8"))
    sizes = [len(list((test_root / name).glob("*.wav"))) for name in (*KEYWORDS, UNKNOWN, SILENCE)]
    result = {
        **settings,
        "accuracy": metrics["accuracy"],
        "loss": metrics["loss"],
        "chance": max(sizes) / sum(sizes),
        "utterances": sum(sizes),
    }
    write_json(result_file, result)
    return result


def _superb_ks(settings: dict[str, Any], root: Path, test_root: Path, out: Path, device: str | None) -> None:
    """S3PRL's SuperbKS, its three stages, with its own defaults except for what is given here."""
    import torch

    register()
    from s3prl.problem import SuperbKS

    quarter = settings["steps"] // 4
    problem = SuperbKS()
    config = problem.default_config()
    for split in ("train", "valid", "test"):
        config["build_batch_sampler"][split]["batch_size"] = settings["batch_size"]
    config["build_batch_sampler"]["train"]["seed"] = settings["seed"]
    config["build_optimizer"]["conf"]["lr"] = settings["learning_rate"]
    config["train"].update(
        total_steps=settings["steps"], eval_step=quarter, save_step=quarter, log_step=quarter, auto_resume=True,
        seed=settings["seed"], keep_num_ckpts=1,
    )  # fmt: skip
    config.update(
        target_dir=str(out),
        cache_dir=str(out / "cache"),
        prepare_data={"gsc1": str(root), "gsc1_test": str(test_root)},
        build_upstream={"name": "hubert_eff", "path_or_url": settings["upstream"]},
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        num_workers=0,  # one-second files: loading costs a hundredth of the forward pass
    )
    problem.run(**config)


def _digest(upstream: str) -> str | None:
    """SHA-256 of a checkpoint, None for a preset."""
    if not Path(upstream).is_file():
        return None
    return hashlib.sha256(Path(upstream).read_bytes()).hexdigest()


def _listing_digest(*roots: Path) -> str:
    """SHA-256 of the names and sizes of all recordings: another corpus under the same path is another run."""
    files = (file for root in roots for file in sorted(root.glob("*/*.wav")))
    return hashlib.sha256("".join(f"{file.parent.name}/{file.name} {file.stat().st_size}\n" for file in files).encode()).hexdigest()


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(file.read_text(encoding="utf-8")))
    return {}


def run(argv: Sequence[str]) -> None:
    """Run the task and print its result."""
    parser = argparse.ArgumentParser("python -m superb_tasks.runner", description="Keyword spotting on a frozen upstream.")
    parser.add_argument("--upstream", required=True, metavar="CKPT|PRESET[@SEED]", help="a checkpoint, or an untrained model")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="holds the two folders of Speech Commands v1")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where checkpoints and result.json go")
    parser.add_argument("--steps", type=int, default=300, help="updates of the probe (default %(default)s; SUPERB: 200000)")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate of Adam (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="utterances per update (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the probe and its batches (default %(default)s)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    result = run_keyword_spotting(
        args.upstream, args.data, args.out, args.steps, args.lr, args.batch_size, args.seed, args.device
    )
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(
            f"keyword spotting, {args.upstream}: test accuracy {result['accuracy']:.1%} of {result['utterances']} utterances "
            f"(largest class {result['chance']:.1%}); {args.out / 'result.json'}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    return exit_code("superb_tasks.runner", run, argv)


if __name__ == "__main__":
    sys.exit(main())
