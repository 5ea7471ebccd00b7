"""Reports what became of each part of a binarized model, and why."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from ..layers.bits import stored_bits
from ..models.hubert import HubertModel
from .convert import decisions
from .policy import BINARY, SPECS, read_policy


@dataclass
class Fate:
    """What became of parts of one kind at the same place in all blocks (`*` in the path). `weights`: number of their parameters."""

    path: str
    kind: str
    becomes: str
    parts: int
    weights: int
    reason: str


def quant_report(model: HubertModel) -> list[dict[str, Any]]:
    """The rows of the report as plain values; a float model has none. The last row holds what no module declares."""
    config = model.config
    if config.quant == "none":
        return []
    bits = SPECS[config.quant]
    rows: dict[tuple[str, str, str], Fate] = {}
    declared: set[int] = set()
    for choice in decisions(model, read_policy(config.quant_policy)):
        part = None if choice.kind.form else choice.part
        stored = {} if part is None or choice.action != BINARY else stored_bits(part)
        parameters = [] if part is None else [getattr(part, name) for name in stored] or list(part.parameters())
        declared.update(map(id, parameters))
        if choice.action != BINARY:
            becomes = "float"
        elif choice.kind.form:
            becomes = f"{bits} x {bits} bit"
        else:
            becomes = f"1 x {bits} bit, {'signed' if choice.kind.signed else 'unsigned'} input"
        path = re.sub(r"^encoder\.layers\.\d+", "encoder.layers.*", choice.path)
        row = rows.setdefault((path, becomes, choice.reason), Fate(path, choice.kind.name, becomes, 0, 0, choice.reason))
        row.parts += 1
        row.weights += sum(elements for elements, _ in stored.values()) or sum(p.numel() for p in parameters)
    rest = sum(p.numel() for p in model.parameters() if id(p) not in declared)
    last = Fate("everything else", "", "float", 1, rest, "norms, biases, scales, embeddings: few, and added, not multiplied")
    return [asdict(row) for row in (*rows.values(), last)]
