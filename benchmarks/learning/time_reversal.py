"""Tests whether small encoder-decoders reverse time as they learn, without CTC, with it, and with identity attention at the start.

    python benchmarks/learning/time_reversal.py FSDD/SPEAKER --out runs/flips

FSDD/SPEAKER: recordings of digits, DIGIT_SPEAKER_INDEX.flac; index 0 to 4 are the test, as in that data set. Strings of digits are drawn
from the others at random, one symbol per digit, and a Conformer with an LSTM decoder (single-head additive attention) learns them from
random weights (Schmitt et al. 2024). Every checkpoint is a file that `hubert-eff align --check-flip` and `hubert-eff transcribe` read. A
run that is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubert_eff.analysis.flips import checkpoints_of, over_utterances
from hubert_eff.encoders.registry import preset_config
from hubert_eff.errors import UserError
from hubert_eff.recognition import Recognizer, RecognizerConfig, load_recognizer
from hubert_eff.recognition.label_search import label_search
from hubert_eff.recognition.recordings import read_recording
from hubert_eff.recognition.scoring import score
from hubert_eff.utils.files import replacing, write_json

DIGITS = "0123456789"
TEST = 5  # recordings of each digit with a lower index are the test
CONDITIONS = {"attention alone": 0.0, "identity attention first": 0.0, "CTC weight 0.3": 0.3}
Pool = list[tuple[Tensor, str]]


def read_pools(folder: Path) -> tuple[Pool, Pool]:
    """(audio (S,), digit) of the recordings of a speaker: train and test."""
    train: Pool = []
    test: Pool = []
    for file in sorted(folder.glob("*.flac")):
        if found := re.fullmatch(r"(\d)_.*_(\d+)", file.stem):
            (test if int(found[2]) < TEST else train).append((read_recording(file)[0], found[1]))
    if not train or not test:
        raise UserError(f"{folder} holds no recordings DIGIT_SPEAKER_INDEX.flac: name a speaker's folder of the Free Spoken Digit Dataset")
    return train, test


def string(pool: Pool, rng: random.Random, fewest: int, most: int) -> tuple[Tensor, str]:
    """`fewest` to `most` recordings, one after the other, and their digits."""
    chosen = rng.choices(pool, k=rng.randint(fewest, most))
    return torch.cat([wav for wav, _ in chosen]), "".join(digit for _, digit in chosen)


def collate(strings: list[tuple[Tensor, str]]) -> dict[str, Tensor]:
    """Keyword arguments of `Recognizer.forward`."""
    lengths = torch.tensor([len(wav) for wav, _ in strings])
    targets = [torch.tensor([DIGITS.index(digit) + 1 for digit in text]) for _, text in strings]
    return {
        "source": torch.nn.utils.rnn.pad_sequence([wav for wav, _ in strings], batch_first=True),
        "padding_mask": torch.arange(int(lengths.max()))[None] >= lengths[:, None],
        "targets": torch.nn.utils.rnn.pad_sequence(targets, batch_first=True),
        "target_lengths": torch.tensor([len(text) for text in targets]),
    }


def build(args: argparse.Namespace, condition: str) -> Recognizer:
    """A recognizer with random weights."""
    config = RecognizerConfig(
        letters=DIGITS, ctc_weight=CONDITIONS[condition], label_smoothing=0.0, final_dropout=0.0, apply_mask=False,
        decoder_type="lstm", decoder_layers=1, decoder_ffn_embed_dim=2 * args.dim, decoder_dropout=0.1,
    )  # fmt: skip
    identity = args.identity_updates if condition.startswith("identity") else 0
    config.describe(
        preset_config(
            "conformer-debug", encoder_layers=args.layers, encoder_embed_dim=args.dim, encoder_ffn_embed_dim=2 * args.dim,
            conv_feature_layers="logmel-dws",
            pos_enc_type=args.positions, identity_attention_updates=identity,
            dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, dropout_input=0.0, mask_prob=0.0, mask_channel_prob=0.0,
        )
    )  # fmt: skip
    return Recognizer(config)


def save(model: Recognizer, updates: int, file: Path) -> None:
    """As fairseq's trainer lays a checkpoint out."""
    settings = {"_name": "hubert_eff_aed", "w2v_path": None, "preset": None, **vars(model.config)}
    content = {"cfg": {"model": settings, "task": {}}, "model": model.state_dict(), "optimizer_history": [{"num_updates": updates}]}
    with replacing(file) as temporary:
        torch.save(content, temporary)


def train(args: argparse.Namespace, condition: str, seed: int, pool: Pool, folder: Path) -> None:
    """Train one model; checkpoints go to `folder` every `args.every` updates."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = build(args, condition).train()
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
    for update in range(args.updates):
        model.set_num_updates(update)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((update + 1) / args.warmup, 1.0)
        output = model(**collate([string(pool, rng, args.fewest, args.most) for _ in range(args.batch)]))
        (output.loss / output.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (update + 1) % args.every == 0:
            save(model, update + 1, folder / f"checkpoint_{update + 1}.pt")


def examine(folder: Path, strings: list[tuple[Tensor, str]]) -> list[dict[str, Any]]:
    """Digit errors by attention search, accuracy after true digits, and directions, of every checkpoint of a folder."""
    rows = []
    for updates, file in checkpoints_of(folder):
        model = load_recognizer(file)
        with torch.no_grad():
            output = model(**collate(strings))
            encoded = [model.encode(wav[None])[0][0] for wav, _ in strings]
        heard = [model.alphabet.text(found[0][0]) for found in label_search(model, encoded, 4, longest=20)]
        errors = score([text for _, text in strings], heard).characters
        flips = over_utterances(model, [(wav[None], model.alphabet.spell(text)) for wav, text in strings], "attention")
        accuracy = float(output.correct) / float(output.count)
        rows.append({"updates": updates, "accuracy": round(accuracy, 4), "digit_errors": errors.plain(), **flips.plain()})
    return rows


def say(runs: list[dict[str, Any]]) -> None:
    """One line per run: its last checkpoint, and the checkpoints in which time is reversed."""
    print(f"{'condition':26} seed  digit errors  accuracy  reversed / in order / unclear   audio  output decoder   checkpoints reversed")
    for run in runs:
        last = run["checkpoints"][-1]
        ends, crossed = list(last["places"].values()), list(last["cross_attention"].values())
        turned = [str(row["updates"]) for row in run["checkpoints"] if row["verdict"] == "reversed"]
        print(
            f"{run['condition']:26} {run['seed']:4} {last['digit_errors']['rate']:12.1f}% {last['accuracy']:8.2f}  "
            f"{last['turned']:8} / {last['in_order']:8} / {last['unclear']:7}   {ends[0]:+5.2f}  {ends[-1]:+5.2f}   {crossed[-1]:+5.2f}   "
            f"{', '.join(turned) or 'none'}"
        )


def draw(runs: list[dict[str, Any]], file: Path) -> None:
    """Correlations at audio, encoder output and decoder attention over updates, a panel per condition, a line per seed."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(run["condition"] for run in runs))
    figure = Figure(figsize=(4 * len(names), 3.2), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, names):
        seeds = sorted(run["seed"] for run in runs if run["condition"] == name)
        for run in (run for run in runs if run["condition"] == name):
            updates = [row["updates"] for row in run["checkpoints"]]
            for color, label, value in (
                ("C0", "audio", lambda row: list(row["places"].values())[0]),
                ("C3", "encoder output", lambda row: list(row["places"].values())[-1]),
                ("C7", "decoder attention", lambda row: list(row["cross_attention"].values())[-1]),
            ):
                axis.plot(
                    updates,
                    list(map(value, run["checkpoints"])),
                    color=color,
                    alpha=0.7,
                    label=label if run["seed"] == seeds[0] else None,
                )
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set(title=name, xlabel="updates", ylim=(-1.05, 1.05))
    axes[0].set_ylabel("correlation of digits and time")
    axes[0].legend(frameon=False, fontsize=8)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=90)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path, help="a speaker's recordings of digits")
    options.add_argument("--out", type=Path, required=True, help="folder of checkpoints, flips.json and flips.png")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    options.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS), help="(default: all)")
    options.add_argument("--updates", type=int, default=600, help="(default: %(default)d)")
    options.add_argument("--every", type=int, default=150, help="updates between two checkpoints (default: %(default)d)")
    options.add_argument("--identity-updates", type=int, default=150, help="updates of identity attention (default: %(default)d)")
    options.add_argument("--batch", type=int, default=6, help="strings per update (default: %(default)d)")
    options.add_argument("--fewest", type=int, default=2, help="digits of a string in training (default: %(default)d)")
    options.add_argument("--most", type=int, default=4, help="digits of a string (default: %(default)d)")
    options.add_argument("--layers", type=int, default=4, help="blocks of the encoder (default: %(default)d)")
    options.add_argument("--dim", type=int, default=64, help="model dimension (default: %(default)d)")
    options.add_argument("--positions", choices=("abs", "rel_pos"), default="abs", help="positions of the attention (default: %(default)s)")
    options.add_argument("--lr", type=float, default=0.003, help="(default: %(default)g)")
    options.add_argument("--warmup", type=int, default=100, help="number of updates (default: %(default)d)")
    options.add_argument("--tests", type=int, default=12, help="number of test strings (default: %(default)d)")
    args = options.parse_args()
    pool, test = read_pools(args.folder)
    rng = random.Random(1)
    strings = [string(test, rng, args.most, args.most) for _ in range(args.tests)]
    settings = {key: value for key, value in vars(args).items() if key not in ("folder", "out", "seeds", "conditions")}
    for seed in args.seeds:
        for condition in args.conditions:
            folder = args.out / f"{condition.split()[0].lower()}-{seed}"
            record = folder / "run.json"
            if not record.is_file() or json.loads(record.read_text())["settings"] != settings:
                folder.mkdir(parents=True, exist_ok=True)
                for old in folder.glob("checkpoint_*.pt"):
                    old.unlink()
                begin = time.process_time()
                train(args, condition, seed, pool, folder)
                rows = examine(folder, strings)
                run = {"condition": condition, "seed": seed, "settings": settings, "cpu_seconds": time.process_time() - begin}
                write_json(record, {**run, "checkpoints": rows})
            say([json.loads(record.read_text())])
    runs = [json.loads(file.read_text()) for file in sorted(args.out.glob("*-*/run.json"))]
    runs = [run for run in runs if run["settings"] == settings]  # also those of other calls
    write_json(args.out / "flips.json", {"strings": len(strings), "runs": runs})
    say(runs)
    draw(runs, args.out / "flips.png")


if __name__ == "__main__":
    main()
