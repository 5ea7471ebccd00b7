"""Docstrings of the Python interface: what docs/reference/api.md shows describes every parameter and what is returned."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest

import hubert_eff

from .helpers.pages import page

SHOWN = re.findall(r"^::: ([\w.]+)$", page("reference/api"), re.M)


def described(name: str) -> Iterator[tuple[str, Any, str]]:
    """(name, function, docstring) of a function, or of a class, whose docstring is that of its constructor, and its public methods."""
    found = pkgutil.resolve_name(name)
    if not inspect.isclass(found):
        yield name, found, inspect.getdoc(found) or ""
        return
    assert inspect.getdoc(found), name
    if "__init__" in vars(found) and not dataclasses.is_dataclass(found):
        yield name, found.__init__, inspect.getdoc(found) or ""
    for key, member in vars(found).items():
        if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            assert member.__doc__, f"{name}.{key}"
            if inspect.isfunction(member):
                yield f"{name}.{key}", member, inspect.cleandoc(member.__doc__)


@pytest.mark.parametrize("name", SHOWN)
def test_parameters_and_results_are_described(name: str) -> None:
    for where, function, text in described(name):
        sections = dict(re.findall(r"^(Args|Returns|Raises):\n((?: {4}.*\n?|\n)+)", text, re.M))
        parameters = [p.name for p in inspect.signature(function).parameters.values() if p.name != "self"]
        assert re.findall(r"^ {4}\*{0,2}(\w+): \S", sections.get("Args", ""), re.M) == parameters, where
        returns = inspect.signature(function).return_annotation not in ("None", None) and function.__name__ != "__init__"
        assert ("Returns" in sections) == returns, where
        assert text.splitlines()[0].endswith((".", ":")), where


def test_every_public_function_is_shown() -> None:
    shown = {id(pkgutil.resolve_name(name)) for name in SHOWN}
    assert not [name for name in hubert_eff.__all__ if id(getattr(hubert_eff, name)) not in shown]
