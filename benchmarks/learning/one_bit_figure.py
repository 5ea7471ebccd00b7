"""The figure of the README: what one bit costs in accuracy and saves in operations and time, from the tables of docs/.

    python benchmarks/learning/one_bit_figure.py --out docs/one-bit.svg

Accuracies are those of docs/binarization.md, ratios of time those of docs/results.md; bit operations are counted here.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from hubert_eff import profile
from hubert_eff.errors import UserError
from hubert_eff.utils.files import replacing

DOCS = Path(__file__).resolve().parents[2] / "docs"
ENCODERS = {"Conformer": "#bc4c00", "Transformer": "#0969da", "Sparseformer": "#1a7f37"}
BUILDS = {"`F.linear` float32": "#a5c8ff", "`model.bfloat16()`": "#4f93e6", "int8 dynamic": "#1f5fb8"}
MUTED = "#6e7781"  # readable on a light page and on a dark one


def table(page: Path, first_column: str, column: str) -> dict[str, str]:
    """Cells of one column of the first table of a page that has both columns in its head, by the first cell of their rows."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for start, line in enumerate(lines):
        head = cells(line)
        if line.startswith("|") and head[0] == first_column and column in head:
            at, found = head.index(column), {}
            for row in lines[start + 2 :]:
                if not row.startswith("|"):
                    return found
                found[cells(row)[0]] = cells(row)[at]
            return found
    raise UserError(f"{page}: no table has '{first_column}' and '{column}' in its head")


def cells(line: str) -> list[str]:
    """Texts of a row of Markdown, without stars."""
    return [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]


def number(text: str) -> float:
    """The first number of a cell."""
    found = re.search(r"[\d.]+", text)
    if found is None:
        raise UserError(f"'{text}' holds no number")
    return float(found[0])


def accuracies() -> dict[str, tuple[float, float]]:
    """Masked accuracy in % of each encoder, in float (the better of one schedule and two) and at one bit from scratch."""
    page = DOCS / "binarization.md"
    found: dict[str, tuple[float, float]] = {}
    columns = [table(page, "", column) for column in ("float", "float, one schedule", "W1A1 from scratch")]
    for row in columns[0]:
        floats, at_once, bits = (number(column[row]) for column in columns)
        found[row.split(",")[0]] = (max(floats, at_once), bits)
    return found


def speeds() -> dict[str, dict[str, float]]:
    """Build -> model -> how many times as long as one bit it takes for 10 s of audio."""
    page = DOCS / "results.md"
    return {build: {model: number(cell) for model, cell in table(page, "10 s of audio", build).items()} for build in BUILDS}


def bit_operations(preset: str) -> float:
    """Bit operations of 10 s, 10^9, as the paper's Table 1 counts them."""
    found = profile(preset)
    return (found.bop_bq_g or 0.0) + found.bop_nonq_g


def draw(out: Path) -> None:
    """Write the figure as SVG, in 860 x 330 px."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "hubert-eff", "font.size": 9, "svg.fonttype": "none"})
    for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"):
        matplotlib.rcParams[key] = MUTED
    figure, (quality, time) = pyplot.subplots(1, 2, figsize=(8.6, 3.3), layout="constrained")
    for name, (whole, bits) in accuracies().items():
        costs = [bit_operations(f"{name.lower()}-debug{form}") for form in ("", "+w1a1")]
        quality.plot(costs, (whole, bits), color=ENCODERS[name], linewidth=1, zorder=1)
        quality.scatter(costs[:1], [whole], color=ENCODERS[name], label=name, s=45, zorder=2)
        quality.scatter(costs[1:], [bits], facecolor="white", edgecolor=ENCODERS[name], s=45, zorder=2)
    quality.set(xlabel="bit operations of 10 s of audio, 10⁹", ylabel="masked accuracy, %", xlim=0, ylim=(40, 49))
    quality.set_title("quality over cost: float (filled), one bit (hollow)", fontsize=9)
    quality.legend(frameon=False, loc="lower right")
    ratios = speeds()
    models = list(next(iter(ratios.values())))
    for place, (build, color) in enumerate(BUILDS.items()):
        heights = [ratios[build][model] for model in models]
        bars = time.bar([i + 0.27 * (place - 1) for i in range(len(models))], heights, 0.25, color=color, label=build.replace("`", ""))
        time.bar_label(bars, fmt="%gx", fontsize=8, color=MUTED)
    time.axhline(1, color=MUTED, linewidth=0.8, linestyle="--")
    time.set_xticks(range(len(models)), models)
    time.set(ylabel="its time over one bit's", ylim=(0, 14))
    time.set_title("one bit against float builds, one thread, EPYC Zen 5", fontsize=9)
    time.legend(frameon=False)
    for axes in (quality, time):
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)


def main() -> int:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS / "one-bit.svg", metavar="FILE", help="SVG to write (default: docs/one-bit.svg)")
    try:
        draw(parser.parse_args().out)
    except UserError as error:
        print(f"one_bit_figure: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
