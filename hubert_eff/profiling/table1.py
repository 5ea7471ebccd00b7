"""The paper's Table 1 rebuilt: what our counter finds for its ten models, beside the paper's figures ("Attention or Convolution", 10 s).

Ours is the clean count of what the models compute. Where the paper's own columns cannot all hold, a note says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Group

from .cost import Profile, paper_storage, profile, resolve
from .device import Device, read_device
from .formulas import ATTENTION
from .report import plain_table

SECONDS = 10.0
DEVICE = "a100"
FIGURES = ("storage_mb", "gflop", "bop_nonq_g", "bop_bq_g", "est_time_e4_s")
HEADINGS = ("storage MB", "GFLOP", "BOP_NonQ G", "BOP_BQ G", "time 1e-4 s")
FLOAT_WIDTH = 32  # bits of the paper's float operands


@dataclass(frozen=True)
class Row:
    """A row of the paper: its name, our preset, its five figures (None: not given), and why one of them may not hold."""

    title: str
    preset: str
    storage_mb: float
    gflop: float
    bop_nonq_g: float
    bop_bq_g: float | None
    est_time_e4_s: float
    note: str = ""
    float_bytes: int = 4  # the paper's Vanilla rows are stored in FP16

    def paper(self, bops: str = "paper") -> dict[str, float | None]:
        """The paper's figures; with the `product` convention its float bit operations are 32 times as many."""
        factor = FLOAT_WIDTH if bops == "product" else 1
        return {name: getattr(self, name) for name in FIGURES} | {"bop_nonq_g": self.bop_nonq_g * factor}

    def recomputed_time(self, device: Device) -> float:
        """Its time in 1e-4 s, recomputed from its own bit operations."""
        return 1e4 * device.paper_time(self.bop_nonq_g, self.bop_bq_g or 0.0)


TRANSFORMER, CONFORMER, SQUEEZE = "transformer-base", "conformer-s-table1", "squeezeformer-xs-table1"
DEEP, WIDE = "sparseformer-dn-s", "sparseformer-sw-s"
HALF = "the paper stores it in FP16"
PAPER_TABLE = (
    Row("Vanilla Trans", TRANSFORMER, 184.42, 110.54, 1228.64, None, 38.46,
        f"{HALF}; its BOP_NonQ leaves out the q/k/v/out projections", float_bytes=2),
    Row("Conformer-S", CONFORMER, 131.87, 22.10, 329.39, None, 10.31,
        "22.10 GFLOP cannot come from the stored model (FFN 3072): FFN 1024 fits it"),
    Row("Squeeze-XS", SQUEEZE, 132.04, 18.31, 272.88, None, 8.54, "18.31 GFLOP cannot come from the stored model (FFN 3072)"),
    Row("Sparseformer-DN-S", DEEP, 60.81, 26.05, 388.18, None, 12.15),
    Row("Sparseformer-SW-S", WIDE, 117.18, 40.09, 597.43, None, 18.70),
    Row("BQ-Vanilla", f"{TRANSFORMER}+w1a1", 25.23, 11.82, 172.83, 63.62, 5.53, HALF, float_bytes=2),
    Row("BQ-Conformer-S", f"{CONFORMER}+w1a1", 12.88, 7.23, 103.44, 15.94, 3.27),
    Row("BQ-Squeeze-XS", f"{SQUEEZE}+w1a1", 13.05, 7.20, 104.05, 11.86, 3.28),
    Row("BQ-Sparseformer-DN-S", f"{DEEP}+w1a1", 12.10, 7.35, 107.91, 10.70, 3.40),
    Row("BQ-Sparseformer-SW-S", f"{WIDE}+w1a1", 19.71, 8.85, 130.38, 19.49, 4.12),
)  # fmt: skip


def table1(bops: str = "paper") -> list[dict[str, Any]]:
    """One mapping per row of the paper: our figures, the paper's, the difference in %, a note.

    bops: convention of bit operations, as in `profile`; the time always follows the paper's.
    """
    return [_row(row, bops) for row in PAPER_TABLE]


def _row(row: Row, bops: str) -> dict[str, Any]:
    model, _ = resolve(row.preset, policy="paper", device="meta")
    counted, paper = profile(model, SECONDS, bops, DEVICE), row.paper(bops)
    values: dict[str, Any] = {
        "row": row.title,
        "preset": row.preset,
        "params": counted.params,
        "storage_mb": paper_storage(model, row.float_bytes) / 1e6,
        "gflop": counted.gflop,
        "bop_nonq_g": counted.bop_nonq_g,
        "bop_bq_g": counted.bop_bq_g,
        "est_time_e4_s": 1e4 * counted.est_time_s["paper"],
        "storage_file_mb": counted.storage_mb["file"],
    }
    values["paper"] = paper
    values["difference_percent"] = {
        name: 100 * (values[name] / figure - 1) if figure else None for name, figure in paper.items()
    }
    values["note"] = "; ".join(filter(None, (row.note, *_findings(row, counted, model))))
    return values


def _findings(row: Row, counted: Profile, model: Any) -> list[str]:
    """What the figures themselves say beside the paper's."""
    found = []
    if row.float_bytes != 4:
        found.append(f"at 4 B per float {paper_storage(model, 4) / 1e6:.2f} MB")
    # the paper's cost is that of dense attention: two products of T x T x D per layer
    config = model.config
    frames = -(-counted.frames // config.required_seq_len_multiple) * config.required_seq_len_multiple
    dense = config.encoder_layers * 2 * frames**2 * config.encoder_embed_dim
    attention = counted.kinds[ATTENTION].macs
    quantised = counted.bop_bq_g
    if row.preset.startswith((DEEP, WIDE)) and attention < dense:
        saved = dense - attention
        if row.bop_bq_g is None:
            figure = f"{counted.gflop + 2 * saved / 1e9:.2f} GFLOP"
        else:
            quantised += saved / 2**30
            figure = f"BOP_BQ {quantised:.2f}"
        found.append(f"ours is what sparse attention computes; the paper's attention is dense, in a clean count {figure}")
    if row.bop_bq_g is not None and quantised:
        found.append(f"the paper's BOP_BQ is {row.bop_bq_g / quantised:.2f} times the clean count")
    return found


def render(rows: list[dict[str, Any]], bops: str) -> Group:
    """The table for people: ours, the paper's and the difference in one cell per figure, and the notes below."""
    table = plain_table("model", "", "params", *HEADINGS)
    notes: list[str] = []
    for row in rows:
        params = "-" if row["params"] is None else f"{row['params']:,}"
        if row["note"] and row["note"] not in notes:
            notes.append(row["note"])
        mark = f" [{notes.index(row['note']) + 1}]" if row["note"] else ""
        table.add_row(row["row"] + mark, "ours", params, *(_figure(row[name]) for name in FIGURES))
        table.add_row("", "paper", "", *(_figure(row["paper"][name]) for name in FIGURES))
        table.add_row("", "diff %", "", *(_figure(row["difference_percent"][name], "+.2f") for name in FIGURES), end_section=True)
    return Group(table, "\n".join(f"[{number}] {note}" for number, note in enumerate(notes, 1)), _legend(bops))


def _figure(value: float | None, form: str = ",.2f") -> str:
    return "-" if value is None else format(value, form)


def _legend(bops: str) -> str:
    convention = "32 per float MAC, 1 per W1A1 MAC" if bops == "paper" else "width x width per MAC; the paper's BOP_NonQ x 32"
    device = read_device(DEVICE)
    return (
        f"{SECONDS:g} s of audio. GFLOP: 2 per MAC of float operands. BOP: {convention}, G = 2^30. Time is estimated: BOP_NonQ / "
        f"({device.rate(16):g} x 1024) + BOP_BQ / ({device.rate(1):g} x 1024) s\n({device.name}, bit operations of the paper's "
        "convention). Storage: 4 B per float (Vanilla rows 2 B), binarised weights 1 bit; MB = 1e6 B."
    )
