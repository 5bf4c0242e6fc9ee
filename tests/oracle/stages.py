"""Section 4 of ALGORITHM.md, the gradient stages, in float64: one array at a time, direct rather than fast."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RING_LENGTH = 100
EDGE_DECAY = 0.9


# ---------------------------------------------------------------- layout (section 1)


def row_axis(ndim: int, layout: str, embedding: bool = False) -> int:
    """The axis with one row per output feature; embeddings are (num, features) in both layouts."""
    return 0 if layout == "torch" or embedding else ndim - 1


def spatial_axes(shape: tuple[int, ...], layout: str) -> tuple[int, int] | None:
    """The spatial axes; None where the edge and frequency stages leave the array alone."""
    if len(shape) == 2:
        axes = (0, 1)
    elif len(shape) >= 4:  # a convolution with two or more spatial axes
        first = len(shape) - (2 if layout == "torch" else 4)
        axes = (first, first + 1)
    else:
        return None
    too_short = any(shape[axis] < 3 for axis in axes)
    return None if too_short or 0 in shape else axes


# ---------------------------------------------------------------- 1. clip_by_percentile


class PercentileClip:
    """The global stage with its ring of squared norms, all arrays of a step together."""

    def __init__(self, percentile: int) -> None:
        self.percentile = percentile
        self.ring: list[float] = []  # oldest first; empty until the first recorded step

    def __call__(self, grads: Sequence[Array | None], skipped: Sequence[bool]) -> list[Array | None]:
        """The gradients, clipped. None is an array without gradient, `skipped` one that is not finite."""
        if self.percentile == 100 or any(skipped):
            return list(grads)
        square = sum(float(np.sum(np.square(g))) for g in grads if g is not None)
        if square == 0:
            return list(grads)
        self.ring = [*self.ring[1:], square] if self.ring else [square] * RING_LENGTH
        threshold = sorted(self.ring)[self.percentile]
        if square <= threshold:
            return list(grads)
        factor = np.sqrt(threshold / square)
        return [None if g is None else g * factor for g in grads]


# ---------------------------------------------------------------- 2. suppress_edges


def initial_edge_history(shape: tuple[int, ...], layout: str, embedding: bool = False) -> Array | None:
    """Zeros in the shape of the rows, e.g. (out, 1, 1, 1); None where the stage leaves the array alone."""
    if spatial_axes(shape, layout) is None:
        return None
    rows = row_axis(len(shape), layout, embedding)
    return np.zeros([n if axis == rows else 1 for axis, n in enumerate(shape)])


def laplacian(g: Array, axes: tuple[int, int]) -> Array:
    """The four neighbours' differences from each element; beyond a border stands the border element itself."""
    total = np.zeros_like(g)
    for axis in axes:
        n = g.shape[axis]
        for shift in (-1, 1):
            neighbour = np.take(g, np.clip(np.arange(n) + shift, 0, n - 1), axis=axis)
            total += neighbour - g
    return total


def suppress_edges(
    g: Array,
    history: Array | None,
    age: int,
    *,
    layout: str,
    embedding: bool = False,
    penalty: float,
    threshold: float,
) -> tuple[Array, Array | None]:
    """The gradient and the new `edge_history`; `age` counts the array's steps, this one included."""
    axes = spatial_axes(g.shape, layout)
    if axes is None:
        assert history is None
        return g, None
    rough = laplacian(g, axes)
    columns = tuple(axis for axis in range(g.ndim) if axis != row_axis(g.ndim, layout, embedding))
    strength = np.abs(rough).mean(axis=columns, keepdims=True)
    assert history is not None
    assert history.shape == strength.shape
    history = EDGE_DECAY * history + (1 - EDGE_DECAY) * strength
    usual = history / (1 - EDGE_DECAY**age)
    excess = np.maximum(np.abs(rough) - (1 + threshold) * usual, 0)
    return g + penalty * np.sign(rough) * excess, history


# ---------------------------------------------------------------- 3. suppress_high_frequencies


def above_cutoff(n1: int, n2: int) -> NDArray[np.bool_]:
    """H in the shape of rfft2's result, (n1, n2 // 2 + 1), decided in integers."""
    assert 100 * (n1 * n2) ** 2 < 2**63  # |k| / n is at most a half, so the left side is at most half of this
    k1 = np.arange(n1, dtype=np.int64)
    k1 = np.where(2 * k1 > n1, k1 - n1, k1)[:, None]
    k2 = np.arange(n2 // 2 + 1, dtype=np.int64)[None, :]
    high: NDArray[np.bool_] = 100 * ((k1 * n2) ** 2 + (k2 * n1) ** 2) > 9 * (n1 * n2) ** 2
    return high


def suppress_high_frequencies(g: Array, *, layout: str, penalty: float) -> Array:
    """The gradient with everything above 0.3 cycles per sample multiplied by 1 - penalty."""
    axes = spatial_axes(g.shape, layout)
    if axes is None or penalty == 0:
        return g
    n1, n2 = g.shape[axes[0]], g.shape[axes[1]]
    last = np.moveaxis(g, axes, (-2, -1))
    kept = 1 - penalty * above_cutoff(n1, n2)
    result = np.fft.irfft2(kept * np.fft.rfft2(last), s=(n1, n2))
    return np.moveaxis(result, (-2, -1), axes)


# ---------------------------------------------------------------- 4. encourage_low_rank


def encourage_low_rank(
    g: Array, w: Array, *, layout: str, embedding: bool = False, strength: float, emphasis: float
) -> Array:
    """The gradient of a LoRA array whose parameter is w; only 2-D arrays are changed, and none where w = 0."""
    if w.ndim != 2 or not np.any(w):
        return g
    short = row_axis(2, layout, embedding)  # a tie: the row axis first
    if w.shape[1 - short] < w.shape[short]:
        short = 1 - short
    W, G = (w, g) if short == 0 else (w.T, g.T)
    W = W / np.abs(W).max()
    # The left singular vectors of W are the eigenvectors of W Wᵀ, the squared singular values its eigenvalues.
    Q, sigma, _ = np.linalg.svd(W, full_matrices=False)
    eigenvalues = sigma**2
    weak = 1 / (1 + (eigenvalues / eigenvalues.mean()) ** 2)
    delta_squared = 1e-2 * eigenvalues.max()
    T = Q @ ((weak / np.sqrt(eigenvalues + delta_squared))[:, None] * (Q.T @ W))
    P_g = Q @ ((1 - weak)[:, None] * (Q.T @ G))
    result = G + (emphasis - 1) * P_g + strength * (np.linalg.norm(G) / np.linalg.norm(T)) * T
    return np.asarray(result if short == 0 else result.T)
