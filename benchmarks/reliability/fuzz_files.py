"""Gives changed exports (.safetensors) and checkpoints (.pt) to the readers, and records the outcome.

    python benchmarks/reliability/fuzz_files.py --count 1000 10000 --seed 0 --workers 2

Each file is one of a few sound ones, changed at random (file_mutations.py): cut, bits flipped, numbers and names in it replaced,
records swapped, configurations absurd, pickles made to do harm. It is read in a process of its own memory limit, which is followed by
another when it dies. A file counts as

- refused: `UserError`, one line of at most 1,000 characters,
- loaded: a model; every tenth one also hears 2,000 samples,
- crashed, hung (more than 10 s of processor time, or 60 s), failed (another exception, or no such line), or foreign: loaded with numbers
  that the file does not hold.

The last four are counted as lost; the exit code is 1 if there is any. `--count` gives the number of checkpoints and of exports.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import file_mutations
import numpy as np
import torch

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.models.hubert import HubertModel
from hubert_eff.quant.runtime.modules import PackedConv1d, PackedLinear
from hubert_eff.quant.storage import bytes_of
from hubert_eff.recognition import load_recognizer

SECONDS, PATIENCE = 10.0, 60.0  # processor time that a file may take, and time, on a busy machine
MEMORY = 3 << 30  # bytes that a process may take beyond what it starts with
LINE = 1_000
Case = tuple[str, str, int]  # kind of file, mutation, number


def cases(checkpoints: int, exports: int) -> list[Case]:
    """The mutations of each kind, by their shares."""
    found = []
    for kind, count, shares in (("pt", checkpoints, file_mutations.CHECKPOINTS), ("safetensors", exports, file_mutations.EXPORTS)):
        names = [mutate.__name__ for mutate, share in shares.items() for _ in range(share)]
        random.Random(0).shuffle(names)  # a few of them are all kinds
        found += [(kind, names[index % len(names)], index) for index in range(count)]
    return found


def numbers(content: bytes) -> Iterator[Any]:
    """All numbers of a file, whatever its bytes are read as, as float64 and int64."""
    for kind, size in (("<f4", 4), ("<f2", 2), ("bf16", 2), ("<f8", 8), ("<i8", 8), ("<i4", 4)):
        for start in range(size):
            raw = content[start : start + (len(content) - start) // size * size]
            found = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4") if kind == "bf16" else np.frombuffer(raw, kind)
            with np.errstate(all="ignore"):
                found = found.astype("f8" if found.dtype.kind == "f" else "i8")
            yield found


def foreign(model: torch.nn.Module, content: bytes) -> list[str]:
    """Numbers of a loaded model that are nowhere in the file."""
    packed = [m for m in model.modules() if isinstance(m, (PackedLinear, PackedConv1d))]
    if any(bytes_of(module).numpy().tobytes() not in content for module in packed):
        return ["bits"]
    tensors = [t for n, t in model.state_dict().items() if isinstance(t, torch.Tensor) and not n.endswith((".bits", ".initialized"))]
    tensors = [t for t in tensors if t.dtype == torch.bfloat16 or t.numpy().tobytes() not in content]  # the others are there as they are
    floats = [t.double().flatten() for t in tensors if t.is_floating_point()]
    wanted = {
        "f": np.unique(torch.cat(floats).numpy()) if floats else np.zeros(0),
        "i": np.unique([int(n) for t in tensors if not t.is_floating_point() for n in t.flatten()]).astype("i8"),
    }
    wanted["f"] = wanted["f"][~np.isnan(wanted["f"])]
    for found in numbers(content):
        if not wanted["f"].size and not wanted["i"].size:
            break
        kind = found.dtype.kind
        with np.errstate(all="ignore"):
            wanted[kind] = wanted[kind][~np.isin(wanted[kind], found)]
            if kind == "f":  # a file in double precision is loaded in single
                wanted["f"] = wanted["f"][~np.isin(wanted["f"], found.astype("f4").astype("f8"))]
    return [str(value) for values in wanted.values() for value in values]


def read(path: Path) -> tuple[str, list[torch.nn.Module]]:
    """The outcome for one file, and the models that are loaded from it."""
    models: list[torch.nn.Module] = []
    for load in (hubert_eff.load, load_recognizer) if path.suffix == ".pt" else (hubert_eff.load,):
        try:
            models.append(load(path))
        except UserError as error:
            if "\n" in str(error) or len(str(error)) > LINE:
                return f"failed: a message of {len(str(error))} characters: {str(error)[:300]!r}", []
        except Exception as error:
            return f"failed: {type(error).__name__}: {error}"[:300], []
    return "loaded" if models else "refused", models


def run(model: torch.nn.Module) -> None:
    """Run a loaded model on some audio."""
    if isinstance(model, HubertModel):
        dtype = torch.bfloat16 if model.mask_emb.dtype == torch.bfloat16 else torch.float32
        with torch.inference_mode(), suppress(UserError):  # of too few samples, for an extractor of long kernels
            model.hidden_states(torch.randn(1, 2_000).to(dtype))


def _work(tried: list[Case], bases: dict[str, list[bytes]], seed: int, folder: Path, results: Any) -> None:
    """In a process of its own: read one file after the other, and say what became of each before the next."""
    with open("/proc/self/statm") as sizes:
        taken = int(sizes.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    for kind, name, index in tried:
        r = random.Random(f"{seed} {kind} {index}")
        base = r.choice(bases[kind])
        content = getattr(file_mutations, name)(base, r)
        path = folder / f"model.{kind}"
        path.write_bytes(content)
        results.send("started")
        start = time.process_time()
        outcome, models = read(path)
        if index % 10 == 0:
            for model in models:
                run(model)
        results.send((time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        lost = [number for model in models for number in foreign(model, content)]
        results.send(f"foreign: {lost[:3]}" if lost else outcome)


def outcomes(tried: list[Case], bases: dict[str, list[bytes]], seed: int, folder: Path) -> Iterator[tuple[Case, str, float, int]]:
    """(case, what became of it, seconds of processor time, peak memory of the process) of each, in order. A process that dies or hangs is
    replaced."""
    context = multiprocessing.get_context("fork")
    left = list(tried)
    while left:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(left, bases, seed, folder, sender))
        process.start()
        sender.close()
        try:
            while left:
                receiver.recv()  # started; making the file takes its time
                if not receiver.poll(PATIENCE):
                    process.kill()
                    yield left.pop(0), "hung", PATIENCE, 0
                    break
                seconds, memory = receiver.recv()
                outcome = receiver.recv()
                yield left.pop(0), "hung" if seconds > SECONDS else outcome, seconds, memory
        except EOFError:
            process.join()
            yield left.pop(0), f"crashed: exit code {process.exitcode}", 0.0, 0
        process.kill()
        process.join()


def fuzz(
    tried: list[Case], seed: int, folder: Path, workers: int = 1, report: Callable[[Case, str], None] = lambda case, outcome: None
) -> dict[tuple[str, str], Counter[str]]:
    """Counts by kind and mutation, with the slowest file (`ms`) and the most memory of its process (`mb`)."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    warnings.simplefilter("ignore")
    bases = {"pt": file_mutations.checkpoints(), "safetensors": file_mutations.exports(folder)}
    for kind, contents in bases.items():  # each is sound; what torch imports for its first model is there when processes begin
        for content in contents:
            (folder / f"sound.{kind}").write_bytes(content)
            outcome, models = read(folder / f"sound.{kind}")
            assert outcome == "loaded" and not any(foreign(model, content) for model in models)
    found: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    running = []
    for worker in range(workers):
        place = folder / str(worker)
        place.mkdir()
        running.append(outcomes(tried[worker::workers], bases, seed, place))
    while running:
        for part in list(running):  # each waits for its own process, the others go on meanwhile
            try:
                case, outcome, seconds, memory = next(part)
            except StopIteration:
                running.remove(part)
                continue
            counts = found[case[:2]]
            word = outcome.partition(":")[0]
            counts[word] += 1
            counts["ms"] = max(counts["ms"], round(1000 * seconds))
            counts["mb"] = max(counts["mb"], memory >> 20)
            if word not in ("refused", "loaded"):
                report(case, outcome)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, nargs=2, default=(1_000, 10_000), metavar=("CHECKPOINTS", "EXPORTS"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    lost: list[str] = []

    def report(case: Case, outcome: str) -> None:
        lost.append(outcome)
        print(f"{case}: {outcome}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(cases(*args.count), args.seed, Path(folder), args.workers, report)
    words = ("refused", "loaded", "crashed", "hung", "failed", "foreign")
    print(f"| file | changed by | {' | '.join(words)} | slowest, ms | memory, MB |\n|{'---|' * (len(words) + 4)}")
    for (kind, name), counts in sorted(found.items()):
        print(f"| {kind} | {name} | {' | '.join(str(counts[word]) for word in words)} | {counts['ms']} | {counts['mb']} |")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
