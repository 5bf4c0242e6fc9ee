"""Step parity: at each step both sides start from the same state and see the same gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import numpy as np

from automagic_core import dynamic_codebook
from automagic_core.arrays.group_keys import group_key
from automagic_core.arrays.state_forms import SEARCH_SCALARS
from automagic_optax import ClipByPercentileState, ScaleByCameampState
from automagic_optax.cameamp.find_states import parts_of
from automagic_optax.moving.neutral_state import flat_states
from parity import streams
from parity.checks import Check, distance
from parity.sides import Arrays, JaxSide, TorchSide

SUITE = "Step parity, teacher-forced"
EVERYTHING = slice(None)
UPDATE_BOUND = 2e-6 if jax.default_backend() == "cpu" else 2e-5
"""About 16 float32 roundings; sums of thousands of elements differ by a few.  On a GPU XLA rounds a third of all
quotients to the neighbour of the nearest number, and a step divides ten times in a row."""
CODE_BOUND = 0.9999
ELEMENT_BOUND = 0.999
STATE_FLOORS = {"exp_avg_res": 1e-3, "lr_mask": 0.2, "spatial_variance": 1e-6, "log_rate_scale": 1.0, "agreement": 1.0}
STATE_FLOORS |= {"peak_agreement": 1.0, "s": 1.0}
"""Some states are differences that cancel, so that a relative distance of their own has no bound; they count relative
to what they are added to or made of. `exp_avg_res`, the mean of (u − m̂)², enters as r + 1 − β₃; `lr_mask` sums votes
of both signs, each worth up to the gain; `spatial_variance` is that of numbers of order 1, which may all be equal.
`log_rate_scale` is a logarithm; `agreement` averages votes of both signs, each worth up to 1, and `peak_agreement` is
its highest; `s` averages soft signs, which are steep where a small number crosses 0. `walk` sums steps of both signs,
and counts relative to what a random walk would have come to. `walk_energy` sums squares: no floor."""
GRID_STEP = 2 / 65535
"""Between points of bitsandbytes' CPU grid.  Near zero it is coarser than the codes, so neighbouring points are several
codes apart; pairs within two of its steps count as neighbours."""

BASE = {
    "lr": 1e-3,
    "max_lr": 1e-1,
    "warmup_steps": 100,
    "weight_decay": 0.1,
    "torque_decay": 0.5,
    "lr_mask_gain": 0.2,
    "spatial_scope": "all",
    "min_8bit_size": 1024,
    "force_8bit": True,
}
"""Every feature on; half of the steps inside the warm-up."""


class Comparison:
    """The largest differences over all steps so far.

    Attributes:
        grid: codes come through bitsandbytes' CPU grid.
        update, state: largest distance of an update and of a float32 state.
        codes, codes_equal, code_step, on_grid: how many codes, how many equal, how many codes apart at most, and how
            many pairs are several codes but not more than two steps of the grid apart.
        elements, elements_equal, element_step: the same of low-precision parameters, in units in the last place.
    """

    def __init__(self, grid: bool) -> None:
        self.grid = grid
        self.on_grid = 0
        self.update = 0.0
        self.state = 0.0
        self.codes = self.codes_equal = 0
        self.code_step = 0
        self.elements = self.elements_equal = 0
        self.element_step = 0
        self._largest: dict[int, float] = {}
        self._steps = 0.0

    def add(self, theirs: Arrays, ours: Arrays, torch_states: dict[int, Any], state: Any) -> None:
        """One step's updates and states."""
        (scale,) = parts_of(state, ScaleByCameampState)
        self._steps = math.sqrt(float(scale.walk_energy) / sum(update.size for update in ours))
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            self.update = max(self.update, distance(a, b, self._floor(index, b)))
        for index, fields in enumerate(flat_states(state, ours)):
            self._add_states(torch_states[index], {name: np.asarray(value) for name, value in fields.items()})

    def _floor(self, index: int, update: np.ndarray) -> float:
        """What an update counts relative to at least: an array's largest so far where it is a single number.

        The torque of a single number may be next to nothing, τ = (1 − 0.99) / 2: then most digits of its update cancel.
        """
        if update.size != 1:
            return 0.0
        self._largest[index] = max(self._largest.get(index, 0.0), float(np.abs(update).max()))
        return self._largest[index]

    def _add_states(self, theirs: dict[str, Any], ours: dict[str, np.ndarray]) -> None:
        if not theirs.keys() <= ours.keys():  # ours keeps the warm-up's states until told
            self.state = float("inf")
        for name in sorted(theirs.keys() & ours.keys()):
            value = theirs[name].numpy()
            if value.dtype == np.int32:
                self.state = max(self.state, float(np.any(value != ours[name])))
            elif value.dtype == np.uint8:
                self._add_codes(value, ours[name], signed=name in ("exp_avg", "s"))
            else:
                floor = STATE_FLOORS.get(name.removesuffix("_row").removesuffix("_col"), 0.0)
                if name == "walk":
                    size = math.prod(np.shape(ours["exp_avg"]))
                    floor = self._steps * math.sqrt(size / value.size)
                self.state = max(self.state, distance(ours[name], value, floor))

    def _add_codes(self, theirs: np.ndarray, ours: np.ndarray, signed: bool) -> None:
        values = dynamic_codebook(signed).astype(np.float64)
        apart = np.abs(theirs.astype(int) - ours.astype(int))
        self.codes += apart.size
        self.codes_equal += int((apart == 0).sum())
        on_grid = (apart > 1) & (np.abs(values[theirs] - values[ours]) <= 2 * GRID_STEP) & self.grid
        self.on_grid += int(on_grid.sum())
        self.code_step = max(self.code_step, int(np.where(on_grid, 1, apart).max(initial=0)))

    def add_weights(self, theirs: Arrays, ours: Arrays, updates: Arrays, dtype: str) -> None:
        """One step's low-precision parameters: how many are equal, how many units apart the others are.

        Where a parameter and its update nearly cancel, the last bits of the update are many units of their sum.  So
        parameters that are as close as updates must be count as neighbours.
        """
        for a, b, update in zip(theirs, ours, updates, strict=True):
            apart = np.abs(_ordered(a, dtype) - _ordered(b, dtype))
            close = np.abs(a.astype(np.float64) - b.astype(np.float64)) <= UPDATE_BOUND * np.abs(update).max(initial=0)
            apart = np.where(close, np.minimum(apart, 1), apart)
            self.elements += apart.size
            self.elements_equal += int((apart == 0).sum())
            self.element_step = max(self.element_step, int(apart.max(initial=0)))


def compare(
    fields: dict[str, Any],
    *,
    steps: int,
    device: str = "cpu",
    dtype: str = "float32",
    ours: dict[str, Any] | None = None,
    edit: Callable[[Any], Any] = lambda state: state,
    shapes: tuple[tuple[int, ...], ...] = streams.SHAPES,
    layout: str = "torch",
    weights: Arrays | None = None,
) -> Comparison:
    """Runs the torch side and lets the JAX side take each step from the torch side's state.

    Args:
        fields: hyperparameters of both sides.
        steps: how many.
        device, dtype: of the torch side's parameters.
        ours: hyperparameters that differ on the JAX side, to show that a difference is noticed.
        edit: changes the JAX side's states before each step, to the same end.
        shapes: of the arrays.
        layout: of both sides.
        weights: where the parameters start; by default at random.
    """
    marks = streams.adapters(shapes)
    start = streams.weights(0, shapes) if weights is None else weights
    torch_side = TorchSide(start, fields, device, dtype, layout, marks)
    jax_side = JaxSide({**fields, **(ours or {})}, device, dtype, layout, marks)
    found = Comparison(grid=device == "cpu" and jax_side.config.block_wise)
    before = jax_side.init(torch_side.weights())
    for g in streams.gradients(1, steps, shapes):
        weights = torch_side.weights()
        step = jax_side.step(g, edit(before), weights)
        theirs = torch_side.step(g)
        saved = torch_side.state_dict()
        found.add(theirs, step.updates, saved["state"], step.state)
        group = saved["param_groups"][0]
        (scale,) = parts_of(step.state, ScaleByCameampState)
        for name in SEARCH_SCALARS:
            of_torch, floor = group[group_key(name)].numpy(), STATE_FLOORS.get(name, 0.0)
            found.state = max(found.state, distance(getattr(scale, name), of_torch, floor))
        for clipped in parts_of(step.state, ClipByPercentileState):
            found.state = max(
                found.state, distance(np.asarray(clipped.norm_history), group["automagic_norm_history"].numpy())
            )
            found.state = max(found.state, float(int(clipped.norm_position) != int(group["automagic_norm_position"])))
        if dtype != "float32":
            found.add_weights(torch_side.weights(), step.weights, theirs, dtype)
        before = jax_side.from_torch(saved, weights)
    return found


def suite(device: str, steps: int = 200, share: slice = EVERYTHING) -> Iterable[Check]:
    """The checks of the report, or a share of its runs."""
    for run in _runs()[share]:
        yield from run(device, steps)


def _runs() -> list[Callable[[str, int], Iterable[Check]]]:
    """One for each configuration that the suite compares."""
    formats: list[tuple[str, dict[str, Any]]] = [
        (f"factored {factored}", {"factored": factored}) for factored in ("none", "second_moment", "all")
    ]
    formats.append(("block_wise False", {"block_wise": False, "factored": "none"}))
    halves = [(dtype, stochastic) for dtype in ("bfloat16", "float16") for stochastic in (True, False)]
    return [
        *(partial(_eight_bits, kind, fields) for kind, fields in formats),
        _thirty_two_bits,
        *(partial(_half_precision, *half) for half in halves),
    ]


def _eight_bits(kind: str, fields: dict[str, Any], device: str, steps: int) -> Iterable[Check]:
    yield from _checks(SUITE, kind, compare({**BASE, **fields}, steps=steps, device=device))


def _thirty_two_bits(device: str, steps: int) -> Iterable[Check]:
    found = compare({**BASE, "optim_bits": 32}, steps=steps, device=device)
    yield Check(SUITE, "32-bit states: updates", found.update, UPDATE_BOUND)
    yield Check(SUITE, "32-bit states: states", found.state, UPDATE_BOUND)


def _half_precision(dtype: str, stochastic: bool, device: str, steps: int) -> Iterable[Check]:
    fields = {**BASE, "stochastic_rounding_params": stochastic}
    found = compare(fields, steps=steps, device=device, dtype=dtype)
    kind = f"{dtype} parameters, {'stochastic' if stochastic else 'nearest'}"
    yield from _checks(SUITE, kind, found)
    equal = found.elements_equal / found.elements
    yield Check(SUITE, f"{kind}: equal elements", equal, ELEMENT_BOUND, at_least=True)
    yield Check(SUITE, f"{kind}: units apart", found.element_step, 1)


def _checks(suite: str, kind: str, found: Comparison) -> Iterable[Check]:
    yield Check(suite, f"{kind}: updates", found.update, UPDATE_BOUND)
    yield Check(suite, f"{kind}: float32 states", found.state, UPDATE_BOUND)
    yield Check(suite, f"{kind}: equal codes", found.codes_equal / found.codes, CODE_BOUND, at_least=True)
    yield Check(suite, f"{kind}: codes apart", found.code_step, 1)


def _ordered(x: np.ndarray, dtype: str) -> np.ndarray:
    """Integers in the order of the values of a half-precision dtype, one apart where the values are neighbours."""
    if dtype == "float16":
        bits = x.astype(np.float16).view(np.int16).astype(np.int64)
    else:
        bits = (x.astype(np.float32).view(np.int32) >> 16).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)
