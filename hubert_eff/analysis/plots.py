"""What pictures share: as many distinguishable colors as there are lines, and names in a form that matplotlib prints."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..errors import printable

FIRST = (
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#ff9da7", "#2f4b7c", "#a0b94c", "#d4a6c8",
)  # fmt: skip
GRID = 13  # levels of red, green and blue from which further colors are chosen
LIGHTNESS = (30.0, 88.0)  # range of L*, without black and white
LINES = ("-", "--", ":", "-.")


@lru_cache
def distinct_colors(count: int) -> tuple[str, ...]:
    """`count` different colors as "#rrggbb": those of `FIRST`, and then always the one that is furthest from all others in CIELAB."""
    if count <= len(FIRST):
        return FIRST[:count]
    levels = np.linspace(0, 255, GRID if count < 500 else 33).round().astype(int)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    lab = _lab(grid)
    inside = (lab[:, 0] >= LIGHTNESS[0]) & (lab[:, 0] <= LIGHTNESS[1])
    grid, lab = grid[inside], lab[inside]
    chosen = [tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in FIRST]
    nearest = np.min([np.linalg.norm(lab - one, axis=1) for one in _lab(np.array(chosen))], axis=0)
    while len(chosen) < count:
        best = int(nearest.argmax())
        chosen.append(tuple(grid[best].tolist()))
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[best], axis=1))
    return tuple("#{:02x}{:02x}{:02x}".format(*color) for color in chosen)


def plot_text(text: object) -> str:
    """Escape a name for matplotlib, which reads text between dollars as a formula and hides labels that begin with "_"."""
    line = printable(text).replace("$", r"\$")
    return f" {line}" if line.startswith("_") else line


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (N, 3) of 0 ... 255 -> CIELAB (N, 3) at D65 (IEC 61966-2-1; CIE 15)."""
    share = rgb / 255.0
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]]) / (0.9505, 1.0, 1.089)
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack((116 * root[:, 1] - 16, 500 * (root[:, 0] - root[:, 1]), 200 * (root[:, 1] - root[:, 2])), -1)
