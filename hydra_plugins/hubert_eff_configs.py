"""Lets hydra find the groups of hubert-eff's configurations from every folder and from an installed wheel."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from hubert_eff.errors import UserError
from hubert_eff.utils.configurations import KINDS, check_choices, choices, find_configuration, groups_dir, load_config, plugin_dir

PROGRAM = "fairseq-hydra-train"
_checked = False  # composing asks for the search path again


class HubertEffConfigs(SearchPathPlugin):
    """Appends the folder of groups to hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folder; hydra calls this once per run. A wrong name or GROUP=MEMBER in our own configurations, or a missing plug-in, ends
        the run with one line."""
        global _checked
        search_path.append("hubert-eff", f"file://{groups_dir()}")
        if Path(sys.argv[0]).stem in (PROGRAM, "hydra_train") and not _checked:
            _checked = True
            logging.getLogger("hydra.core.utils").setLevel(logging.INFO)  # it needlessly prints the name of the job twice
            try:
                _check_command_line()
            except UserError as error:
                print(f"{PROGRAM}: {error}", file=sys.stderr)
                sys.exit(2)


def _check_command_line() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", default="")
    parser.add_argument("--config-name", "-cn", default="")
    given, rest = parser.parse_known_args(sys.argv[1:])
    folder = Path(given.config_dir).resolve()
    if folder.parent != groups_dir().parent.resolve() or folder.name not in KINDS:
        return  # a configuration of the user's own
    find_configuration(f"{folder.name}/{given.config_name}")
    check_choices(rest)
    if not any(word.lstrip("+").startswith("common.user_dir=") for word in rest) and not {"--cfg", "-c", "--help", "--info"} & set(rest):
        raise UserError(f"common.user_dir=DIR must name the plug-in: add common.user_dir={plugin_dir()}, or run hubert-eff train instead")
    chosen = choices(word for word in rest if not word.startswith("-"))
    if chosen and not any("," in word for word in chosen):  # otherwise it is a sweep, whose jobs are composed one by one
        load_config(f"{folder.name}/{given.config_name}", chosen)
