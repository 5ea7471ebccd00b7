"""The counter fitted to the paper's Table 1: its formulas against the paper's own figures, what stays open, the command."""

from __future__ import annotations

import json

import pytest

from hubert_eff.cli import main
from hubert_eff.encoders.registry import preset_config
from hubert_eff.profiling.cost import profile
from hubert_eff.reports import table1
from hubert_eff.reports.paper_counter import SUMMARY, paper_count
from hubert_eff.reports.table1 import COUNTS, PAPER, PAPER_TABLE


@pytest.fixture(scope="module")
def rows():
    return {row["row"]: row for row in table1.table1(counts=COUNTS, counter=PAPER)}


@pytest.mark.parametrize("title", ["BQ-Vanilla", "BQ-Sparseformer-DN-S", "BQ-Sparseformer-SW-S", "BQ-Conformer-S"])
def test_bit_operations_are_the_papers_to_the_last_digit(rows, title):
    assert f"{rows[title]['bop_bq_g']:.2f}" == f"{rows[title]['paper']['bop_bq_g']:.2f}"


def test_macs_are_those_of_the_formulas():
    assert paper_count("transformer-base+w1a1").binary_macs == 12 * (18 * 768**2 * 500 + 2 * 500**2 * 768)
    assert paper_count("conformer-s-table1+w1a1").binary_macs == 16 * 500 * (7 * 144**2 + 4 * 144 * 3072 + 62 * 144 + 3 * 500 * 144)
    extractor, projection, positions = 3_295_436_160, 499 * 512 * 256, 500 * 8 * 256**2
    sparse = paper_count("sparseformer-dn-s")
    assert sparse.float_macs == extractor + projection + positions + 16 * (500 * 12 * 256**2 + 3 * 500**2 * 256)
    assert paper_count("sparseformer-dn-s+w1a1").float_macs == extractor + projection + positions
    wide = paper_count("sparseformer-sw-s").float_macs  # has no projection
    assert wide == extractor + 500 * 8 * 512**2 + 8 * (500 * 12 * 512**2 + 3 * 500**2 * 512)


@pytest.mark.parametrize(
    ("preset", "of", "excess"),
    [
        ("transformer-dn-s", "sparseformer-dn-s", 16 * 500**2 * 256),
        ("transformer-sw-s", "sparseformer-sw-s", 8 * 500**2 * 512),
        ("conformer-s-ffn1024", "conformer-s-table1", 16 * 500**2 * 144),
    ],
)
def test_presets_of_the_shapes_that_fit_count_all_but_the_third_product(preset, of, excess):
    clean = profile(preset).macs
    positions = 8 * preset_config(preset).encoder_embed_dim ** 2  # on 499 frames there, on 500 by the formula
    assert paper_count(of).float_macs == clean + excess + positions


def test_flop_of_float_rows_fits(rows):
    for title, figure in (("Vanilla Trans", 110.46), ("Conformer-S", 22.12), ("Sparseformer-DN-S", 25.97), ("Sparseformer-SW-S", 40.00)):
        assert f"{rows[title]['gflop']:.2f}" == f"{figure:.2f}"
        assert abs(rows[title]["difference_percent"]["gflop"]) < 0.31
    for title in ("Conformer-S", "Sparseformer-DN-S", "Sparseformer-SW-S"):  # BOP_NonQ and time follow
        assert rows[title]["bop_nonq_g"] == pytest.approx(16e9 * rows[title]["gflop"] / 2**30)
        assert abs(rows[title]["difference_percent"]["est_time_e4_s"]) < 0.31


def test_open_cells_are_none_and_all_others_are_figures(rows):
    found = {(title, name) for title, row in rows.items() for name in table1.FIGURES if row[name] is None}
    squeeze = {(title, name) for title in ("Squeeze-XS", "BQ-Squeeze-XS") for name in table1.FIGURES if name != "storage_mb"}
    assert found == squeeze | {("Vanilla Trans", "bop_nonq_g"), ("Vanilla Trans", "est_time_e4_s")}
    assert all(rows[title]["difference_percent"][name] is None for title, name in found)


def test_storage_and_parameters_are_the_clean_counters(rows):
    for clean in table1.table1(counts=COUNTS):
        assert all(rows[clean["row"]][name] == clean[name] for name in ("preset", "params", "storage_mb", "storage_file_mb"))


def test_products_of_widths(rows):
    for row in table1.table1("product", COUNTS, PAPER):
        single = rows[row["row"]]
        assert row["bop_nonq_g"] is None if single["bop_nonq_g"] is None else row["bop_nonq_g"] == 32 * single["bop_nonq_g"]
        assert row["est_time_e4_s"] == single["est_time_e4_s"] and row["bop_bq_g"] == single["bop_bq_g"]


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(table1, "count", lambda row: COUNTS[row.title])
    assert main(["profile", "--table1", "--counter", "paper", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["counter"] == "paper" and values["remarks"] == list(SUMMARY) and len(values["rows"]) == len(PAPER_TABLE)
    assert main(["profile", "--table1", "--json"]) == 0
    clean = json.loads(capsys.readouterr().out)
    assert clean["counter"] == "clean" and "remarks" not in clean and None not in [row["gflop"] for row in clean["rows"]]
    assert main(["profile", "--table1", "--counter", "paper"]) == 0
    text = capsys.readouterr().out
    assert "Counted more than once" in text and "Open (-)" in text and " fitted " in text and " ours " not in text
