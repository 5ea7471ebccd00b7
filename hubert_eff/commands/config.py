"""`hubert-eff config`: a complete training configuration, with overrides."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any

from ..config import HubertConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the sub-command."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="configuration, such as conformer_s, or KIND/NAME, such as finetune/debug")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=MEMBER or SECTION.KEY=VALUE, as for fairseq-hydra-train")
    parser.add_argument(
        "--explain", action="store_true", help="add a comment to each key of the model that says what it means and which values it takes"
    )


def run(args: argparse.Namespace) -> int:
    """Print the configuration as YAML, or, without a name, the names of configurations and the members of groups."""
    import yaml

    from ..recipes.base import check_model
    from ..utils.configurations import list_configurations, list_groups, load_config

    if args.name is None:
        print("\n".join(list_configurations()))
        for group, members in list_groups().items():
            print(f"{group}: {' '.join(members)}")
        return 0
    written = load_config(args.name, args.overrides)
    check_model(written, args.overrides)
    # a wrapped text would have the comment inside it
    text = yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=10**6 if args.explain else None)
    print(_explained(text, str(written["model"]["_name"])) if args.explain else text, end="")
    return 0


def _explained(text: str, model: str) -> str:
    """The configuration with a comment behind each key of the model."""
    from ..encoders.registry import get_encoder, list_encoders
    from ..recognition.model import RecognizerConfig

    encoder = model.removeprefix("hubert_")
    sources: list[Any] = [get_encoder(encoder).config] if encoder in list_encoders() else [HubertConfig, RecognizerConfig]
    helps = {field.name: field.metadata["help"] for source in sources for field in dataclasses.fields(source)}
    section, lines = "", []
    for line in text.splitlines():
        section = line if re.match(r"\w+:", line) else section
        key = re.match(r"  (\w+):", line)
        explained = section == "model:" and key is not None and key[1] in helps
        lines.append(f"{line}  # {helps[key[1]]}" if explained and key is not None else line)
    return "\n".join(lines) + "\n"
