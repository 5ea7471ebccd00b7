"""What an installed wheel holds."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import hubert_eff
from hubert_eff.kernels import loader

from .helpers.paths import ROOT


def test_wheel_is_complete(tmp_path: Path) -> None:
    """All modules, the kernels' sources, the configurations, S3PRL's configuration and entry point; no tests."""
    source = tmp_path / "source"
    subprocess.run(["git", "-C", str(ROOT), "checkout-index", "-a", f"--prefix={source}/"], check=True)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    held = set(archive.namelist())
    (declared,) = (archive.read(name).decode() for name in held if name.endswith("entry_points.txt"))
    assert "[hubert_eff.teachers]\ns3prl = superb_tasks.teachers:open_s3prl" in declared
    modules = [p for room in ("hubert_eff", "fairseq_plugins", "superb_tasks", "hydra_plugins") for p in (source / room).rglob("*.py")]
    expected = {str(p.relative_to(source)) for p in modules} | {"hubert_eff/py.typed"}
    expected |= {f"hubert_eff/kernels/{p.name}" for p in loader.SOURCES}
    expected |= {f"hubert_eff/{p.relative_to(source)}" for p in (source / "configs").rglob("*.yaml")}
    expected |= {str(p.relative_to(source)) for p in (source / "superb_tasks").rglob("*.yaml")}
    assert len([name for name in expected if name.endswith(".yaml")]) >= 4
    assert expected <= held
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/", "configs/"))]


def test_one_version() -> None:
    written = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {hubert_eff.__version__}\n" in written
    assert f"\n## {hubert_eff.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
