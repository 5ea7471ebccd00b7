"""Recordings that are made up."""

import numpy as np


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise at 16 kHz, float32."""
    return (0.1 * np.random.default_rng(seed).normal(size=round(seconds * 16000))).astype(np.float32)
