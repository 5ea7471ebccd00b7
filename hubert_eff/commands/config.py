"""`hubert-eff config`: a training configuration as a whole, with overrides."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the sub-command."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="configuration, such as conformer_s, or KIND/NAME, such as finetune/debug")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=MEMBER or SECTION.KEY=VALUE, as for fairseq-hydra-train")


def run(args: argparse.Namespace) -> int:
    """Print the configuration as YAML, or, without a name, the names of configurations and the members of groups."""
    import yaml

    from ..utils.configurations import list_configurations, list_groups, load_config

    if args.name is None:
        print("\n".join(list_configurations()))
        for group, members in list_groups().items():
            print(f"{group}: {' '.join(members)}")
        return 0
    print(yaml.safe_dump(load_config(args.name, args.overrides), sort_keys=False, allow_unicode=True), end="")
    return 0
