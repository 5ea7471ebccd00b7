"""Help texts: every command in a group, an example that its own parser takes, and options that say by themselves what they are."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest

from hubert_eff import cli


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    yield from (action for action in parser._actions if not isinstance(action, argparse._SubParsersAction))
    for below in subparsers(parser).values():
        yield from options(below)


def test_every_command_is_in_one_group_and_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    grouped = [name for names in cli.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(cli.COMMANDS) == sorted(cli.EXAMPLES)
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +{re.escape(cli.COMMANDS[name])}$", said, re.MULTILINE) for name in grouped)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_an_example_is_what_the_command_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = shlex.split(cli.EXAMPLES[command])
    assert program == "hubert-eff" and words[0] == command
    parser = cli._parser(command)
    assert parser.parse_args(words).command == command
    assert cli.main([command, "--help"]) == 0
    assert " ".join(f"Example: {cli.EXAMPLES[command]}".split()) in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_help_text_stands_alone(command: str) -> None:
    for action in options(subparsers(cli._parser(command))[command]):
        said = action.help or ""
        if isinstance(action, argparse._HelpAction) or said == argparse.SUPPRESS:
            continue
        name = "/".join(action.option_strings) or action.dest
        assert said, f"{command} {name} has no help"
        assert not re.match(r"(of|with|which|where|whose|that|and|or|its|the same|default|in place of)\b", said), (
            f"{command} {name}: {said}"
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "superb run --tasks ks",
            "hubert-eff superb run: unrecognized arguments: --tasks - did you mean --task? (--help lists the options)",
        ),
        ("superb --josn", "hubert-eff superb: unrecognized arguments: --josn - did you mean --json? (--help lists the options)"),
        ("manifest speech --otu data", "unrecognized arguments: --otu - did you mean --out?"),
        ("superb run --tas ks --lr=1 --seed 1", "hubert-eff superb run: the following arguments are required: --upstream, --data, --out"),
        ("manifest -- --speech", "hubert-eff manifest: the following arguments are required: --out"),
    ],
)
def test_an_unknown_option_is_named_before_one_that_is_missing(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.split()) == 2
    assert said in capsys.readouterr().err
