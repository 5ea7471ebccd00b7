"""Alignments as files: CTM, Praat's TextGrid, pictures of gradients, norms and energies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import SAMPLE_RATE
from ..errors import missing_extra
from ..utils.files import replacing
from .alignment import FRAME_SECONDS, Segment


def ctm(name: str, words: Sequence[Segment]) -> str:
    """NIST's CTM format: recording, channel, start, duration and word on each line."""
    return "".join(f"{name} 1 {w.start:.3f} {w.end - w.start:.3f} {w.label}\n" for w in words)


def textgrid(tiers: Mapping[str, Sequence[Segment]], seconds: float) -> str:
    """Praat's TextGrid format with one interval tier per entry; gaps between segments are empty intervals."""
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {seconds:.4f}", "tiers? <exists>"]
    lines += [f"size = {len(tiers)}", "item []:"]
    for number, (name, segments) in enumerate(tiers.items(), start=1):
        filled = _filled(segments, seconds)
        lines += [f"    item [{number}]:", '        class = "IntervalTier"', f'        name = "{name}"', "        xmin = 0"]
        lines += [f"        xmax = {seconds:.4f}", f"        intervals: size = {len(filled)}"]
        for place, s in enumerate(filled, start=1):
            label = s.label.replace('"', '""')
            lines += [f"        intervals [{place}]:", f"            xmin = {s.start:.4f}", f"            xmax = {s.end:.4f}"]
            lines += [f'            text = "{label}"']
    return "\n".join(lines) + "\n"


def _filled(segments: Sequence[Segment], seconds: float) -> list[Segment]:
    filled, now = [], 0.0
    for s in segments:
        if s.start > now:
            filled.append(Segment("", now, s.start))
        filled.append(Segment(s.label, s.start, min(s.end, seconds)))
        now = s.end
    if now < seconds:
        filled.append(Segment("", now, seconds))
    return filled


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "plot", "a plot") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=90)


def draw_alignment(found: Mapping[str, Tensor], letters: Sequence[Segment], shown: str, wav: Tensor, path: Path, title: str) -> None:
    """Draw the audio with the times of the letters, and G of every place, letters downwards, each row scaled to its own maximum."""
    figure = _figure(11, 2.0 + 1.7 * len(found))
    figure.suptitle(title)
    axes = figure.subplots(len(found) + 1, 1, sharex=True)
    seconds = wav.size(1) / SAMPLE_RATE
    axes[0].plot([i * 8 / SAMPLE_RATE for i in range(len(wav[0, ::8]))], wav[0, ::8].tolist(), linewidth=0.4, color="gray")
    axes[0].set(ylabel="audio", xlim=(0, seconds), yticks=[])
    top = float(wav.abs().max())
    for number, letter in enumerate(letters):
        axes[0].axvspan(letter.start, letter.end, alpha=0.25, color="C0" if number % 2 else "C1", linewidth=0)
        axes[0].text((letter.start + letter.end) / 2, top, letter.label, ha="center", va="top", fontsize=8)
    for axis, (name, scores) in zip(axes[1:], found.items(), strict=True):
        relative = (scores - scores.max(1, keepdim=True).values).clamp(min=-6)
        frames = scores.size(1) * FRAME_SECONDS
        axis.imshow(relative.numpy(), aspect="auto", interpolation="nearest", extent=(0, frames, scores.size(0), 0), cmap="magma")
        place = {"input": "audio", "0": "into block 1"}.get(name, f"block {name}")
        axis.set(ylabel=f"{place}\n(aligned)" if name == shown else place)
    axes[-1].set_xlabel("s")
    _save(figure, path)


def draw_cross_attention(blocks: Sequence[Tensor], labels: Sequence[str], path: Path, title: str) -> None:
    """Draw the cross-attention of each decoder block (S + 1, T) over time, letters downwards, the end of the sentence ("EOS") last."""
    figure = _figure(9, 1.0 + len(blocks) * max(2.0, 0.16 * (len(labels) + 1)))
    figure.suptitle(title)
    rows = [*labels, "EOS"]
    for number, (axis, weights) in enumerate(zip(figure.subplots(len(blocks), 1, sharex=True, squeeze=False)[:, 0], blocks), start=1):
        seconds = weights.size(1) * FRAME_SECONDS
        image = axis.imshow(weights.numpy(), aspect="auto", interpolation="nearest", extent=(0, seconds, len(rows), 0), cmap="magma")
        axis.axhline(len(labels), color="white", linewidth=0.8, linestyle=":")
        axis.set(ylabel=f"decoder block {number}")
        axis.set_yticks([row + 0.5 for row in range(len(rows))], rows, fontsize=7)
        figure.colorbar(image, ax=axis, label="weight, mean of heads")
    axis.set_xlabel("s")
    _save(figure, path)


def draw_blocks(norms: Mapping[str, Mapping[str, float]], energies: Mapping[str, Tensor], path: Path, title: str) -> None:
    """Draw, for each block, L2 norms of residual and modules as bars, and attention energies with queries downwards."""
    columns = max(1, len(energies))
    figure = _figure(max(8.0, 2.2 * columns), 7.0 if energies else 4.0)
    figure.suptitle(title)
    grid = figure.add_gridspec(2 if energies else 1, columns)
    axis = figure.add_subplot(grid[0, :])
    names = list(dict.fromkeys(key for row in norms.values() for key in row))
    width = 0.8 / len(names)
    for place, key in enumerate(names):
        axis.bar([i + place * width for i in range(len(norms))], [row.get(key, 0.0) for row in norms.values()], width, label=key)
    axis.set_xticks([i + 0.4 for i in range(len(norms))], list(norms))
    axis.set(ylabel="mean L2 norm per frame", yscale="log")
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    for place, (name, scores) in enumerate(energies.items()):
        picture = figure.add_subplot(grid[1, place])
        picture.imshow(scores.numpy(), aspect="auto", interpolation="nearest", cmap="viridis")
        picture.set(title=f"{name}: energies", xlabel="key", ylabel="query" if place == 0 else "")
    _save(figure, path)
