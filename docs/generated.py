"""A hook of mkdocs: pages that are made from the code while the site is built, commands from argparse and keys from `option()`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
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


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    files.append(File.generated(config, CLI, content=commands()))
    files.append(File.generated(config, KEYS, content=keys()))
    return files


def commands() -> str:
    """Every command with its usage and a table of its arguments."""
    parts = ["# Commands", "What `hubert-eff COMMAND --help` says, of this version."]
    for group, names in cli.GROUPS.items():
        parts.append(f"## {group}")
        for name in names:
            parser = subparsers(cli._parser(name))[name]
            parts += [f"### hubert-eff {name}", str(parser.description), *described(parser)]
            for kind, below in subparsers(parser).items():
                parts += [f"#### hubert-eff {name} {kind}", *described(below)]
    return "\n\n".join(parts) + "\n"


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Parsers of the sub-commands of one."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update(action.choices)
    return found


def described(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Usage, example and arguments of a parser as Markdown."""
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
        yield "| argument | |\n|---|---|\n" + "\n".join(f"| {code(name)} | {cell(text)} |" for name, text in rows)


def keys() -> str:
    """Every key of the model section: those of all encoders, then what each adds, then a recognizer's."""
    shared = {field.name for field in dataclasses.fields(HubertConfig)}
    parts = [
        "# Configuration keys",
        "Keys of the section `model` of a configuration: `model.KEY=VALUE` for `hubert-eff train`, keywords of `hubert_eff.build` in "
        "Python. `hubert-eff config NAME --explain` prints a whole configuration with the same texts; other sections are fairseq's.",
        "## All encoders",
        table(HubertConfig, set()),
    ]
    for name in hubert_eff.list_encoders():
        own = get_encoder(name).config
        if {field.name for field in dataclasses.fields(own)} - shared:
            parts += [f"## {name}", table(own, shared)]
    parts += ["## Recognizers", table(RecognizerConfig, shared)]
    return "\n\n".join(parts) + "\n"


def table(config: Any, known: set[str]) -> str:
    """Keys of a dataclass that are not known yet, as Markdown."""
    rows = [
        f"| `{field.name}` | {code(repr(field.default))} | {cell(field.metadata.get('help', ''))} |"
        for field in dataclasses.fields(config)
        if field.name not in known
    ]
    return "| key | default | |\n|---|---|---|\n" + "\n".join(rows)


def code(text: str) -> str:
    """A word of code in a cell."""
    return f"`{cell(text)}`"


def cell(text: str) -> str:
    """A text in a cell: bars would end it, and angle brackets would be tags."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
