"""Checks the versions of everything that hubert-eff works with, and known breakages between them and of the CPU, each with its fix.

Versions come from the metadata of installed packages; nothing heavy is imported except torch, for threads and GPUs.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ..kernels.cpu import Cpu, cpu

# distribution name -> extra that needs it ("" = the core), in the order of the report
PACKAGES = {
    "hubert-eff": "",
    "torch": "",
    "numpy": "",
    "soundfile": "",
    "safetensors": "",
    "rich": "",
    "pyyaml": "",
    "torchaudio": "data",
    "soxr": "data",
    "scikit-learn": "data",
    "espeakng-loader": "data",
    "fairseq": "",  # stock fairseq, which must not be installed
    "fairseq-fixed": "fairseq",
    "omegaconf": "fairseq",
    "hydra-core": "fairseq",
    "s3prl": "superb",
    "setuptools": "superb",
    "transformers": "superb",
    "huggingface_hub": "superb",
    "jiwer": "text",
    "matplotlib": "plot",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "catalyst": "",  # must not be installed
    "pip": "",
}
CORE = ("torch", "numpy", "soundfile", "safetensors", "rich", "pyyaml")
PURPOSE = {
    "data": "corpus, manifest and labels",
    "fairseq": "pre-training with fairseq-hydra-train",
    "superb": "SUPERB evaluation with S3PRL",
    "text": "word error rates",
    "plot": "figures and reports",
    "onnx": "export to ONNX",
}
NOISE = 0.05  # relative error of a product in bfloat16 above which it is wrong; rounding gives 0.003
LOCK = "requirements-lock.txt"  # at the top of a checkout
FOR_S3PRL = "pip install torch==2.8.0 torchaudio==2.8.0"


@dataclass(frozen=True)
class Environment:
    """The input of the checks. `packages` has the installed distributions by name."""

    python: tuple[int, int, int]
    packages: Mapping[str, str]
    cpus: int = 1
    variables: Mapping[str, str] = field(default_factory=dict)
    compiler: str | None = None  # path of a C++ compiler
    torch_threads: int | None = None
    torch_error: str | None = None  # why `import torch` fails
    gpus: tuple[str, ...] = ()
    bfloat16_errors: tuple[float, float] | None = None  # of grouped convolutions on this CPU: torch's, and this package's
    one_bit: Mapping[str, str] = field(default_factory=dict)  # kernel of each operation of one-bit layers
    one_bit_error: str | None = None  # why no fast kernel runs
    processor: Cpu | None = None
    float_layers: Mapping[str, str] = field(default_factory=dict)  # the rule, and the form of each layer
    lock: str | None = LOCK  # path of the pins of a checkout; None for an installed package

    def version(self, package: str) -> tuple[int, ...] | None:
        """The release of an installed package as numbers, without local or pre-release part; None if absent."""
        text = self.packages.get(package)
        if text is None:
            return None
        match = re.match(r"(?:\d+!)?(\d+(?:\.\d+)*)", text)
        return tuple(map(int, match[1].split("."))) if match else (0,)


@dataclass(frozen=True)
class Finding:
    """One result of a check. `broken`: something installed does not work. `missing`: an optional part is not installed.
    `warning`: it works, but has not been tested."""

    status: str
    what: str
    fix: str


def read_environment() -> Environment:
    """The environment of this process."""
    packages: dict[str, str] = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads: int | None = None
    error: str | None = None
    gpus: tuple[str, ...] = ()
    errors: tuple[float, float] | None = None
    one_bit: dict[str, str] = {}
    one_bit_error: str | None = None
    float_layers: dict[str, str] = {}
    if "torch" in packages:
        try:
            import torch

            from ..layers.choice import FIXED, rule_for, tuned

            errors = convolution_errors()
            one_bit, one_bit_error = one_bit_kernels()
            threads = torch.get_num_threads()
            float_layers = {"rule": rule_for(cpu()).name, **FIXED.described()}
            if own := tuned(threads):
                float_layers |= {f"tuned {name}": form for name, form in own.described().items()}
            gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        except Exception as reason:  # a broken installation may raise anything, often OSError for a missing library
            error = f"{type(reason).__name__}: {' '.join(str(reason).split())}"
    return Environment(
        python=sys.version_info[:3],
        packages=packages,
        cpus=cpus,
        variables={k: os.environ[k] for k in ("OMP_NUM_THREADS", "PIP_CONSTRAINT") if k in os.environ},
        compiler=next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++").split()[0], "g++", "clang++"))), None),
        torch_threads=threads,
        torch_error=error,
        gpus=gpus,
        bfloat16_errors=errors,
        one_bit=one_bit,
        one_bit_error=one_bit_error,
        processor=cpu(),
        float_layers=float_layers,
        lock=_lock(),
    )


def _lock() -> str | None:
    found = Path(__file__).resolve().parents[2] / LOCK
    if not found.is_file():
        return None
    return LOCK if found.parent == Path.cwd() else str(found)


def one_bit_kernels() -> tuple[dict[str, str], str | None]:
    """The kernel of each operation of one-bit layers, compiled now if necessary; and the reason if there is none or only a slow one."""
    from ..errors import UserError
    from ..kernels.loader import absence, described

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = described()
    except UserError as error:
        return {}, str(error)
    reason = absence()
    return found, reason and f"one-bit layers run in plain torch, slower than float ones: {reason}"


def convolution_errors() -> tuple[float, float]:
    """Relative error (L2) of torch's and this package's grouped convolutions in bfloat16 on this CPU, in shapes that AMX gets wrong."""
    import torch
    from torch.nn import functional as F

    from ..layers.convolution import with_zero_tap

    errors = [(0.0, 0.0)]
    for channels, kernel in ((2, 32), (12, 128), (14, 128)):
        generator = torch.Generator().manual_seed(0)
        shapes = ((1, 4 * channels, kernel + 20), (4 * channels, channels, kernel))
        x, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
        right = F.conv1d(x.float(), weight.float(), groups=4)
        found = [F.conv1d(*operands, groups=4).float() for operands in ((x, weight), with_zero_tap(x, weight))]
        torchs, ours = (float((y - right).norm() / right.norm()) for y in found)
        errors.append((torchs, ours))
    return max(torchs for torchs, _ in errors), max(ours for _, ours in errors)


def diagnose(environment: Environment) -> list[Finding]:
    """All findings, breakages first; empty if everything is installed and fits together."""
    findings = [finding for check in CHECKS for finding in check(environment)]
    return sorted(findings, key=lambda f: ("broken", "warning", "missing").index(f.status))


def _text(version: tuple[int, ...] | None) -> str:
    return ".".join(map(str, version or ()))


def _install(environment: Environment, extra: str) -> str:
    """The command that installs an extra, quoted for a shell.

    fairseq-fixed and s3prl are built from source, which would take the newest torch to build with: a checkout pins what builds them;
    without one they are built with what is installed.
    """
    wanted = f"'hubert-eff[{extra}]'"
    if extra not in ("fairseq", "superb"):
        return f"pip install {wanted}"
    if environment.lock is None:
        return f"pip install 'setuptools>=65.5.1,<81' wheel Cython numpy && pip install --no-build-isolation {wanted}"
    lock, pip = shlex.quote(environment.lock), environment.version("pip")
    if pip is not None and pip >= (25, 3):
        return f"pip install --build-constraint {lock} -c {lock} {wanted}"
    return f"PIP_CONSTRAINT={lock} pip install {wanted}"


def check_core(env: Environment) -> Iterator[Finding]:
    """Check Python, the core's packages and torch."""
    if env.python < (3, 10):
        yield Finding("broken", f"Python {_text(env.python)} is older than 3.10", "use Python 3.11")
    elif env.python >= (3, 13):
        yield Finding(
            "warning",
            f"Python {_text(env.python[:2])} is newer than what fairseq-fixed and s3prl were tested with",
            "use Python 3.10 to 3.12 to train and to evaluate",
        )
    for name in CORE:
        if name not in env.packages:
            yield Finding("broken", f"{name} is not installed", "pip install hubert-eff")
    torch = env.version("torch")
    if torch is not None and torch < (2, 4):
        yield Finding("broken", f"torch {_text(torch)} is older than 2.4", "pip install 'torch>=2.4'")
    if env.torch_error:
        yield Finding("broken", f"torch does not import: {env.torch_error}", f"pip install --force-reinstall torch=={_text(torch)}")
    threads = env.variables.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > env.cpus:
        yield Finding(
            "warning",
            f"OMP_NUM_THREADS={threads} is more than the {env.cpus} CPUs of this process: threads wait for each other",
            f"export OMP_NUM_THREADS={env.cpus}",
        )


def check_machine(env: Environment) -> Iterator[Finding]:
    """Check that this CPU computes correctly in bfloat16, and the kernels of one-bit layers."""
    if env.one_bit_error is not None:
        fix = "install g++ or clang++ (Debian: apt-get install g++)" if env.one_bit else "unset HUBERT_EFF_KERNEL"
        yield Finding("warning" if env.one_bit else "broken", env.one_bit_error, fix)
    if env.bfloat16_errors is None:
        return
    torchs, ours = env.bfloat16_errors
    if not ours <= NOISE:
        yield Finding("broken", f"grouped convolutions in bfloat16 are off by {ours:.0%} on this CPU", "compute in float32 on it")
    elif not torchs <= NOISE:
        yield Finding(
            "warning",
            f"torch's grouped convolutions in bfloat16 are off by {torchs:.0%} on this CPU; those of hubert-eff are right ({ours:.1%})",
            "none is needed for hubert-eff; in other code compute them in float32, or make the kernel one zero tap longer",
        )


def check_audio(env: Environment) -> Iterator[Finding]:
    """Check torchaudio, which is compiled against one version of torch, and from 2.11 on also works with later ones."""
    torch, audio = env.version("torch"), env.version("torchaudio")
    if torch is None or audio is None or audio[:2] == torch[:2] or torch > audio >= (2, 11):
        return
    fix = f"pip install 'torchaudio=={_text(torch[:2]) if torch < (2, 11) else '2.11'}.*'"
    if "s3prl" in env.packages and torch >= (2, 9):
        if audio >= (2, 9):
            return  # check_superb says it
        fix = FOR_S3PRL
    yield Finding("broken", f"torchaudio {_text(audio)} does not belong to torch {_text(torch)}", fix)


def check_fairseq(env: Environment) -> Iterator[Finding]:
    """Check fairseq under any name, and the packages that its imports need."""
    replace = f"pip uninstall -y fairseq fairseq-fixed && {_install(env, 'fairseq')}"
    stock, fixed = env.version("fairseq"), env.version("fairseq-fixed")
    if stock is not None and fixed is not None:
        yield Finding("broken", "fairseq and fairseq-fixed are both installed and overwrite each other's files", replace)
    elif stock is not None and env.python >= (3, 11):
        yield Finding("broken", f"stock fairseq {_text(stock)} does not import on Python {_text(env.python[:2])}", replace)
    elif stock is not None:
        yield Finding("broken", f"stock fairseq {_text(stock)} needs omegaconf < 2.1, hubert-eff and s3prl need >= 2.1.1", replace)
    elif fixed is not None and fixed != (0, 12, 3, 1):
        yield Finding("warning", f"fairseq-fixed {_text(fixed)} is not the tested 0.12.3.1", "pip install fairseq-fixed==0.12.3.1")
    if fixed is None:
        return
    hydra = env.version("hydra-core")
    if hydra is None or hydra < (1, 3, 2):
        yield Finding(
            "broken",
            f"fairseq-fixed needs hydra-core >= 1.3.2, found {_text(hydra) or 'none'}",
            "pip install 'hydra-core>=1.3.2'",
        )


def check_superb(env: Environment) -> Iterator[Finding]:
    """Check S3PRL, and the packages whose new versions dropped functions that it calls."""
    s3prl = env.version("s3prl")
    if s3prl is None:
        return
    if s3prl != (0, 4, 18):
        yield Finding("warning", f"s3prl {_text(s3prl)} is not the tested 0.4.18", "pip install s3prl==0.4.18")
    audio = env.version("torchaudio")
    if audio is None or audio >= (2, 9):
        yield Finding(
            "broken",
            f"s3prl uses functions gone from torchaudio 2.9, found {_text(audio) or 'no torchaudio'}",
            FOR_S3PRL,
        )
    setuptools = env.version("setuptools")
    if setuptools is None or setuptools >= (81,):
        found = f"setuptools {_text(setuptools)} does not have it" if setuptools else "setuptools is not installed"
        yield Finding("broken", f"s3prl's dcase_util imports pkg_resources: {found}", "pip install 'setuptools>=65.5.1,<81'")
    for name, limit, reason in (
        ("transformers", 5, "s3prl does not work with transformers 5"),
        ("huggingface_hub", 1, "s3prl's run_downstream imports HfFolder, gone from huggingface_hub 1"),
    ):
        version = env.version(name)
        if version is not None and version >= (limit,):
            yield Finding("broken", f"{reason}; found {_text(version)}", f"pip install '{name}<{limit}'")
    if "catalyst" in env.packages:
        yield Finding(
            "warning",
            f"catalyst {env.packages['catalyst']}: its last release fails on import; superb_tasks brings the one class that s3prl uses",
            "pip uninstall -y catalyst",
        )


def check_shared(env: Environment) -> Iterator[Finding]:
    """Check what fairseq and S3PRL both need."""
    users = [name for name in ("fairseq-fixed", "s3prl") if name in env.packages]
    if not users:
        return
    who = " and ".join(users)
    omegaconf = env.version("omegaconf")
    if omegaconf is None or omegaconf < (2, 1, 1):
        yield Finding(
            "broken",
            f"{who} need omegaconf >= 2.1.1, found {_text(omegaconf) or 'none'}",
            "pip install 'omegaconf>=2.1.1'",
        )


def check_extras(env: Environment) -> Iterator[Finding]:
    """Find optional parts that are not installed, and what their installation needs."""
    stock = "fairseq" in env.packages and "fairseq-fixed" not in env.packages
    absent = {extra: [n for n, part in PACKAGES.items() if part == extra and n not in env.packages] for extra in PURPOSE}
    absent["fairseq"] = ["fairseq-fixed"] if "fairseq-fixed" not in env.packages and not stock else []
    absent["superb"] = ["s3prl"] if "s3prl" not in env.packages else []
    for extra in PURPOSE:
        if names := absent[extra]:
            yield Finding("missing", f"{PURPOSE[extra]}: no {', '.join(names)}", _install(env, extra))
    if env.compiler is None and absent["fairseq"]:
        yield Finding("missing", "no C++ compiler, and fairseq-fixed is built from source", "install g++ (Debian: apt-get install g++)")


CHECKS: tuple[Callable[[Environment], Iterator[Finding]], ...] = (
    check_core,
    check_machine,
    check_audio,
    check_fairseq,
    check_superb,
    check_shared,
    check_extras,
)


def report(environment: Environment, findings: list[Finding]) -> dict[str, Any]:
    """The whole diagnosis as plain values. `usable` is False if something installed is broken."""
    return {
        "usable": not any(f.status == "broken" for f in findings),
        "python": _text(environment.python),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: environment.packages.get(name) for name in PACKAGES},
        "cpus": environment.cpus,
        "threads": environment.torch_threads,
        "gpus": list(environment.gpus),
        "bfloat16_errors": environment.bfloat16_errors and dict(zip(("torch", "hubert_eff"), environment.bfloat16_errors, strict=True)),
        "one_bit": dict(environment.one_bit),
        "processor": environment.processor and dataclasses.asdict(environment.processor),
        "float_layers": dict(environment.float_layers),
        "compiler": environment.compiler,
        "variables": dict(environment.variables),
        "findings": [dataclasses.asdict(f) for f in findings],
    }
