"""Neutral groups filled with random states, without a framework."""

import numpy as np

from automagic_core import FIELD_NAMES, Config, state_plan
from automagic_core.arrays.state_forms import SEARCH_SCALARS, state_forms
from automagic_core.moving.neutral import NeutralArray, NeutralGroup

FIELDS = {"min_8bit_size": 64, "block_size": 64, "warmup_steps": 10, "torque_decay": 0.5, "lr_mask_gain": 0.2}


def random_states(plan, warming, rng):
    """Any bits that a run could have left: codes, non-negative scales and statistics."""
    states = {}
    for name, form in state_forms(plan, warming).items():
        if form.dtype == "float32":
            value = rng.standard_normal(form.shape).astype(np.float32)
            signed = name in ("exp_avg", "s", "lr_mask", "walk")
            states[name] = np.asarray(value if signed else np.abs(value), np.float32)
        else:
            states[name] = np.asarray(rng.integers(0, 256 if form.dtype == "uint8" else 9, form.shape), form.dtype)
    return states


def random_group(shapes, layout="torch", step=4, seed=0, embeddings=(), **fields):
    """A group whose arrays are called as in `shapes`."""
    rng = np.random.default_rng(seed)
    config = Config(**(FIELDS | fields))
    arrays = []
    for name, shape in shapes.items():
        plan = state_plan(shape, config, layout, embedding=name in embeddings)
        states = random_states(plan, step < config.warmup_steps, rng)
        arrays.append(NeutralArray(name, shape, name in embeddings, name.startswith("lora"), states))
    shared = {name: np.asarray(0.25, np.float32) for name in SEARCH_SCALARS}
    if config.clips_by_percentile:
        shared["norm_history"] = rng.random(100).astype(np.float32)
        shared["norm_position"] = np.asarray(7, np.int32)
    values = {name: getattr(config, name) for name in FIELD_NAMES}
    return NeutralGroup(values, layout, step, shared, tuple(arrays), True, {"initial_lr": 1e-4})


def assert_same_states(ours, theirs):
    """Bit for bit, shapes and dtypes included."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype), name
        assert ours[name].tobytes() == value.tobytes(), name
