"""The report: what it reads, which points are best, labels that do not overlap, a page that needs nothing else."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.errors import UserError
from hubert_eff.reports import table1
from hubert_eff.reports.table2 import METRICS, PAPER_TABLE, paper_quality, rows_of

pytest.importorskip("matplotlib")

from hubert_eff.reports import frontier  # noqa: E402
from hubert_eff.reports.findings import _without_cost  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_paper_tables_belong_together():
    assert list(PAPER_TABLE) == [title for row in table1.PAPER_TABLE for title in rows_of(row.title)] and len(PAPER_TABLE) == 12
    assert rows_of("BQ-Vanilla") == ["BQ-Vanilla (reported)", "BQ-Vanilla"] and rows_of("Squeeze-XS") == ["Squeeze-XS"]
    assert PAPER_TABLE["Vanilla Trans (reported)"][0] == 7.06 and PAPER_TABLE["BQ-Vanilla (reported)"][-1] == 61.68
    assert all(len(values) == len(METRICS) == 10 for values in PAPER_TABLE.values())
    assert paper_quality("BQ-Sparseformer-DN-S", "asr") == 19.33 and paper_quality("Squeeze-XS", "er") == 58.75


def test_frontier():
    points = [frontier.Point(*p, True) for p in (("a", 1, 5.0), ("b", 2, 4.0), ("c", 2, 7.0), ("d", 3, 7.0), ("e", 4, 9.0))]
    assert [p.label for p in frontier.best(points, more_is_better=True)] == ["a", "c", "e"]
    assert [p.label for p in frontier.best(points, more_is_better=False)] == ["a", "b"]


@pytest.mark.parametrize("task", METRICS)
def test_labels_do_not_overlap(task):
    rows = [(title, row.storage_mb) for row in table1.PAPER_TABLE for title in rows_of(row.title)]
    points = [frontier.Point(title, storage, paper_quality(title, task), False) for title, storage in rows]
    middle = paper_quality("Squeeze-XS", task)
    points += [frontier.Point(f"digits/checkpoint_{i}.pt (300 steps)", 0.8 + 0.05 * i, middle, True) for i in range(3)]
    figure = frontier.draw(points, "storage, MB", METRICS[task].title, METRICS[task].more_is_better)
    figure.canvas.draw()
    (axes,) = figure.axes
    frame = axes.get_window_extent()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(points)
    for i, box in enumerate(boxes):
        assert frame.x0 - 1 <= box.x0 and box.x1 <= frame.x1 + 1 and frame.y0 - 1 <= box.y0 and box.y1 <= frame.y1 + 1
        for other in boxes[:i]:
            assert not box.overlaps(other)


@pytest.mark.parametrize("least", [0.02, 0.3, 4.0, 50.0])
def test_numbers_on_the_axis_do_not_overlap(least):
    figure = frontier.draw([frontier.Point(str(cost), cost, cost, True) for cost in (least, 180.0)], "storage, MB", "accuracy", True)
    figure.canvas.draw()
    (axes,) = figure.axes
    boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
    assert len(boxes) > 2 and all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a measurement and results of two tasks on two models, one of which is gone."""
    folder = tmp_path_factory.mktemp("runs")
    model = folder / "pretrain" / "model.safetensors"
    model.parent.mkdir()
    hubert_eff.export(hubert_eff.build("conformer-debug"), model)
    results = {
        "ks": {"task": "ks", "upstream": str(model), "accuracy": 0.875, "steps": 40, "chance": 0.12},
        "ks0": {"task": "ks", "upstream": "conformer-debug@0", "accuracy": 0.5, "steps": 40},
        "asr": {"task": "asr", "upstream": str(folder / "gone.pt"), "wer": 0.25},
        "other": {"accuracy": 1.0},
        "broken": {"task": "ks", "upstream": "conformer-debug", "accuracy": math.nan},
    }
    for name, values in results.items():
        (folder / name).mkdir()
        (folder / name / "result.json").write_text(json.dumps(values))
    assert main(["bench", str(model), "--seconds", "10", "--rounds", "2", "--out", str(folder / "bench")]) == 0
    return folder


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(table1, "PAPER_TABLE", table1.PAPER_TABLE[1:2] + table1.PAPER_TABLE[5:])  # Conformer-S and the binarized rows
    out = tmp_path_factory.mktemp("report")
    assert main(["report", str(runs), "--out", str(out)]) == 0
    patch.undo()
    return out


class Page(HTMLParser):
    """Checks that tags close in order, and collects the attributes that could load something."""

    VOID = {"meta", "img", "br", "wbr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_complete_and_self_contained(report, runs):
    source = (report / "report.html").read_text()
    page = Page(source)
    assert page.sources and all(value.startswith("data:image/svg+xml;base64,") for value in page.sources)
    assert "url(" not in source and "@import" not in source and "<script src" not in source
    assert "Left out: " in page.text and "gone.pt" in page.text
    assert "pretrain/model.safetensors" in page.text and "LayerNorm" in page.text and "conv_module" in page.text
    assert all(f"id=ks-{cost}" in source for cost in ("storage", "bop", "ms"))
    assert "id=asr-" not in source and "id=er-" not in source  # of a model that is gone, and of a task without a result
    assert "stepped line joins the models that are best at their cost" in page.text
    assert "the paper's models are left out" in page.text and "BQ-Vanilla (rep" not in page.text


def test_superb_results_stand_in_a_narrow_table(report):
    text = (report / "report.html").read_text()
    table = text[text.index("<h2>SUPERB</h2>") : text.index("<h2>Measured latency</h2>")]
    heads = re.findall(r"<th>(.*?)</th>", table.replace("<wbr>", ""))
    assert heads[0] == "task" and heads[2:] == ["pretrain/model.safetensors", "conformer-debug@0, untrained", "chance", "best published"]
    assert heads[1].endswith("gone.pt")
    row = re.search(r">ks accuracy ↑</th>(.*?)</tr>", table)[1]
    assert re.findall(r"<td>(.*?)</td>", row) == ["-", "87.50", "50.00", "12.00", "96.66"]


def test_a_legend_and_labels_of_any_length_stay_inside():
    point = frontier.Point("a/rather/long/name/of/a/checkpoint_best.pt (300 steps, generated data)", 0.8, 50.0, True)
    figure = frontier.draw([point, frontier.Point("b", 0.8, 20.0, True)], "storage, MB", "accuracy", True)
    figure.canvas.draw()
    (axes,) = figure.axes
    frame, box = axes.get_window_extent(), max((text.get_window_extent() for text in axes.texts), key=lambda box: box.width)
    assert frame.x0 - 1 <= box.x0 and box.x1 <= frame.x1 + 1
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["models found", "best of these at their cost"]


def test_files_beside_the_page(report, runs):
    names = {path.name for path in report.iterdir()}
    charts = ("ks-storage", "ks-bop", "ks-ms")
    expected = {f"frontier-{chart}.{kind}" for chart in charts for kind in ("svg", "png")}
    assert expected <= names and not any(name.startswith("frontier-er") for name in names)
    rows = list(csv.DictReader((report / "cost.csv").open()))
    assert [row["source"] for row in rows].count("found") == 2
    values = json.loads((report / "report.json").read_text())
    model = values["models"][str(runs / "pretrain" / "model.safetensors")]
    (row,) = [row for row in rows if row["model"].endswith("model.safetensors")]
    assert float(row["gflop"]) == model["gflop"] and len(values["results"]) == 3 and len(values["left_out"]) == 1


def test_points_carry_results_in_the_papers_unit(runs):
    from hubert_eff.reports import page

    found = page.collect([runs])
    ours = {p.label: p for p in page.points(found, "ks", "storage") if p.ours}
    trained = ours["pretrain/model.safetensors (40 steps)"]
    assert trained.quality == 87.5 and trained.cost == found.profiles["conformer-debug"].storage_mb["paper"]
    assert ours["conformer-debug@0 (40 steps)"].quality == 50.0
    (timed,) = [p for p in page.points(found, "ks", "ms")]
    assert timed.cost == found.timings[0].median_ms
    assert all(p.ours for p in page.points(found, "ks", "storage"))  # by few steps: the paper's models are not comparable
    for result in found.results[1:]:
        result["superb_settings"] = True
    ours = [p for p in page.points(found, "ks", "storage") if p.ours]
    assert len(page.points(found, "ks", "storage")) - len(ours) == len(PAPER_TABLE) and len(ours) < 3


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no folder at"),
        ({}, "holds no hydra_train.log of training, no result.json"),
        ({"bench.json": "{}"}, "is not a result of"),
    ],
)
def test_bad_input_is_one_line(content, message, tmp_path, capsys):
    folder = tmp_path / "runs"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_impossible_folder_is_one_line(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["report", str(runs), "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert "file cannot be made: File exists" in error and error.count("\n") == 1


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
@pytest.mark.parametrize("width", [1280, 390])  # a desktop and a phone
def test_in_a_browser(report, width, tmp_path):
    """Nothing is wider than its window, one chart is shown at a time, the module trees fold, and a screenshot can be taken."""
    probe = """<script>{
        const trees = [...document.querySelectorAll('.tree > details')], heights = trees.map(t => t.offsetHeight);
        const wide = document.documentElement.scrollWidth, charts = document.querySelectorAll('figure:not([hidden])').length;
        for (const tree of trees) tree.open = false;
        const folded = trees.length > 0 && trees.every((tree, i) => tree.offsetHeight < heights[i]);
        for (const tree of trees) tree.open = true;
        parent.document.title = [wide, charts, folded];
    }</script>"""
    page, frame = tmp_path / "report.html", tmp_path / "frame.html"  # a headless chromium's own window cannot be as narrow as a phone
    page.write_text((report / "report.html").read_text().replace("</body>", probe + "</body>"))
    style = f"border:0;width:{width}px;height:4000px"
    frame.write_text(f"<title></title><body style='margin:0'><iframe src=report.html style='{style}'></iframe>")
    profile = f"--user-data-dir={tmp_path / 'user'}"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               "--hide-scrollbars", "--allow-file-access-from-files", "--window-size=1280,4000", profile]  # fmt: skip
    dom = subprocess.run([*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.search(r"<title>(\d+),(\d+),(\w+)</title>", dom)
    assert found and int(found[1]) <= width and found[2] == "1" and found[3] == "true"
    shot = tmp_path / "shot.png"
    subprocess.run([*command, f"--screenshot={shot}", frame.as_uri()], capture_output=True, check=True, timeout=120)
    assert shot.stat().st_size > 20_000


def test_a_model_without_cost_is_named_once_and_its_reason_ends_with_a_word() -> None:
    said = _without_cost("run/checkpoint_best.pt", UserError("run/checkpoint_best.pt holds another model: " + "import it first " * 50))
    assert said.startswith("run/checkpoint_best.pt holds") and said.count("checkpoint_best.pt") == 1
    assert said.removesuffix(" ...").split()[-1] in ("import", "it", "first") and said.endswith(" ...")
    assert _without_cost("run/last.pt", UserError("an operation has no formula")) == "run/last.pt: an operation has no formula"
