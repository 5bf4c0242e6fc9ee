"""Random runs: arrays of every shape and dtype, and gradients of every kind, a few steps of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from automagic_core import Config
from benchmarks.soak.fuzz_fields import Fields, valid_fields

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}
_SIDES = (*(1, 2, 3, 4, 5, 7, 8, 13, 16, 31) * 2, 64, 97, 127, 256, 257, 509, 512, 1021, 0)
"""Lengths of axes; one in thirty is 0."""
_LARGEST = 6_000
KINDS = (
    *("normal", "normal", "normal", "drift", "constant", "sparse", "one row zero", "all sizes"),
    *("zero", "negative zero", "denormal", "1e-38", "tiny", "huge", "largest"),
    *("1e38", "nan", "inf", "one nan", "one -inf", "absent"),
)
"""Of gradients.  `normal` stands here more than once, so that runs also get somewhere."""
TAME = frozenset({"normal", "drift", "constant", "sparse", "one row zero", "zero", "negative zero", "absent"})
"""Kinds whose squares and their means keep all digits of float32."""
COMPARABLE: Fields = {"optim_bits": 32, "spatial_awareness": False}
"""Without 8-bit states float32 and float64 must agree.  The spatial factor is left out: where all of an array's d are
equal, as after a first step on gradients of one sign, it is a quotient of variances that are rounding errors, in
float64 too."""


@dataclass(frozen=True)
class ArrayCase:
    """One parameter: its shape and dtype, what it is marked as, and of what size its values are."""

    shape: tuple[int, ...]
    dtype: str
    embedding: bool
    lora: bool
    scale: float


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        fields: of the configuration, valid.
        layout: of the arrays.
        arrays: the parameters.
        steps: for every step the kind of each array's gradient.
        seed: of all values.
    """

    fields: Fields
    layout: str
    arrays: tuple[ArrayCase, ...]
    steps: tuple[tuple[str, ...], ...]
    seed: int

    @property
    def config(self) -> Config:
        """The configuration with what its profile sets."""
        return Config(**self.fields)

    @property
    def tame(self) -> bool:
        """Float64 and float32 must agree on it: float32 parameters of ordinary size, and gradients likewise."""
        ordinary = not self.config.spatial_awareness and all(
            a.dtype == "float32" and a.scale in (0.0, 1.0) for a in self.arrays
        )
        return ordinary and all(kind in TAME for step in self.steps for kind in step)

    def weights(self) -> list[np.ndarray]:
        """The first parameters, in their dtypes."""
        rng = np.random.default_rng(self.seed)
        values = [np.asarray(a.scale * rng.standard_normal(a.shape)) for a in self.arrays]
        return [x.astype(DTYPES[a.dtype]) for x, a in zip(values, self.arrays, strict=True)]

    def gradients(self, t: int) -> list[np.ndarray | None]:
        """Those of step t, from 1 on, in the dtypes of their parameters."""
        rng = np.random.default_rng([self.seed, t])
        pairs = zip(self.steps[t - 1], self.arrays, strict=True)
        return [_gradient(kind, a, rng) for kind, a in pairs]


def _gradient(kind: str, array: ArrayCase, rng: np.random.Generator) -> np.ndarray | None:
    if kind == "absent":
        return None
    noise = np.asarray(rng.standard_normal(array.shape))
    sizes = {"denormal": 1e-40, "1e-38": 1e-38, "tiny": 1e-20, "huge": 1e13, "1e38": 1e38}
    fixed = {"constant": 0.7, "zero": 0.0, "negative zero": -0.0, "largest": 1e15, "nan": np.nan, "inf": np.inf}
    g = noise * sizes.get(kind, 1.0)
    if kind in fixed:
        g = np.full(array.shape, fixed[kind])
    elif kind == "drift":
        g = noise * 0.1 + 1.0
    elif kind == "sparse":
        g = noise * (rng.random(array.shape) < 0.05)
    elif kind == "all sizes":
        g = noise * 10.0 ** rng.uniform(-40, 14, array.shape)
    elif kind in ("one nan", "one -inf") and g.size:
        g.reshape(-1)[rng.integers(g.size)] = np.nan if kind == "one nan" else -np.inf
    elif kind == "one row zero" and g.size and g.ndim:
        g[0] = 0.0
    with np.errstate(over="ignore", under="ignore"):
        return g.astype(DTYPES[array.dtype])


def usable(g: np.ndarray) -> bool:
    """Whether section 6 lets the array take its step."""
    with np.errstate(over="ignore"):
        return bool(np.all(np.abs(g.astype(np.float32)) <= np.float32(1e15)))


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """0 to 5 axes; zero and prime lengths among them."""
    shape: list[int] = []
    for _ in range(draw(st.integers(0, 5))):
        room = _LARGEST // max(1, prod(shape))
        shape.append(draw(st.sampled_from([n for n in _SIDES if n <= room])))
    return tuple(shape)


@st.composite
def cases(draw: st.DrawFn, shape: st.SearchStrategy[tuple[int, ...]], dtypes: tuple[str, ...]) -> Case:
    """A run of 1 to 4 steps of 1 to 3 arrays.

    Args:
        shape: of an array.
        dtypes: which there may be; the first is the most frequent.
    """
    fields = draw(valid_fields())
    if comparable := draw(st.integers(0, 3)) == 0:
        # One in four can be held against the float64 oracle.
        dtypes, fields = ("float32",), {**fields, **COMPARABLE}
    scales = [1.0, 0.0] if comparable else [1.0, 1.0, 0.0, 1e-38, 1e3]
    kinds = sorted(TAME) if comparable or draw(st.booleans()) else KINDS
    array = st.builds(
        ArrayCase, shape, st.sampled_from([dtypes[0], *dtypes]), st.booleans(), st.booleans(), st.sampled_from(scales)
    )
    arrays = tuple(draw(st.lists(array, min_size=1, max_size=3)))
    step = st.tuples(*[st.sampled_from(kinds)] * len(arrays))
    steps = tuple(draw(st.lists(step, min_size=1, max_size=4)))
    return Case(fields, draw(st.sampled_from(["torch", "flax"])), arrays, steps, draw(st.integers(0, 999)))


@st.composite
def compiled_cases(
    draw: st.DrawFn, configurations: Sequence[tuple[Fields, str]], arrays: tuple[ArrayCase, ...]
) -> Case:
    """A run of 1 to 6 steps of the same arrays under one of a few configurations, so that few steps are compiled.

    Args:
        configurations: fields and layouts.
        arrays: the parameters of every case.
    """
    fields, layout = draw(st.sampled_from(configurations))
    # Without a gradient the step would have to be compiled anew.
    kinds = sorted({*(TAME if draw(st.booleans()) else KINDS)} - {"absent"})
    step = st.tuples(*[st.sampled_from(kinds)] * len(arrays))
    return Case(fields, layout, arrays, tuple(draw(st.lists(step, min_size=1, max_size=6))), draw(st.integers(0, 999)))


def is_quantized(case: Case, array: ArrayCase, *, everywhere: bool) -> bool:
    """Whether section 3 stores the array's states in 8 bits; `everywhere`: without `force_8bit` too."""
    config = case.config
    return (
        config.optim_bits == 8
        and (everywhere or config.force_8bit)
        and prod(array.shape) >= max(1, config.min_8bit_size)
        and not (array.embedding and config.stable_emb)
    )


def as_float(x: Any) -> np.ndarray:
    """Any array in float64."""
    return np.asarray(x).astype(np.float64)
