"""Arrays and gradient streams that the suites run on: every shape class, every storage form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

SHAPES: tuple[tuple[int, ...], ...] = (
    (32, 256),  # blocks inside the last axis
    (64, 100),  # blocks across rows, a short last one
    (16, 12, 5, 5),  # convolution kernel
    (8, 6, 3, 5, 4),  # five axes
    (24, 16, 9),  # three axes
    (3000,),  # no rows
    (7, 5),  # too small for 8 bits
    (),
    (16, 80),  # adapters
    (80, 16),
    (80, 16),
)
ADAPTERS = frozenset({(16, 80), (80, 16), (5, 7), (7, 3), (1, 9), (6, 6)})
"""Shapes of arrays that count as adapters."""

TURN = 6
"""The step whose gradients point the other way."""


def adapters(shapes: Sequence[tuple[int, ...]]) -> list[bool]:
    """Which of the arrays are adapters."""
    return [shape in ADAPTERS for shape in shapes]


def weights(seed: int, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[np.ndarray]:
    """Float32 starting values of each shape, N(0, 0.1²)."""
    rng = np.random.default_rng(seed)
    return [np.asarray(0.1 * rng.standard_normal(shape), np.float32) for shape in shapes]


def gradients(seed: int, steps: int, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Iterator[list[np.ndarray]]:
    """Gradients like a network's: scales that differ between rows and columns, a slow drift, noise, exact zeros.

    The drift keeps a scalar's momentum away from zero, where the relative distance of one number has no bound.  In
    one step all signs are turned round, which ends the climb of the rate search.
    """
    rng = np.random.default_rng(seed)
    scales = [_scales(rng, shape) for shape in shapes]
    drifts = [np.asarray(1.0 + rng.random(shape)) for shape in shapes]
    for step in range(steps):
        fade = 0.3 + 0.7 * np.cos(step / 60.0) ** 2
        current = []
        for shape, scale, drift in zip(shapes, scales, drifts, strict=True):
            noise = rng.standard_normal(shape)
            g = scale * (fade * drift + (0.3 if shape == () else 1.0) * noise)
            if len(shape) > 1 and step % 3 == 1:
                g = g * (rng.random(shape) > 0.1)
            current.append(np.asarray(-g if step + 1 == TURN else g, np.float32))
        yield current


def _scales(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    scale = np.full(shape, 1e-3)
    for axis, n in enumerate(shape):
        along = np.exp(0.5 * rng.standard_normal(n))
        scale = scale * along.reshape([n if a == axis else 1 for a in range(len(shape))])
    return scale
