"""Prints a profile as tables, with rich on a terminal and as plain text elsewhere."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from ..errors import printable
from ..profiling.cost import ModuleCost, Profile

NOTE = (
    "Counted: one waveform to the last hidden state; the pre-training head runs in training only. Element operations (activations, "
    "norms,\nsoftmax, reductions) are elements handled; a bias inside a product, views and copies count nothing. Storage leaves out "
    "label embeddings;\n'paper' is the formula of the paper's Table 1, 'file' the tensors that export writes. Times are estimated, not "
    "measured: 'paper' is the\nformula of Table 1, 'roofline' the least at the device's peak rates (hubert-eff bench measures)."
)

PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}  # names may hold text that looks like a style to rich
WIDEST = 1000  # largest width of plain text; tables are as wide as their cells
BOPS_TEXT = {"paper": "a MAC counts the width of its wider operand", "product": "a MAC counts the product of its operands' widths"}


def render(profile: Profile, depth: int = 3) -> Group:
    """Summary, kinds of operations, modules down to `depth` levels below the model, and operations. Equal neighbors share one row."""
    summary = Table.grid(padding=(0, 2))
    labels = profile.params - profile.params_without_labels
    rows = {
        "model": f"{printable(profile.name)}, {profile.seconds:g} s ({profile.samples:,} samples, {profile.frames:,} frames)",
        "parameters": f"{profile.params_without_labels:,}" + (f" and {labels:,} in label embeddings" if labels else ""),
        "storage": ", ".join(f"{mb:,.2f} MB {kind}" for kind, mb in profile.storage_mb.items()),
        "products": f"{profile.macs:,} MACs; float: {profile.gflop:,.2f} GFLOP",
        "widths": ", ".join(f"{w}x{a} bit {macs:,} MACs" for (w, a), macs in sorted(profile.macs_by_bits.items(), reverse=True)),
        "bit operations": f"{profile.bop_nonq_g:,.2f} G float, {profile.bop_bq_g:,.2f} G quantized ({BOPS_TEXT[profile.bops]}, G = 2^30)",
        "element operations": f"{profile.element_ops:,}",
        "estimated time": ", ".join(f"{1e3 * s:.3g} ms {kind}" for kind, s in profile.est_time_s.items()) + f" ({profile.device})",
    }
    for name, value in rows.items():
        summary.add_row(name, value)

    kinds = plain_table("kind", "calls", "MACs", "element ops")
    for name, tally in profile.kinds.items():
        if tally.macs or tally.element_ops:
            kinds.add_row(name, f"{tally.calls:,}", f"{tally.macs:,}", f"{tally.element_ops:,}")

    mixed = len(profile.macs_by_bits) > 1
    modules = plain_table("module", "class", "params", "MACs", "MACs %", "element ops", *(("bits",) if mixed else ()))
    for level, label, module in _rows(profile.modules, depth):
        share = f"{100 * module.macs / profile.macs:.1f}" if profile.macs else "-"
        figures = (f"{module.params:,}", f"{module.macs:,}", share, f"{module.element_ops:,}")
        widths = (" ".join(f"{w}x{a}" for w, a in sorted(module.macs_by_bits, reverse=True)),) if mixed else ()
        modules.add_row("  " * level + label, module.kind, *figures, *widths)

    operations = plain_table("operation", "calls", "MACs", "element ops")
    for name, tally in profile.operations.items():
        if tally.macs or tally.element_ops:
            operations.add_row(name, f"{tally.calls:,}", f"{tally.macs:,}", f"{tally.element_ops:,}")
    fates = plain_table("part", "kind", "becomes", "parts", "weights", "why")
    for row in profile.quantized:
        fates.add_row(row["path"], row["kind"], row["becomes"], f"{row['parts']:,}", f"{row['weights']:,}", row["reason"])
    return Group(summary, kinds, modules, operations, *([fates] if profile.quantized else []), NOTE)


def compare(profiles: Sequence[Profile]) -> Group:
    """One row per model."""
    device = profiles[0].device
    table = plain_table(
        "model", "params", "storage MB: paper", "file", "GFLOP", "BOP_NonQ G", "BOP_BQ G", f"ms on {device}: paper", "roofline"
    )
    for p in profiles:
        figures = (*p.storage_mb.values(), p.gflop, p.bop_nonq_g, p.bop_bq_g)
        times = (f"{1e3 * seconds:.3f}" for seconds in p.est_time_s.values())
        table.add_row(printable(p.name), f"{p.params_without_labels:,}", *(f"{value:,.2f}" for value in figures), *times)
    return Group(table, f"{profiles[0].seconds:g} s of audio; bit operations: {BOPS_TEXT[profiles[0].bops]}.\n" + NOTE)


def render_text(profile: Profile, depth: int = 3) -> str:
    """`render` as plain text of any width."""
    return as_text(render(profile, depth))


def as_text(content: RenderableType) -> str:
    """Anything that rich can draw, as plain text without colors and without truncation."""
    console = Console(file=io.StringIO(), width=WIDEST, no_color=True, **PLAIN)
    with console.capture() as capture:
        console.print(content)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def show(content: RenderableType) -> None:
    """Print with rich on a terminal that is wide enough, otherwise as plain text."""
    text, console = as_text(content), Console(**PLAIN)
    if console.is_terminal and max(map(len, text.splitlines()), default=0) <= console.width:
        console.print(content)
    else:
        print(text, end="")


def plain_table(*columns: str) -> Table:
    """An empty table; numbers are aligned on the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        text = position == 0 or column in ("class", "kind", "becomes", "why", "")
        table.add_column(column, justify="left" if text else "right", no_wrap=True)
    return table


def _rows(root: ModuleCost, depth: int) -> Iterator[tuple[int, str, ModuleCost]]:
    """(level, label, module) from the root down. Numbered neighbors with the same figures on all levels share a row."""
    yield 0, "total", root

    def below(module: ModuleCost, level: int) -> Iterator[tuple[int, str, ModuleCost]]:
        if level > depth:
            return
        groups: list[list[ModuleCost]] = []
        for child in module.children:
            if not (child.params or child.macs or child.element_ops):  # dropout in evaluation mode
                continue
            if groups and _label(child).isdigit() and _figures(child) == _figures(groups[-1][0]):
                groups[-1].append(child)
            else:
                groups.append([child])
        for group in groups:
            label = _label(group[0])
            if len(group) > 1:
                label = f"{label}-{_label(group[-1])} ({len(group)}, each)"
            yield level, label, group[0]
            yield from below(group[0], level + 1)

    yield from below(root, 1)


def _label(module: ModuleCost) -> str:
    return module.name.rpartition(".")[2]


def _figures(module: ModuleCost) -> tuple[object, ...]:
    return (module.kind, module.params, tuple(module.macs_by_bits.items()), module.element_ops, *map(_figures, module.children))
