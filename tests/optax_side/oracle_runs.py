"""Runs with 32-bit states, recorded step by step, to be held against the float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import Config
from automagic_optax import RowColumn, SuppressEdgesState, automagic_8bit, finish_warmup, scale_by_cameamp
from automagic_optax.cameamp.states import WARM_UP_ONLY, ArrayState, Search, scatter_states
from tests.optax_side.small import find_state
from tests.oracle.cameamp import CameampOracle
from tests.oracle.settings import STAGES_OFF

# In PyTorch's order (out, in, *spatial); the seventh one is marked as an embedding, those that follow as adapters.  The
# third is not narrow, the fourth has few rows, the seventh few columns.
SHAPES: list[tuple[int, ...]] = [(), (5,), (66, 67), (4, 3, 23), (4, 3, 3, 3), (2, 3, 3, 2, 2), (70, 40)]
SHAPES += [(6, 8), (7, 3), (6, 8)]
EMBEDDING = [i == 6 for i in range(len(SHAPES))]
LORA = [i > 6 for i in range(len(SHAPES))]
DECAYED = [i not in (1, 4) for i in range(len(SHAPES))]
WITHOUT_ADAPTERS = range(7)
# Arrays that the stages tell apart, two of them in one batch.
WHOLE = [1, 2, 4, 6, 7, 8, 9]
STEPS = 50
WARMUP = 20
TURNS = (7, 14)


def schedule(count: Any) -> Any:
    """A learning rate for numpy and JAX alike."""
    return 1e-4 * (1 - count / 100)


# Everything of section 5 on, with other than default constants; max_lr limits some rows' rates.
EVERYTHING: dict[str, Any] = {
    "optim_bits": 32,
    "lr": schedule,
    "min_lr": 1e-6,
    "max_lr": 2e-4,
    "weight_decay": 0.3,
    "warmup_steps": WARMUP,
    "betas": (0.85, 0.95, 0.99),
    "update_clip": 1.5,
    "confidence_floor": 0.02,
    "torque_decay": 0.6,
    "search_gain": 0.5,
    "straightness": 0.9,
    "agreement_floor": -0.3,
    "lr_mask_gain": 0.2,
    **STAGES_OFF,
}


class Step(NamedTuple):
    """What went into one step and what came out."""

    grads: list[Any]
    params: list[np.ndarray]
    updates: list[Any]
    search: Search
    states: list[dict[str, Any]]


class Run(NamedTuple):
    """A recorded run and what the oracle needs to repeat it."""

    steps: list[Step]
    oracle: Callable[..., CameampOracle]


def to_flax(x: np.ndarray, embedding: bool = False) -> np.ndarray:
    """(out, in, *spatial) → (*spatial, in, out); embeddings and arrays of fewer than two axes stay."""
    return x if x.ndim < 2 or embedding else x.transpose(*range(2, x.ndim), 1, 0)


def gradients(shapes: Sequence[tuple[int, ...]], seed: int, steps: int, absent: bool, bad: bool) -> list[list[Any]]:
    """Gradients of every step, in PyTorch's order of axes.

    The relative error of one number has no bound where it crosses zero.  So the gradients of arrays of up to five
    elements drift, which keeps their momentum away from zero, and alternate about the drift, which does the same for
    the residual u − m̂.  The first element begins long: alone and only growing it would have u = ±1 and no residual.
    Larger arrays have elements that turn round (votes disagree), zeros, now and then far larger gradients (which meet
    the clip), and for some steps a row without any gradient.  At `TURNS` they point the
    other way, which ends the climb for a while.
    """
    rng = np.random.default_rng(seed)
    drifts = [rng.choice([-1.0, 1.0], shape) * rng.uniform(0.7, 1.5, shape) for shape in shapes]
    every = []
    for t in range(1, steps + 1):
        grads: list[Any] = []
        for shape, drift in zip(shapes, drifts, strict=True):
            if drift.size <= 5:
                alternating = np.sign(drift.flat[0]) * (-1) ** t * rng.uniform(0.3, 0.5, shape)
                grads.append(np.asarray(drift - alternating, np.float32))
                continue
            turn = np.where(rng.random(shape) < 0.3, -1.0, 1.0)
            noise = 0.7 * rng.standard_normal(shape) * (5 if t % 11 == 0 else 1)
            g = np.asarray((drift * turn + noise) * (-1 if t in TURNS else 1), np.float32)
            g[rng.random(shape) < 0.05] = 0
            if 5 <= t <= 9:
                g[1] = 0
            grads.append(g)
        last = len(shapes) - 1
        if absent and t in (1, 2, 14, 33):
            grads[t % len(shapes)] = None
        if bad and t in (3, 15, 16, 40):
            g = grads[last - t % 3]
            g[(0,) * g.ndim] = {3: np.nan, 15: np.inf, 16: -np.inf, 40: 3e15}[t]
        every.append(grads)
    return every


def run(
    fields: Mapping[str, Any],
    layout: str,
    *,
    arrays: Sequence[int] | None = None,
    whole: bool = False,
    jit: bool = False,
    absent: bool = True,
    bad: bool = True,
    seed: int = 0,
    steps: int = STEPS,
) -> Run:
    """Runs some steps.

    Args:
        fields: of the configuration.
        layout: also of the arrays.
        arrays: which of `SHAPES`.
        whole: with the stages of section 4, as `automagic_8bit`.
        jit: the update is compiled.
        absent, bad: whether there are steps without a gradient and with one that is not finite.
        seed: of weights and gradients.
        steps: how many.
    """
    chosen = list(WITHOUT_ADAPTERS if arrays is None else arrays)
    embedding, decayed, lora = ([marks[i] for i in chosen] for marks in (EMBEDDING, DECAYED, LORA))
    turn = to_flax if layout == "flax" else lambda x, embedding: x
    rng = np.random.default_rng(seed + 1)
    weights = [turn(rng.standard_normal(SHAPES[i]).astype(np.float32), EMBEDDING[i]) for i in chosen]
    config = Config(**fields)
    marks: dict[str, Any] = {"layout": layout, "embedding": embedding, "lora": lora, "weight_decay_mask": decayed}
    if whole:
        tx = automagic_8bit(fields["lr"], **marks, **{name: x for name, x in fields.items() if name != "lr"})
    else:
        tx = scale_by_cameamp(config=config, **marks)
    update = jax.jit(tx.update) if jit else tx.update
    params = [jnp.asarray(w) for w in weights]
    state = tx.init(params)
    records = []
    for t, grads in enumerate(gradients([SHAPES[i] for i in chosen], seed, steps, absent, bad), start=1):
        grads = [None if g is None else turn(g, mark) for g, mark in zip(grads, embedding, strict=True)]
        updates, state = update([None if g is None else jnp.asarray(g) for g in grads], state, params)
        if t == config.warmup_steps and not jit:
            # The oracle drops them at the next step, for every array.
            recorded = _record(params, state, warming=True)
            state = finish_warmup(state)
        else:
            recorded = _record(params, state, warming=t <= config.warmup_steps)
        values = [None if u is None else np.asarray(u) for u in updates]
        search = Search(*map(np.asarray, Search.of(find_state(state))))
        records.append(Step(grads, [np.asarray(w) for w in params], values, search, recorded))
        params = [w if u is None else w + u for w, u in zip(params, updates, strict=True)]

    def oracle(**changes: Any) -> CameampOracle:
        arguments = {"layout": layout, "embedding": embedding, "decay_mask": decayed, "lora": lora, **fields, **changes}
        return CameampOracle([w.shape for w in weights], **arguments)

    return Run(records, oracle)


def _record(params: Any, state: Any, warming: bool) -> list[dict[str, Any]]:
    arrays = scatter_states(params, find_state(state))
    found = [_plain(array, w.shape, warming) for array, w in zip(arrays, params, strict=True)]
    for stage in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SuppressEdgesState)):
        if isinstance(stage, SuppressEdgesState):
            for of_array, history in zip(found, stage.edge_history, strict=True):
                of_array.update({} if history is None else {"edge_history": np.asarray(history)})
    return found


def _plain(array: ArrayState, shape: tuple[int, ...], warming: bool) -> dict[str, Any]:
    """The states in the oracle's form."""
    found = {}
    for name, value in array._asdict().items():
        if isinstance(value, RowColumn):
            found[name] = tuple(None if x is None else np.asarray(x) for x in value)
        else:
            found[name] = None if value is None else np.asarray(value)
    if not warming:
        found |= dict.fromkeys(WARM_UP_ONLY)
    return found


def relative(ours: Any, theirs: Any) -> float:
    """‖a − b‖ / ‖b‖; below 1e-20 lie only the float64 oracle's own roundings of exact zeros."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape or not np.all(np.isfinite(a)):
        return math.inf
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-20))


def is_noticed(recorded: Run, bound: float, **changes: Any) -> bool:
    """Whether the update of some step is further off than the bound where the oracle differs."""
    oracle = recorded.oracle(**changes)
    for step in recorded.steps:
        updates = oracle.step_(step.grads, step.params)
        for g, ours, theirs in zip(step.grads, step.updates, updates, strict=True):
            if relative(np.zeros_like(theirs) if g is None and ours is None else ours, theirs) > bound:
                return True
    return False


def worst_errors(recorded: Run, **changes: Any) -> dict[str, float]:
    """The largest relative error over all steps and arrays, for the update and for every state by its name."""
    oracle = recorded.oracle(**changes)
    worst: dict[str, float] = {}

    def note(name: str, ours: Any, theirs: Any) -> None:
        if isinstance(ours, tuple) and isinstance(theirs, tuple):
            for a, b in zip(ours, theirs, strict=True):
                note(name, a, b)
        elif ours is None or theirs is None:
            # A feature that is off may have no state on one side; without `changes` both must agree.
            assert changes or (ours is None and theirs is None), name
        else:
            worst[name] = max(worst.get(name, 0.0), relative(ours, theirs))

    for step in recorded.steps:
        updates = oracle.step_(step.grads, step.params)
        for g, ours, theirs in zip(step.grads, step.updates, updates, strict=True):
            note("update", np.zeros_like(theirs) if g is None and ours is None else ours, theirs)
        for name, ours in step.search._asdict().items():
            # A logarithm crosses zero, where its relative error has no bound, as does an average of votes.
            linear: Callable[[Any], Any] = np.exp if name in ("log_rate_scale", "agreement") else np.asarray
            note(name, linear(ours), linear(getattr(oracle, name)))
        for ours, theirs in zip(step.states, oracle.state, strict=True):
            assert changes or set(ours) == set(theirs)
            for name in set(ours) & set(theirs):
                note(name, ours[name], theirs[name])
    return worst
