"""Counters close to 2³¹ − 1 and beyond: they saturate, and random bits are those of the page up to the last step.

Both frameworks take the same steps.  Blocks are whole arrays, because there PyTorch's codec is exact on a CPU too, so
that every code can be held against the page's rule bit for bit.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import torch

from automagic_core import MAX_STEP, Slot
from automagic_core.arrays.state_forms import WARM_UP_ONLY
from automagic_optax import ClipByPercentileState, RoundToParametersState, ScaleByCameampState, SuppressEdgesState
from automagic_optax import random_unit as jax_random_unit
from automagic_torch.codec.quantized_tensor import QuantizedTensor
from parity.sides import JaxSide, TorchSide
from tests.oracle.codec import quantize_stochastic, random_unit, round_stochastic_to

BEFORE, AFTER = 4, 3
"""Steps taken up to 2³¹ − 1, and further ones."""
FIRST_STEPS = 5
"""Ordinary steps before the counters are set forward, so that no state is empty."""
SHAPES = ((24, 20), (16, 16), (13,))
EQUAL_CODES = 0.999
"""The share of codes that both frameworks must have in common; the bound of the parity suite is 0.9999 of larger
arrays, and here one code is 1/480 of an array, so one code of the 1,200 may differ."""

FIELDS: dict[str, Any] = {
    "lr": 1e-3,
    "max_lr": 1e-2,
    "torque_decay": 0.9,
    "factored": "none",
    "block_wise": False,
    "min_8bit_size": 1,
    "percentile_clipping": 80,
    "force_8bit": True,
    "lora_rank_penalty": False,
}
_SIGNED = (Slot.exp_avg, Slot.s)


def run(warmup_steps: int, dtype: str) -> dict[str, Any]:
    """The record of one crossing.

    Args:
        warmup_steps: 2³¹ − 2 for a warm-up that ends with the count, or a small number.
        dtype: of the parameters, ``"bfloat16"`` or ``"float16"``, so that they are rounded with random bits too.
    """
    begin = time.perf_counter()
    failures: list[str] = []
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
    fields = {**FIELDS, "warmup_steps": warmup_steps}
    theirs, ours = TorchSide(weights, fields, "cpu", dtype), JaxSide(fields, "cpu", dtype)
    for _ in range(FIRST_STEPS):
        theirs.step(_gradients(rng, weights))
    _set_forward(theirs, MAX_STEP - BEFORE)

    state, counted = ours.from_torch(theirs.state_dict(), theirs.weights()), {"codes": 0, "equal": 0, "rounded": 0}
    least_equal = 1.0
    for i in range(1, BEFORE + AFTER + 1):
        t = min(MAX_STEP - BEFORE + i, MAX_STEP)
        gradients = _gradients(rng, weights)
        before = theirs.weights()
        jax_step = ours.step(gradients, state, before)
        with _written() as written:
            updates = theirs.step(gradients)
        failures += _counter_failures(theirs, jax_step.state, t)
        failures += [f"step {t}: {text}" for text in _bit_failures(written, t, counted)]
        for side, updated, after in (
            ("PyTorch", updates, theirs.weights()),
            ("JAX", jax_step.updates, jax_step.weights),
        ):
            for w, update, new in zip(before, updated, after, strict=True):
                expected = np.asarray(round_stochastic_to(w + update, dtype, t), np.float32)
                counted["rounded"] += new.size
                if not np.array_equal(expected, new):
                    failures.append(f"step {t}: {side} rounds {int((expected != new).sum())} parameters otherwise")
        converted = ours.from_torch(theirs.state_dict(), theirs.weights())
        least_equal = min(least_equal, _equal_codes(converted, jax_step.state))
        state = converted
    if least_equal < EQUAL_CODES:
        failures.append(f"only {least_equal:.4%} of the codes are equal in both frameworks")
    failures += _skip_failures(theirs, ours)
    failures += _unit_failures()
    return {
        "steps": BEFORE + AFTER,
        "seconds": time.perf_counter() - begin,
        "codes": counted["codes"],
        "rounded": counted["rounded"],
        "least_equal": least_equal,
        "failures": failures,
    }


def _gradients(rng: np.random.Generator, weights: list[np.ndarray]) -> list[np.ndarray]:
    return [(0.3 + rng.standard_normal(w.shape)).astype(np.float32) for w in weights]


def _set_forward(side: TorchSide, steps: int) -> None:
    """The optimizer as if it had taken `steps` steps and had skipped as many."""
    saved = copy.deepcopy(side.optimizer.state_dict())
    saved["param_groups"][0]["automagic_step"] = steps
    warming = steps < saved["param_groups"][0]["automagic_warmup_steps"]
    for state in saved["state"].values():
        state["age"].fill_(steps)
        state["skipped_steps"].fill_(steps)
        if not warming:
            for name in WARM_UP_ONLY:
                state.pop(name, None)
    side.optimizer.load_state_dict(saved)


def _counter_failures(side: TorchSide, state: Any, t: int) -> Iterator[str]:
    """Every counter that does not stand at t."""
    found = {"PyTorch step": [side.optimizer.param_groups[0]["automagic_step"]]}
    found["PyTorch age"] = [int(side.optimizer.state[p]["age"]) for p in side.params]
    for part in state:
        if isinstance(part, ScaleByCameampState):
            found |= {"JAX step": [int(part.step)], "JAX age": [int(x) for x in part.age]}
        elif isinstance(part, SuppressEdgesState):
            # An array without a history has no use for its age.
            pairs = zip(part.age, part.edge_history, strict=True)
            found["JAX age in stage 2"] = [int(age) for age, history in pairs if history is not None]
        elif isinstance(part, RoundToParametersState):
            found["JAX step of the rounding"] = [int(part.step)]
        elif isinstance(part, ClipByPercentileState):
            found["JAX norm is finite"] = [t if all(map(math.isfinite, _floats(part))) else -1]
    for name, values in found.items():
        if values != [t] * len(values):
            yield f"step {t}: {name} is {values}"


def _skip_failures(theirs: TorchSide, ours: JaxSide) -> Iterator[str]:
    """Gradients that are not finite, at the last step there is: the counts of skipped steps saturate too."""
    before = theirs.weights()
    state = ours.from_torch(theirs.state_dict(), before)
    bad = [np.full(w.shape, np.nan, np.float32) for w in before]
    for _ in range(BEFORE + 1):
        jax_step = ours.step(bad, state, before)
        state = jax_step.state
        theirs.step(bad)
    (found,) = [part for part in state if isinstance(part, ScaleByCameampState)]
    counts = {
        "PyTorch": [int(theirs.optimizer.state[p]["skipped_steps"]) for p in theirs.params],
        "JAX": [int(x) for x in found.skipped_steps],
    }
    for name, values in counts.items():
        if values != [MAX_STEP] * len(values):
            yield f"{name} counts {values} skipped steps instead of {MAX_STEP}"
    for name, after in (("PyTorch", theirs.weights()), ("JAX", jax_step.weights)):
        if not all(np.array_equal(a, b) for a, b in zip(after, before, strict=True)):
            yield f"{name} moved a parameter whose gradient is not finite"


def _floats(state: ClipByPercentileState) -> list[float]:
    return [float(x) for part in state for x in np.asarray(part, np.float64).reshape(-1)]


@contextmanager
def _written() -> Iterator[list[tuple[np.ndarray, bool, QuantizedTensor]]]:
    """Everything that PyTorch's codec is given meanwhile, in stacks of arrays, and what it makes of it."""
    calls = []
    original = QuantizedTensor.write.__func__  # type: ignore[attr-defined]

    def write(cls: Any, x: torch.Tensor, companded: bool, *rest: Any, **named: Any) -> QuantizedTensor:
        stored: QuantizedTensor = original(cls, x, companded, *rest, **named)
        calls.append((x.numpy().copy(), companded, stored))
        return stored

    with mock.patch.object(QuantizedTensor, "write", classmethod(write)):
        yield calls


def _bit_failures(
    written: list[tuple[np.ndarray, bool, QuantizedTensor]], t: int, counted: dict[str, int]
) -> Iterator[str]:
    """Codes that are not the page's for step t and any slot of that kind; each slot must be found once per array."""
    seen: list[tuple[tuple[int, ...], Slot]] = []
    for x, companded, stored in written:
        values = np.sqrt(x[0]) if companded else x[0]
        codes = stored.codes[0].numpy()
        slots = [slot for slot in list(Slot)[:4] if (slot in _SIGNED) != companded]
        matches = [s for s in slots if np.array_equal(quantize_stochastic(values, not companded, None, t, s)[0], codes)]
        counted["codes"] += codes.size
        if len(matches) != 1:
            yield f"the codes of an array of shape {x[0].shape} are those of {len(matches)} slots instead of one"
        seen += [(x[0].shape, slot) for slot in matches]
    if not written or len(set(seen)) != len(written):
        yield f"{len(written)} states were stored with {len(set(seen))} different slots and shapes"


def _equal_codes(one: Any, other: Any) -> float:
    """The share of equal codes over all 8-bit states of two JAX states."""
    (a,), (b,) = ([part for part in state if isinstance(part, ScaleByCameampState)] for state in (one, other))
    equal: list[np.ndarray] = []
    for name in ("exp_avg", "exp_avg_sq", "exp_avg_res", "s"):
        # In JAX `s` stays in the state after the warm-up until `finish_warmup` is called.
        if getattr(a, name) is not None and getattr(b, name) is not None:
            pairs = zip(getattr(a, name), getattr(b, name), strict=True)
            equal += [(np.asarray(x.codes) == np.asarray(y.codes)).reshape(-1) for x, y in pairs]
    return float(np.concatenate(equal).mean())


def _unit_failures() -> Iterator[str]:
    """JAX's random numbers themselves, at the last steps there are, with the counter in its own int32."""
    for t in (1, MAX_STEP - 1, MAX_STEP):
        for slot in Slot:
            ours = np.asarray(jax_random_unit(jnp.asarray(t, jnp.int32), slot, (5, 77)))
            if not np.array_equal(ours.reshape(-1), random_unit(t, int(slot), 5 * 77)):
                yield f"JAX's random numbers of slot {slot.name} at step {t} are not the page's"
