"""Four Conformers at a high learning rate: which diverge, and whether the layer trends say so before the loss does.

    python benchmarks/speed/layer_trends.py runs/digits runs/digits/mfcc --out runs/trends

trains a Conformer without norms in its blocks, with BatchNorm, with LayerNorm, and a FusionFormer, each of debug size with more blocks, by
fairseq-hydra-train. Printed per model: the first alarm of the trends; the update at which the loss shows trouble, that is, it is not finite
or exceeds its value over the first ten updates by a tenth; and the loss at the end. Pictures and figures stand in --out, among them
all models overlaid (trends.png). What a record
costs: python benchmarks/speed/layer_trends.py --overhead
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from harness import compare

import hubert_eff
from hubert_eff import cli
from hubert_eff.analysis.layer_trends import LayerTrends, alarms, look, read_trends
from hubert_eff.utils.files import write_json

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "Conformer, no norm": ("debug", ["model.block_norm=none", "model.pos_enc_type=abs"]),
    "Conformer, BatchNorm": ("debug", ["model.block_norm=batch_norm", "model.pos_enc_type=abs"]),
    "Conformer, LayerNorm": ("debug", ["model.pos_enc_type=abs"]),
    "FusionFormer": ("fusionformer_debug", []),
}


def folder_of(name: str, out: Path) -> Path:
    """Where a model's run stands."""
    return (out / re.sub(r"\W+", "-", name.lower())).resolve()


def train(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run and what came of it."""
    config, keys = MODELS[name]
    folder = folder_of(name, args.out)
    command = [
        sys.executable, "-m", "fairseq_cli.hydra_train", "--config-dir", str(ROOT / "configs" / "pretrain"),
        "--config-name", config,
        f"common.user_dir={ROOT / 'fairseq_plugins'}", f"task.data={args.data.resolve()}", f"task.label_dir={args.labels.resolve()}",
        f"checkpoint.save_dir={folder}", "checkpoint.no_save=true", "dataset.disable_validation=true", f"optimization.lr=[{args.lr}]",
        "optimization.clip_norm=0.0", "lr_scheduler.warmup_updates=5", f"optimization.max_update={args.updates}",
        f"task.trends_interval={args.interval}", "task.trends_input=batch", f"model.encoder_layers={args.layers}",
        "dataset.max_tokens=128000", "common.log_format=json", "common.log_interval=1", *keys,
    ]  # fmt: skip
    (folder / "trends.jsonl").unlink(missing_ok=True)
    done = subprocess.run(command, capture_output=True, text=True)
    losses: list[tuple[int, float]] = []
    for line in done.stdout.splitlines():
        found = re.search(r"\[train_inner\].*?(\{.*\})", line)
        if found:
            entry = json.loads(found[1])
            losses.append((int(entry["num_updates"]), float(entry["loss"])))
    stopped = next((line for line in done.stderr.splitlines() if line.startswith("fairseq-hydra-train: stopped")), "")
    if done.returncode and not stopped:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    records = read_trends(folder / "trends.jsonl")
    found_alarms = alarms(records)
    with contextlib.redirect_stdout(sys.stderr):
        cli.main(["trends", str(folder), "--out", str(folder)])
    start = sum(loss for _, loss in losses[:10]) / max(len(losses[:10]), 1)
    trouble = next((update for update, loss in losses if update > 10 and not loss < 1.1 * start), None)
    if trouble is None and stopped:
        trouble = int(re.search(r"update (\d+)", stopped)[1])  # type: ignore[index]
    last = [loss for _, loss in losses[-10:]]
    variances = [stats[1] for record in records for stats in record.layers.values() if math.isfinite(stats[1])]
    return {
        "model": name, "first_alarm": str(found_alarms[0]) if found_alarms else None,
        "alarm_update": found_alarms[0].update if found_alarms else None, "layers_in_alarm": len({a.layer for a in found_alarms}),
        "layers": len(records[-1].layers), "largest_variance": max(variances), "loss_trouble_update": trouble, "stopped": stopped or None,
        "start_loss": start, "end_loss": sum(last) / max(len(last), 1), "updates": losses[-1][0] if losses else 0,
    }  # fmt: skip


def overhead() -> None:
    """What a record costs beside a training step: Conformer of debug size, 8 x 2 s, medians."""
    model = hubert_eff.build("conformer-debug", num_classes=[54]).train()
    optimizer = torch.optim.Adam(model.parameters())
    wav, labels = torch.randn(8, 32_000), torch.randint(4, 54, (8, 99))

    def step() -> None:
        logits = model(wav, [labels])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits["logits_m"][0], logits["targets_m"][0]).backward()
        optimizer.step()

    def watched() -> None:
        with LayerTrends(model).watching():
            step()

    times = compare({"step": step, "step under watch": watched, "look at Gaussian input": lambda: look(model, 0)}, 7)
    plain, batch, gaussian = (statistics.median(values) * 1e3 for values in times.values())
    print(f"training step {plain:.0f} ms; with a record of its batch {batch:.0f} ms; a record on Gaussian input {gaussian:.0f} ms more")
    print(f"at every 100th update: {(batch - plain) / plain:.2f}% and {gaussian / plain:.2f}% of the time; without a record nothing")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("data", type=Path, nargs="?", help="folder of train.tsv")
    options.add_argument("labels", type=Path, nargs="?", help="folder of train.km at 100 per second")
    options.add_argument("--out", type=Path, help="folder of runs, pictures and figures")
    options.add_argument("--overhead", action="store_true", help="measure the cost of a record instead")
    options.add_argument("--lr", type=float, default=0.02, help="learning rate (default: %(default)g)")
    options.add_argument("--layers", type=int, default=6, help="number of blocks (default: %(default)d)")
    options.add_argument("--updates", type=int, default=100, help="number of updates (default: %(default)d)")
    options.add_argument("--interval", type=int, default=2, help="updates between two records (default: %(default)d)")
    options.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all four")
    args = options.parse_args()
    if args.overhead:
        torch.set_num_threads(1)
        overhead()
        return
    if args.labels is None or args.out is None:
        options.error("DATA, LABELS and --out are needed")
    rows = []
    for name in args.models:
        row = train(name, args)
        rows.append(row)
        print(
            f"{name}: alarm {row['first_alarm']}; loss in trouble at {row['loss_trouble_update']}; loss {row['start_loss']:.2f} -> "
            f"{row['end_loss']:.2f} after {row['updates']} updates; largest variance {row['largest_variance']:.3g}", flush=True,
        )  # fmt: skip
    if len(rows) > 1:  # all models in one picture
        with contextlib.redirect_stdout(sys.stderr):
            cli.main(["trends", *(str(folder_of(name, args.out)) for name in args.models), "--out", str(args.out), "--blocks", "2"])
    write_json(args.out / "trends-table.json", {"lr": args.lr, "layers": args.layers, "rows": rows})


if __name__ == "__main__":
    main()
