"""Identifies the source of a hidden state: the model's weights and configuration, and the code that computes with them."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import hubert_eff
from hubert_eff.models.hubert import HubertModel

ROOT = Path(hubert_eff.__file__).resolve().parents[1]  # where the packages are
ENTRY = "superb_tasks.upstream.expert"
PACKAGES = ("hubert_eff", "superb_tasks")
COMPILED = (".c", ".cpp", ".h")


def of_model(model: HubertModel) -> str:
    """SHA-256 of a model: its class, its configuration, the names, types, shapes and values of its tensors.

    A preset and its seed, a checkpoint and an export of it have the same one if their values are the same. Source of modules that are
    neither torch's nor in `of_code` (an encoder that another package registers) counts, too.
    """
    found = hashlib.sha256(f"{type(model).__name__} {json.dumps(asdict(model.config), sort_keys=True, default=str)}\n".encode())
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            found.update(f"{name} {value!r}\n".encode())
    classes = {type(module) for module in model.modules()}
    for module in sorted({kind.__module__ for kind in classes if kind.__module__.partition(".")[0] not in ("torch", *PACKAGES)}):
        with contextlib.suppress(OSError, TypeError):  # typed into an interpreter: it has no source
            found.update(f"{module}\n{inspect.getsource(sys.modules[module])}".encode())
    return found.hexdigest()


@functools.cache
def of_code(root: Path = ROOT) -> str:
    """SHA-256 of the source below `root` that `ENTRY` imports, directly or not, without comments and docstrings, and of the kernels."""
    sources: dict[str, str] = {}
    waiting = [ENTRY]
    while waiting:
        name = waiting.pop()
        path = root.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")
        if name in sources or name.partition(".")[0] not in PACKAGES or not file.is_file():
            continue
        tree = ast.parse(file.read_bytes())
        package = name if path.is_dir() else name.rpartition(".")[0]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                waiting += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        sources[name] = ast.unparse(_without_docstrings(tree))
    found = hashlib.sha256()
    for name in sorted(sources):
        found.update(f"{name}\n{sources[name]}\n".encode())
    for file in sorted(file for file in (root / "hubert_eff").rglob("*") if file.suffix in COMPILED):
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body[0] = ast.Pass()
    return tree
