"""Trains each debug configuration for some updates through fairseq-hydra-train, to test whether every encoder learns, on the valid split.

    hubert-eff corpus demo --out runs/corpus --speakers 24
    hubert-eff manifest runs/corpus --out runs/data --valid-percent 10
    hubert-eff labels runs/data --out runs/data/mfcc --features mfcc --clusters 50
    python benchmarks/learning/learning.py runs/data runs/data/mfcc --out runs/learning

A model that has learned nothing reaches the share of the most frequent label. Prints a Markdown table as it goes, and writes it, with the
same figures in JSON, beside the logs of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hubert_eff
from hubert_eff.encoders.registry import get_encoder
from hubert_eff.errors import UserError
from hubert_eff.utils.configurations import plugin_dir
from hubert_eff.utils.files import config_dir

COLUMNS = (
    "| encoder | parameters | updates per second | masked accuracy, valid | most frequent label | ratio |",
    "|---|---|---|---|---|---|",
)


def config_name(encoder: str) -> str:
    """The configuration that trains `<encoder>-debug`; the Conformer's is the one to start with."""
    return "debug" if encoder == "conformer" else f"{encoder}_debug"


def parameters(encoder: str) -> int:
    """Parameters of `<encoder>-debug` without the label embeddings."""
    model = hubert_eff.build(f"{encoder}-debug", num_classes=[1])
    return sum(p.numel() for p in model.parameters()) - model.config.codebook_dim


def train(encoder: str, data: Path, labels: Path, updates: int, out: Path, overrides: Sequence[str] = (), name: str = "") -> dict[str, Any]:
    """One run, called `name` (default: as its encoder); its figures. `RuntimeError` with the end of the log if it fails."""
    name = name or encoder
    command = [
        sys.executable, "-m", "fairseq_cli.hydra_train", "--config-dir", str(config_dir() / "pretrain"),
        "--config-name", config_name(encoder), f"common.user_dir={plugin_dir()}", f"task.data={data}", f"task.label_dir={labels}",
        f"optimization.max_update={updates}", f"dataset.validate_interval_updates={updates}", f"checkpoint.save_dir={out / name}",
        "checkpoint.no_save=true", "common.log_format=json", "common.log_interval=10", *overrides,
    ]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONWARNINGS": "ignore"}
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{name}.log"
    with log.open("w", encoding="utf-8") as stream:
        code = subprocess.run(command, check=False, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode
    lines = log.read_text(encoding="utf-8").splitlines()
    if code:
        raise RuntimeError(f"{name} ended with exit code {code}; the end of {log}:\n" + "\n".join(lines[-5:]))
    inner, valid = records(lines, "[train_inner]"), records(lines, "[valid]")[-1]
    first, last = inner[0], inner[-1]  # the start of the run is not its speed
    seconds = float(last["wall"]) - float(first["wall"])
    return {
        "encoder": encoder,
        "config": f"{config_name(encoder)}.yaml",
        "parameters": parameters(encoder),
        "updates": int(valid["valid_num_updates"]),
        "updates_per_second": (int(last["num_updates"]) - int(first["num_updates"])) / max(seconds, 1e-9),
        "accuracy": float(valid["valid_correct_m_0"]),
        "majority": float(valid["valid_majority_m_0"]),
        "code_perplexity": float(valid["valid_code_ppl_0"]),
        "label_perplexity": float(valid["valid_label_ppl_0"]),
    }


def records(lines: list[str], kind: str) -> list[dict[str, Any]]:
    """The JSON lines of one kind in fairseq's log."""
    return [json.loads(line[line.index("{") :]) for line in lines if kind in line and line.endswith("}")]


def row(run: dict[str, Any]) -> str:
    return (
        f"| {run['encoder']} | {run['parameters']:,} | {run['updates_per_second']:.1f} | {run['accuracy']:.1%} | {run['majority']:.1%} "
        f"| {run['accuracy'] / run['majority']:.1f} |"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data", type=Path, help="directory that `hubert-eff manifest` wrote")
    options.add_argument("labels", type=Path, help="directory that `hubert-eff labels` wrote (MFCC: 100 labels per second)")
    options.add_argument("--encoders", nargs="+", default=hubert_eff.list_encoders(), metavar="NAME", help="default: all")
    options.add_argument("--updates", type=int, default=200, help="updates of each model (default: 200)")
    options.add_argument("--out", type=Path, required=True, help="folder for logs, learning.json and learning.md")
    args = options.parse_args()
    if args.updates < 20:
        options.error(f"--updates {args.updates}: at least 20, or there is no speed to tell")
    try:
        for name in args.encoders:
            get_encoder(name)
    except UserError as error:
        options.error(str(error))
    out = args.out.resolve()
    print(*COLUMNS, sep="\n", flush=True)
    runs = []
    for name in args.encoders:
        try:
            runs.append(train(name, args.data.resolve(), args.labels.resolve(), args.updates, out))
        except RuntimeError as error:
            sys.exit(str(error))
        print(row(runs[-1]), flush=True)
        (out / "learning.json").write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
        (out / "learning.md").write_text("\n".join([*COLUMNS, *map(row, runs)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
