"""`hubert-eff list`: the presets with their costs and the configurations that train them."""

from __future__ import annotations

import argparse
import fnmatch
import json
from typing import Any

from ..errors import UserError

ONE_BIT = "+w1a1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the sub-command."""
    parser.add_argument(
        "patterns", nargs="*", metavar="PATTERN", help="names with * and ?, such as 'sparseformer-*' (default: all presets)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Print one row per preset."""
    from ..encoders.registry import list_presets
    from ..utils.progress import progress

    known = list_presets()
    names = [name for name in known if not args.patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in args.patterns)]
    if not names:
        raise UserError(f"no preset is named {' or '.join(args.patterns)}. Known: {', '.join(known)}")
    rows = []
    with progress("presets", len(names)) as advance:
        for name in names:
            rows.append(_row(name))
            advance(1)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        from ..reports.tables import show

        show(_table(rows))
    return 0


def _row(name: str) -> dict[str, Any]:
    from ..checkpoints.safetensors import pack_for_file
    from ..profiling import profile
    from ..profiling.cost import file_storage, model_of

    found = profile(name)
    return {
        "preset": name,
        "parameters": found.params_without_labels,
        "gflop": found.gflop,
        "mb": found.storage_mb["file"],
        "one_bit_mb": file_storage(pack_for_file(model_of(name + ONE_BIT, structure=True)[0], False)) / 1e6,
        "configurations": _configurations(name),
    }


def _configurations(preset: str) -> list[str]:
    """Configurations that train the preset, as KIND/NAME."""
    from ..utils.configurations import encoder_of, list_configurations

    encoder = preset.replace("-", "_")
    return [entry for entry in list_configurations() if encoder_of(*entry.split("/")) == encoder]


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.console import Group

    from ..reports.tables import plain_table

    table = plain_table("preset", "parameters", "GFLOP", "MB", "one-bit MB", "")
    for row in rows:
        figures = (f"{row['gflop']:.1f}", f"{row['mb']:.1f}", f"{row['one_bit_mb']:.1f}")
        table.add_row(row["preset"], f"{row['parameters']:,}", *figures, " ".join(row["configurations"]))
    return Group(
        table,
        "Parameters without label embeddings; GFLOP of 10 s of audio (a multiplication and an addition are two); MB of an export in\n"
        "float32 and at one bit (quant=w1a1). hubert-eff train CONFIGURATION trains, hubert-eff profile PRESET shows the cost by module.",
    )
