"""README and the pages of docs/: their blocks, commands and links."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from .paths import ROOT

BLOCK = re.compile(r"(<!-- run -->\n)?```(\w*)\n(.*?)```", re.S)
TUTORIALS = ("pretraining", "one-bit", "streaming", "superb", "new-encoder")
FIRST = ("start", *(f"tutorials/{name}" for name in TUTORIALS), "profiling")
TRAINING = "hubert-eff train debug"


def page(name: str) -> str:
    """The text of docs/NAME.md, of README for README."""
    path = ROOT / "README.md" if name == "README" else ROOT / "docs" / f"{name}.md"
    return path.read_text(encoding="utf-8")


def pages() -> list[str]:
    """All names of pages, README first, then those that build on each other in the order in which their blocks run."""
    docs = ROOT / "docs"
    rest = sorted(str(path.relative_to(docs).with_suffix("")) for path in docs.rglob("*.md"))
    return ["README", *FIRST, *(name for name in rest if name not in FIRST)]


def commands(text: str) -> list[str]:
    """Every command line of a page, continued lines joined."""
    lines = "\n".join(body for _, language, body in BLOCK.findall(text) if language in ("", "bash"))
    return [line.strip() for line in lines.replace("\\\n", " ").splitlines() if line.strip()]


def links(text: str) -> list[str]:
    """Targets of links and pictures that stand outside blocks, without anchors."""
    plain = re.sub(r"```.*?```", "", text, flags=re.S)
    return [target.split("#")[0] for found in re.findall(r"\]\(([^)\s]+)\)|src(?:set)?=\"([^\"]+)\"", plain) for target in found if target]


def anchors(text: str) -> set[str]:
    """Names by which the headings of a page can be linked to."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def run_block(language: str, body: str, folder: Path, **environment: str) -> str:
    """Run a block of bash or Python in a folder; returns what it printed."""
    program = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    surroundings = {**os.environ, "PATH": path, **environment}
    done = subprocess.run([*program, body], cwd=folder, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{body}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout
