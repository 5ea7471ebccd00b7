"""k-means on more frames than fit in memory: mini-batches streamed from files.

The settings are HuBERT's: 20 k-means++ starts (fewer if one takes long), each scored on a random sample of `INIT_FRAMES` frames, of which
the best is continued; batches of `BATCH` frames, in an order shuffled in every pass, for at most `MAX_PASSES`; no reassignment of small
clusters. It stops when `PATIENCE` batches together lower the (smoothed) error by less than `TOLERANCE`; HuBERT's value of 0 only costs
time.

The alternative is faiss, if it is installed: Lloyd's iterations over all frames, held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError, missing_extra
from ..utils.files import replacing
from ..utils.progress import progress

BATCH = 10_000
PATIENCE = 100
TOLERANCE = 1e-3
STARTS = 20
SMALL = 5e8  # multiplications per batch below which a second thread costs more than it gains
START_BUDGET = 2e10  # frames x clusters x dimensions of all starts together: about a minute
INIT_FRAMES = 3 * BATCH
MAX_PASSES = 100
POOL_BYTES = 1 << 28  # features held in memory to shuffle
KINDS = ("minibatch", "faiss")
FAISS_ITERATIONS = 50

Array = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class KMeans:
    """Centroids (clusters, dim) and their origin (plain strings)."""

    centroids: Array
    metadata: dict[str, str]

    def assign(self, features: Array) -> Labels:
        """Index of the nearest centroid of each row of `features` (frames, dim)."""
        import torch

        centroids = torch.from_numpy(self.centroids)
        half = 0.5 * (centroids**2).sum(1)
        x = torch.from_numpy(features)
        # nearest: |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2)
        best = [(x[i : i + BATCH] @ centroids.T - half).argmax(1) for i in range(0, len(x), BATCH)]
        return np.asarray(torch.cat(best).numpy() if best else np.zeros(0), dtype=np.int64)

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        from safetensors.numpy import save

        with replacing(path) as temporary:
            temporary.write_bytes(save({"centroids": np.ascontiguousarray(self.centroids)}, self.metadata))

    @classmethod
    def read(cls, path: Path) -> KMeans:
        """Read what `save` wrote. Raises `UserError` for other files."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np") as file:
                centroids, metadata = file.get_tensor("centroids"), dict(file.metadata() or {})
            if centroids.ndim != 2 or centroids.dtype != np.float32 or not centroids.size or not np.isfinite(centroids).all():
                raise ValueError(centroids.shape)
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise UserError(f"{path} holds no k-means model of hubert-eff: delete it and make the labels again") from error
        return cls(centroids, metadata)


def require(kind: str) -> None:
    """Raise `UserError` if no package for this kind of k-means is installed."""
    needed = {"sklearn.cluster": ("scikit-learn", "data")} | ({"faiss": ("faiss-cpu", "faiss")} if kind == "faiss" else {})
    for module, (package, extra) in needed.items():
        try:
            import_module(module)
        except ImportError as error:
            raise missing_extra(package, extra, f"k-means ({kind})") from error


def fit_faiss(files: Sequence[Path], clusters: int, seed: int) -> Array:
    """Do what `fit` does with faiss, from the same start; all frames are held in memory."""
    import faiss

    start = _start(files, clusters, seed, sum(np.load(f, mmap_mode="r").shape[0] for f in files))

    rows = _gathered([np.load(f, mmap_mode="r") for f in files])
    _require_finite(rows)
    with progress(f"k-means of {len(rows)} frames by faiss", 1) as advance:
        # no sampling of frames, and no warning where there are few
        model = faiss.Kmeans(
            rows.shape[1], clusters, niter=FAISS_ITERATIONS, seed=seed, min_points_per_centroid=1, max_points_per_centroid=len(rows)
        )
        model.train(rows, init_centroids=start)
        advance(1)
    return np.asarray(model.centroids, dtype=np.float32)


def fit(files: Sequence[Path], clusters: int, seed: int) -> Array:
    """Fit centroids (clusters, dim) to the frames in `files`, .npy arrays of float32 (frames, dim).

    Memory is bounded by `POOL_BYTES` and the largest file. The same files in the same order and the same seed give the same result.

    Raises:
        UserError: there are fewer frames than clusters, the features are not finite, or a package is missing.
    """
    require("minibatch")
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    shapes = [np.load(f, mmap_mode="r").shape for f in files]
    frames = sum(s[0] for s in shapes)
    if frames < clusters:
        raise UserError(f"--clusters {clusters} needs as many frames, the fit split has {frames}: ask for fewer or give more audio")
    batch = max(BATCH, clusters)
    alpha = min(1.0, 2.0 * batch / (frames + 1))  # smoothing over about one pass
    smoothed, best, waited = math.nan, math.inf, 0
    threads = 1 if batch * clusters * shapes[0][1] < SMALL else None
    with threadpool_limits(threads), progress(f"k-means of {frames} frames, passes", MAX_PASSES, at_most=True) as advance:
        model = MiniBatchKMeans(
            clusters,
            init=_start(files, clusters, seed, frames),
            n_init=1,
            batch_size=batch,
            compute_labels=True,
            reassignment_ratio=0.0,
            random_state=seed,
        )
        for number in range(MAX_PASSES):
            for rows in _batches(files, batch, seed + number):
                model.partial_fit(rows)
                inertia = float(model.inertia_) / len(rows)
                smoothed = inertia if math.isnan(smoothed) else smoothed + alpha * (inertia - smoothed)
                if smoothed < best * (1 - TOLERANCE):
                    best, waited = smoothed, 0
                else:
                    waited += 1
                if waited >= PATIENCE:
                    return np.asarray(model.cluster_centers_, dtype=np.float32)
            advance(1)
    return np.asarray(model.cluster_centers_, dtype=np.float32)


def _start(files: Sequence[Path], clusters: int, seed: int, frames: int) -> Array:
    from sklearn.cluster import kmeans_plusplus

    rng = np.random.default_rng(seed)
    wanted = max(INIT_FRAMES, 3 * clusters)
    share = min(1.0, wanted / frames)
    picked = []
    for file in files:  # the same share of every file
        rows = np.load(file, mmap_mode="r")
        count = math.ceil(share * len(rows))
        picked.append(np.asarray(rows[np.sort(rng.choice(len(rows), count, replace=False))]))
    sample = np.concatenate(picked)
    _require_finite(sample)
    sample = sample.astype(np.float64)  # scikit-learn is many times slower in float32 here
    starts = int(np.clip(START_BUDGET / (sample.size * clusters), 1, STARTS))
    best: tuple[float, Any] = (math.inf, None)
    for start in range(starts):
        centroids, _ = kmeans_plusplus(sample, clusters, random_state=seed + start)
        inertia = float(((sample - centroids[KMeans(centroids, {}).assign(sample)]) ** 2).sum())
        if inertia < best[0]:
            best = (inertia, centroids)
    return np.asarray(best[1], dtype=np.float32)


def _require_finite(rows: Array) -> None:
    if not np.isfinite(rows).all():
        raise UserError("NaN or infinity in the features: the checkpoint has diverged, or the audio is broken")


def _batches(files: Sequence[Path], batch: int, seed: int) -> Iterator[Array]:
    """One pass in random order: files are pooled up to `POOL_BYTES` (or one file), the pool is shuffled and cut into batches."""
    rng = np.random.default_rng(seed)
    pool: list[Array] = []  # mapped files
    rest: Array | None = None  # rows too few for a batch
    order = rng.permutation(len(files))
    for position, index in enumerate(order):
        pool.append(np.load(files[index], mmap_mode="r"))
        last = position == len(order) - 1
        if sum(p.nbytes for p in pool) < POOL_BYTES and not last:
            continue
        parts, pool = [rest, *pool] if rest is not None else pool, []
        rows = _gathered(parts)
        places = rng.permutation(len(rows))
        whole = len(rows) if last else len(rows) // batch * batch
        for start in range(0, whole, batch):
            yield rows[places[start : start + batch]]
        rest = rows[places[whole:]]
        del rows  # freed before the next ones are made


def _gathered(parts: list[Array]) -> Array:
    """Concatenate `parts` and empty the list on the way, so that copied parts of mapped files can leave memory."""
    rows = np.empty((sum(len(p) for p in parts), parts[0].shape[1]), parts[0].dtype)
    end = len(rows)
    while parts:
        part = parts.pop()
        rows[end - len(part) : end] = part
        end -= len(part)
    return rows
