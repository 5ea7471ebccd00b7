"""Rebuilds the paper's Table 1: our counts of its ten models beside the paper's figures (10 s).

The paper: "Attention or Convolution" (Jeon et al. 2023, arXiv:2311.02772), Table 1.

Ours is by default the clean count of what the models compute; counter `paper` gives what the paper's own seems to have counted
(`reports.paper_counter`). Where the paper's columns cannot all hold, a note says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group

from ..checkpoints.open import open_model
from ..config import SAMPLE_RATE
from ..encoders.registry import preset_config
from ..errors import unknown
from ..models.extractor import num_frames
from ..profiling.cost import bit_operations, file_storage, is_float, paper_storage, profile
from ..profiling.device import Device, read_device
from ..profiling.formulas import ATTENTION
from .paper_counter import SECONDS, SUMMARY, PaperCount, paper_count
from .tables import plain_table

DEVICE = "a100"
FIGURES = ("storage_mb", "gflop", "bop_nonq_g", "bop_bq_g", "est_time_e4_s")
HEADINGS = ("storage MB", "GFLOP", "BOP_NonQ G", "BOP_BQ G", "time 1e-4 s")
FLOAT_WIDTH = 32  # bits of the paper's float operands
CLEAN, PAPER = "clean", "paper"
COUNTERS = {  # counter -> name of its line in the table
    CLEAN: "ours",
    PAPER: "fitted",
}


@dataclass(frozen=True)
class Row:
    """A row of the paper: its name, our preset, its five figures (None: not given), and the reason if one cannot be right."""

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
        f"{HALF}; its BOP_NonQ is 0.3% from that of its GFLOP without the q/k/v/out projections", float_bytes=2),
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


@dataclass(frozen=True)
class Count:
    """Our counts for a row, from which all figures follow."""

    params: int
    stored_bytes: float  # by the paper's formula, with the row's bytes per float
    float32_bytes: float  # with 4
    file_bytes: int  # of the tensors that export writes
    float_macs: int
    binary_macs: int
    attention_macs: int


# results of `count`, stored so that a report need not count again; a test compares them
COUNTS: dict[str, Count] = {
    "Vanilla Trans": Count(92_212_096, 184424192.0, 368848384.0, 368_848_384, 52_921_556_352, 0, 4_608_000_000),
    "Conformer-S": Count(32_967_760, 131871040.0, 131871040.0, 131_889_600, 19_919_708_544, 0, 1_152_000_000),
    "Squeeze-XS": Count(33_010_096, 132040384.0, 132040384.0, 132_058_944, 15_665_264_544, 0, 720_000_000),
    "Sparseformer-DN-S": Count(15_203_712, 60814848.0, 60814848.0, 60_814_848, 10_503_085_440, 0, 589_168_640),
    "Sparseformer-SW-S": Count(29_294_720, 117178880.0, 117178880.0, 117_178_880, 17_513_995_648, 0, 589_168_640),
    "BQ-Vanilla": Count(92_239_840, 25225952.0, 39834784.0, 39_837_952, 5_846_228_352, 47_075_328_000, 4_608_000_000),
    "BQ-Conformer-S": Count(32_967_968, 12888544.0, 12888544.0, 12_907_888, 3_415_004_544, 16_504_704_000, 1_152_000_000),
    "BQ-Squeeze-XS": Count(33_010_304, 13057888.0, 13057888.0, 13_077_232, 3_430_736_544, 12_234_528_000, 720_000_000),
    "BQ-Sparseformer-DN-S": Count(15_216_128, 12105088.0, 12105088.0, 12_106_240, 3_622_460_800, 6_880_624_640, 589_168_640),
    "BQ-Sparseformer-SW-S": Count(29_307_072, 19708864.0, 19708864.0, 19_710_976, 4_341_915_008, 13_172_080_640, 589_168_640),
}


def count(row: Row) -> Count:
    """Count the model of a row with meta tensors."""
    model = open_model(row.preset, structure=True, quant_policy="paper")
    counted = profile(model, SECONDS, "paper", DEVICE)
    macs = {True: 0, False: 0}
    for bits, number in counted.macs_by_bits.items():
        macs[is_float(bits)] += number
    return Count(
        counted.params, paper_storage(model, row.float_bytes), paper_storage(model, 4), file_storage(model), macs[True], macs[False],
        counted.kinds[ATTENTION].macs,
    )  # fmt: skip


def table1(bops: str = "paper", counts: Mapping[str, Count] | None = None, counter: str = CLEAN) -> list[dict[str, Any]]:
    """One mapping per row of the paper: our figures, the paper's, the difference in %, a note.

    bops: convention of bit operations, as in `profile`; the time always follows the paper's. counts: those of `COUNTS`; by default all
    models are counted again. counter: one of `COUNTERS`; by `paper`, a figure that stays open is None. Raises `UserError` for another.
    """
    check_counter(counter)
    return [_row(row, bops, count(row) if counts is None else counts[row.title], counter) for row in PAPER_TABLE]


def check_counter(counter: str) -> None:
    """Raise `UserError`, with the nearest name, for a counter that is not in `COUNTERS`."""
    if counter not in COUNTERS:
        raise unknown("counter", counter, COUNTERS)


def _row(row: Row, bops: str, counted: Count, counter: str) -> dict[str, Any]:
    paper, clean = row.paper(bops), counter == CLEAN
    values: dict[str, Any] = {
        "row": row.title,
        "preset": row.preset,
        "params": counted.params,
        "storage_mb": counted.stored_bytes / 1e6,
        **_operations(counted if clean else paper_count(row.preset), bops),
        "storage_file_mb": counted.file_bytes / 1e6,
    }
    values["paper"] = paper
    values["difference_percent"] = {
        name: 100 * (values[name] / figure - 1) if figure and values[name] is not None else None for name, figure in paper.items()
    }
    values["note"] = "; ".join(filter(None, (row.note, *_findings(row, counted)))) if clean else ""
    return values


def _operations(counted: Count | PaperCount, bops: str) -> dict[str, float | None]:
    """FLOP, bit operations and time; None for open counts."""
    behind = counted.bop_macs if isinstance(counted, PaperCount) else counted.float_macs  # BOP_NonQ

    def both(convention: str) -> tuple[float, float]:
        return bit_operations({(FLOAT_WIDTH, FLOAT_WIDTH): behind or 0, (1, 1): counted.binary_macs or 0}, convention)

    nonq, quantized = both(bops)
    return {
        "gflop": None if counted.float_macs is None else 2 * counted.float_macs / 1e9,
        "bop_nonq_g": None if behind is None else nonq,
        "bop_bq_g": None if counted.binary_macs is None else quantized,
        "est_time_e4_s": None if behind is None or counted.binary_macs is None else 1e4 * read_device(DEVICE).paper_time(*both("paper")),
    }


def _findings(row: Row, counted: Count) -> list[str]:
    """Remarks that follow from our figures and the paper's."""
    found = []
    if row.float_bytes != 4:
        found.append(f"at 4 B per float {counted.float32_bytes / 1e6:.2f} MB")
    # the paper's cost is that of dense attention: two products of T x T x D per layer
    config = preset_config(row.preset)
    frames = int(num_frames(round(SECONDS * SAMPLE_RATE), config.conv_layers))
    frames = -(-frames // config.required_seq_len_multiple) * config.required_seq_len_multiple
    dense = config.encoder_layers * 2 * frames**2 * config.encoder_embed_dim
    quantized = counted.binary_macs / 2**30
    if row.preset.startswith((DEEP, WIDE)) and counted.attention_macs < dense:
        saved = dense - counted.attention_macs
        if row.bop_bq_g is None:
            figure = f"{2 * (counted.float_macs + saved) / 1e9:.2f} GFLOP"
        else:
            quantized += saved / 2**30
            figure = f"BOP_BQ {quantized:.2f}"
        found.append(f"ours is what sparse attention computes; the paper's attention is dense, in a clean count {figure}")
    if row.bop_bq_g is not None and quantized:
        found.append(f"the paper's BOP_BQ is {row.bop_bq_g / quantized:.2f} times the clean count")
    return found


def render(rows: list[dict[str, Any]], bops: str, counter: str = CLEAN) -> Group:
    """The printed table: ours, the paper's and the difference in one cell per figure, with notes below."""
    table = plain_table("model", "", "params", *HEADINGS)
    notes: list[str] = []
    for row in rows:
        params = "-" if row["params"] is None else f"{row['params']:,}"
        if row["note"] and row["note"] not in notes:
            notes.append(row["note"])
        mark = f" [{notes.index(row['note']) + 1}]" if row["note"] else ""
        table.add_row(row["row"] + mark, COUNTERS[counter], params, *(_figure(row[name]) for name in FIGURES))
        table.add_row("", "paper", "", *(_figure(row["paper"][name]) for name in FIGURES))
        table.add_row("", "diff %", "", *(_figure(row["difference_percent"][name], "+.2f") for name in FIGURES), end_section=True)
    listed = [f"[{number}] {note}" for number, note in enumerate(notes, 1)] if counter == CLEAN else SUMMARY
    return Group(table, "\n".join(listed), _legend(bops))


def _figure(value: float | None, form: str = ",.2f") -> str:
    return "-" if value is None else format(value, form)


def _legend(bops: str) -> str:
    convention = "32 per float MAC, 1 per W1A1 MAC" if bops == "paper" else "width x width per MAC; the paper's BOP_NonQ x 32"
    device = read_device(DEVICE)
    return (
        f"{SECONDS:g} s of audio. GFLOP: 2 per MAC of float operands. BOP: {convention}, G = 2^30. Time is estimated: BOP_NonQ / "
        f"({device.rate(16):g} x 1024) + BOP_BQ / ({device.rate(1):g} x 1024) s\n({device.name}, bit operations of the paper's "
        "convention). Storage: 4 B per float (Vanilla rows 2 B), binarized weights 1 bit; MB = 1e6 B."
    )
