"""A hook of mkdocs that generates pages from the code: commands from argparse, configuration keys from `option()`, and the examples."""

from __future__ import annotations

import argparse
import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import hubert_eff
from hubert_eff import cli
from hubert_eff.config import HubertConfig
from hubert_eff.encoders.registry import get_encoder
from hubert_eff.recognition.model import RecognizerConfig

CLI = "reference/cli.md"
KEYS = "reference/configuration.md"
EXAMPLES = "examples.md"
FOLDER = Path(__file__).resolve().parents[1] / "examples"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    files.append(File.generated(config, CLI, content=commands()))
    files.append(File.generated(config, KEYS, content=keys()))
    files.append(File.generated(config, EXAMPLES, content=examples()))
    return files


def commands() -> str:
    """Every command with its usage and a table of its arguments."""
    parts = ["# Commands", "This page has the output of `hubert-eff COMMAND --help` for this version."]
    for group, names in cli.GROUPS.items():
        parts.append(f"## {group}")
        for name in names:
            parser = subparsers(cli._parser(name))[name]
            parts += [f"### hubert-eff {name}", str(parser.description), *described(parser)]
            for kind, below in subparsers(parser).items():
                parts += [f"#### hubert-eff {name} {kind}", *described(below)]
    return "\n\n".join(parts) + "\n"


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the sub-commands of a parser."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update(action.choices)
    return found


def described(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Usage, example and arguments of a parser, as Markdown."""
    yield f"```text\n{parser.format_usage().removeprefix('usage: ').rstrip()}\n```"
    if parser.epilog:
        yield f"```\n{parser.epilog.removeprefix('Example: ')}\n```"
    formatter = parser._get_formatter()
    rows = []
    for action in parser._actions:
        text = action.help
        if text is argparse.SUPPRESS or isinstance(action, (argparse._SubParsersAction, argparse._HelpAction)):
            continue
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        value = (
            formatter._format_args(action, str(action.metavar or action.dest).upper())
            if action.option_strings and action.nargs != 0
            else ""
        )
        rows.append((f"{name} {value}".strip(), formatter._expand_help(action) if text else ""))
    if rows:
        yield "| argument | meaning |\n|---|---|\n" + "\n".join(f"| {code(name)} | {cell(text)} |" for name, text in rows)


def keys() -> str:
    """Every key of the model section: the keys of all encoders, those that each encoder adds, and those of recognizers."""
    shared = {field.name for field in dataclasses.fields(HubertConfig)}
    parts = [
        "# Configuration keys",
        "These are the keys of the section `model` of a configuration. Set them as `model.KEY=VALUE` for `hubert-eff train`, or as "
        "keywords of `hubert_eff.build` in Python. `hubert-eff config NAME --explain` prints a whole configuration with the same texts. "
        "The other sections are fairseq's.",
        "## All encoders",
        table(HubertConfig, set()),
    ]
    for name in hubert_eff.list_encoders():
        own = get_encoder(name).config
        if {field.name for field in dataclasses.fields(own)} - shared:
            parts += [f"## {name}", table(own, shared)]
    parts += ["## Recognizers", table(RecognizerConfig, shared)]
    return "\n\n".join(parts) + "\n"


def examples() -> str:
    """Every script of examples/ under its name."""
    parts = ["# Examples", "These are the scripts of `examples/`. Each runs offline, on sound that it makes itself, in seconds on a CPU."]
    for path in sorted(FOLDER.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        said = str(ast.get_docstring(ast.parse(text)))
        parts += [f"## {path.name}", said, f"```python\n{text.split(chr(34) * 3, 2)[2].strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def table(config: Any, known: set[str]) -> str:
    """A Markdown table of the keys of a dataclass that are not in `known`."""
    rows = [
        f"| `{field.name}` | {code(repr(field.default))} | {cell(field.metadata.get('help', ''))} |"
        for field in dataclasses.fields(config)
        if field.name not in known
    ]
    return "| key | default | meaning |\n|---|---|---|\n" + "\n".join(rows)


def code(text: str) -> str:
    """A text as code in a cell."""
    return f"`{cell(text)}`"


def cell(text: str) -> str:
    """A text in a cell, with escaped bars and angle brackets."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
