"""States saved before or after `finish_warmup` load into a fresh optimizer, from every form of file."""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from automagic_core import Config
from automagic_optax import (
    QuantizedArray,
    automagic_8bit,
    finish_warmup,
    load_either_form,
    quantize_state,
    restore,
    scale_by_cameamp,
)
from tests.optax_side.small import assert_same_bits, find_state

ocp = pytest.importorskip("orbax.checkpoint")

pytestmark = pytest.mark.compiled_quickly
TX = optax.chain(
    optax.clip_by_global_norm(1.0),
    automagic_8bit(1e-3, frequency_penalty=0.0, warmup_steps=2, torque_decay=0.9, min_8bit_size=64),
)
UPDATE = jax.jit(TX.update)
PARAMS = {"kernel": jnp.ones((4, 64)), "bias": jnp.ones(4)}


@functools.cache
def trained(form: str) -> Any:
    if form == "finished":
        return finish_warmup(trained("whole"))
    state = TX.init(PARAMS)
    for _ in range(3):
        _, state = UPDATE(PARAMS, state, PARAMS)
    return state


FORMS = ("whole", "finished")


def with_pickle(state: Any, folder: Path) -> Any:
    return pickle.loads(pickle.dumps(state))


def with_msgpack(state: Any, folder: Path) -> Any:
    return flax.serialization.from_bytes(TX.init(PARAMS), flax.serialization.to_bytes(state))


def with_train_state(state: Any, folder: Path) -> Any:
    fresh = TrainState.create(apply_fn=None, params=PARAMS, tx=TX)
    saved = flax.serialization.to_state_dict(fresh.replace(opt_state=state))
    return flax.serialization.from_state_dict(fresh, saved).opt_state


def with_orbax(state: Any, folder: Path) -> Any:
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder / "state", state)
    return restore(folder / "state", TX, PARAMS)


def with_orbax_alone(state: Any, folder: Path) -> Any:
    """A whole run in one checkpoint, which `restore` does not read."""
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder / "run", {"params": PARAMS, "opt_state": state})
        saver.wait_until_finished()
        fresh = {"params": PARAMS, "opt_state": TX.init(PARAMS)}
        loaded: Any = load_either_form(lambda like: saver.restore(folder / "run", like), fresh)
    return loaded["opt_state"]


def with_leaves_in_order(state: Any, folder: Path) -> Any:
    """What ``eqx.tree_serialise_leaves`` does: one leaf after the other, without names."""
    file = io.BytesIO()
    for leaf in jax.tree.leaves((state, PARAMS)):
        np.save(file, leaf)

    def load(like: Any) -> Any:
        file.seek(0)

        def one(x: Any) -> Any:
            found = np.load(file)
            if (found.shape, found.dtype) != (x.shape, x.dtype):
                raise RuntimeError("another shape")
            return jnp.asarray(found)

        return jax.tree.map(one, like)

    loaded: Any = load_either_form(load, (TX.init(PARAMS), PARAMS))
    return loaded[0]


WAYS: list[Callable[[Any, Path], Any]] = [
    *[with_pickle, with_msgpack, with_train_state, with_orbax, with_orbax_alone, with_leaves_in_order]
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_into_a_fresh_optimizer(way: Callable[[Any, Path], Any], form: str, tmp_path: Path) -> None:
    loaded = way(trained(form), tmp_path)
    assert_same_bits(loaded, trained(form))
    # Arrays of Orbax are bound to a device, for which every program would be compiled again.
    free = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), loaded)
    updates, after = UPDATE(PARAMS, free, PARAMS)
    assert_same_bits((updates, finish_warmup(after)), next_step())
    assert jax.tree.structure(after) == jax.tree.structure(loaded)


@functools.cache
def next_step() -> Any:
    return UPDATE(PARAMS, trained("finished"), PARAMS)


def test_equinox(tmp_path: Path) -> None:
    eqx = pytest.importorskip("equinox")
    for form in FORMS:
        state = trained(form)
        assert all(eqx.is_array_like(x) for x in jax.tree.leaves(state))
        eqx.tree_serialise_leaves(tmp_path / form, (PARAMS, state))
        fresh = (PARAMS, TX.init(PARAMS))
        _, loaded = load_either_form(lambda like: eqx.tree_deserialise_leaves(tmp_path / form, like), fresh)  # noqa: B023
        assert_same_bits(loaded, state)


@pytest.mark.parametrize(
    ("form", "pure"),
    [
        ("finished", True),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("whole", True), ("finished", False), ("whole", False))
        ),
    ],
)
def test_a_state_of_nnx(form: str, pure: bool, tmp_path: Path) -> None:
    def made() -> tuple[nnx.Linear, nnx.Optimizer]:
        model = nnx.Linear(4, 64, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, TX, wrt=nnx.Param)

    def saved(optimizer: nnx.Optimizer) -> Any:
        return nnx.to_pure_dict(nnx.state(optimizer)) if pure else nnx.state(optimizer)

    @nnx.jit
    def update(model: nnx.Linear, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model)))

    def step(model: nnx.Linear, optimizer: nnx.Optimizer) -> Any:
        update(model, optimizer)
        return nnx.to_pure_dict(nnx.state(model))

    model, optimizer = made()
    for _ in range(3):
        step(model, optimizer)
    if form == "finished":
        optimizer.opt_state = finish_warmup(optimizer.opt_state)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "optimizer", saved(optimizer))
        saver.wait_until_finished()
        _, fresh = made()
        loaded: Any = load_either_form(lambda like: saver.restore(tmp_path / "optimizer", like), saved(fresh))
    assert_same_bits(loaded, saved(optimizer))
    if pure:
        template = nnx.state(fresh)
        nnx.replace_by_pure_dict(template, loaded)
        loaded = template
    nnx.update(fresh, loaded)
    copy = nnx.clone(model)
    assert_same_bits(step(copy, fresh), step(model, optimizer))


def test_a_file_that_fits_neither_form() -> None:
    def load(like: Any) -> Any:
        raise RuntimeError("the disk is gone")

    with pytest.raises(ValueError, match="finish_warmup drops; without it: the disk is gone"):
        load_either_form(load, TX.init(PARAMS))
    with pytest.raises(RuntimeError, match="the disk is gone"):
        load_either_form(load, optax.adam(1e-3).init(PARAMS))


def test_flax_with_a_target_of_another_form() -> None:
    whole = flax.serialization.to_state_dict(trained("whole"))
    assert_same_bits(flax.serialization.from_state_dict(finish_warmup(TX.init(PARAMS)), whole), trained("finished"))
    # A version with fewer fields saved a file without them.
    del whole["1"]["3"]["skipped_steps"]
    assert_same_bits(flax.serialization.from_state_dict(TX.init(PARAMS), whole), trained("whole"))
    whole["1"]["3"]["of a later version"] = 0
    with pytest.raises(ValueError, match="of a later version"):
        flax.serialization.from_state_dict(TX.init(PARAMS), whole)
    saved = flax.serialization.to_state_dict(find_state(trained("whole")))
    found = flax.serialization.from_state_dict(
        scale_by_cameamp(1e-3, config=Config(min_8bit_size=64)).init(PARAMS), saved
    )
    assert found.s is None
    assert_same_bits(found.exp_avg, find_state(trained("whole")).exp_avg)
    with pytest.raises(ValueError, match="saved in 8 bits that have 32 bits here"):
        flax.serialization.from_state_dict(scale_by_cameamp(1e-3).init(PARAMS), saved)


@pytest.mark.parametrize("tx", [TX, quantize_state(optax.adam(1e-3), min_8bit_size=64)])
def test_flax_reads_boxes_as_version_0_1_0_saved_them(tx: Any) -> None:
    """It had a box around every state of a boxed parameter: around the whole `QuantizedArray`, and around scalars."""
    boxed = {"kernel": nn.Partitioned(PARAMS["kernel"], ("data", None)), "bias": PARAMS["bias"]}
    _, state = jax.jit(tx.update)(boxed, tx.init(boxed), boxed)

    def boxed_as_then(tree: Any) -> Any:
        if isinstance(tree, QuantizedArray):
            return {"value": {"codes": getattr(tree.codes, "value", tree.codes), "absmax": tree.absmax}}
        state_dict = flax.serialization.to_state_dict(tree)
        return state_dict if isinstance(state_dict, dict) else {"value": state_dict}

    def is_state_of_one(x: Any) -> bool:
        return isinstance(x, (QuantizedArray, nn.Partitioned))

    def at_kernel(path: Any, x: Any) -> Any:
        return boxed_as_then(x) if jax.tree_util.DictKey("kernel") in path else x

    old = jax.tree_util.tree_map_with_path(at_kernel, state, is_leaf=is_state_of_one)
    found = flax.serialization.from_state_dict(tx.init(boxed), flax.serialization.to_state_dict(old))
    assert_same_bits(found, state)
    again = flax.serialization.from_state_dict(tx.init(boxed), flax.serialization.to_state_dict(state))
    assert_same_bits(again, state)
