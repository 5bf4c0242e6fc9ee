"""Which arrays are decayed, left out, or given to another optimizer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from automagic_optax import automagic_8bit, finish_warmup, memory_report, scale_by_cameamp
from tests.optax_side.small import assert_same_bits, find_state, grads, params

pytestmark = pytest.mark.compiled_quickly
KERNEL_ONLY: dict[str, Any] = {"dense": {"kernel": True, "bias": False}, "table": False, "scale": False}
TABLE: dict[str, Any] = {"dense": {"kernel": False, "bias": False}, "table": True, "scale": False}
EVERY_MARK = {"lora": KERNEL_ONLY, "embedding": TABLE, "weight_decay_mask": KERNEL_ONLY}


def one_update(tx: Any, weights: Any = None) -> Any:
    weights = params() if weights is None else weights
    return tx.update(grads(), tx.init(weights), weights)[0]


def decayed(mask: Any) -> dict[str, bool]:
    """Which leaves a decay of 1 changes, beside none."""
    without = one_update(automagic_8bit(1e-4, weight_decay=0.0))
    with_decay = one_update(automagic_8bit(1e-4, weight_decay=1.0, weight_decay_mask=mask))
    return jax.tree.map(lambda a, b: bool((a != b).any()), with_decay, without)


MASKS = {
    "tree": KERNEL_ONLY,
    "prefix": {"dense": True, "table": False, "scale": False},
    "callable": lambda params: jax.tree.map(lambda w: w.ndim == 2, params),
    "callable prefix": lambda params: {name: name == "table" for name in params},
    "none": None,
    "one boolean": False,
}


@pytest.mark.parametrize("name", MASKS)
def test_weight_decay_mask_is_that_of_add_decayed_weights(name: str) -> None:
    mask = MASKS[name]
    theirs = optax.add_decayed_weights(1.0, mask)
    weights = params()
    zeros = jax.tree.map(jnp.zeros_like, weights)
    expected = jax.tree.map(lambda u: bool(u.any()), theirs.update(zeros, theirs.init(weights), weights)[0])
    assert decayed(mask) == expected


@pytest.mark.parametrize("name", ["weight_decay_mask", "embedding"])
def test_a_mark_that_is_missing_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} has no mark for dense\.bias"):
        one_update(automagic_8bit(1e-4, **{name: {"dense": {"kernel": True}, "table": True, "scale": False}}))


def test_marks_as_trees_and_as_predicates() -> None:
    def is_table(path: tuple, leaf: Any) -> bool:
        return "table" in jax.tree_util.keystr(path)

    tree, predicate = (find_state(automagic_8bit(1e-4, embedding=m).init(params())) for m in (TABLE, is_table))
    assert tree.walk["table"].shape == predicate.walk["table"].shape == (9, 1)
    unmarked = find_state(automagic_8bit(1e-4).init(params()))
    assert unmarked.walk["table"].shape == (1, 5)
    assert find_state(automagic_8bit(1e-4, layout="torch").init(params())).walk["table"].shape == (9, 1)


def test_masked() -> None:
    chosen = {"dense": {"kernel": True, "bias": False}, "table": True, "scale": False}
    tx = optax.masked(automagic_8bit(1e-4, weight_decay=0.1, **EVERY_MARK), chosen)
    weights = params()
    state = tx.init(weights)
    assert memory_report(state)["total_parameters"] == 4096 + 45
    for t in range(3):
        updates, state = tx.update(grads(t), state, weights)
        assert_same_bits(updates["dense"]["bias"], grads(t)["dense"]["bias"])  # optax.masked lets them through
        weights = optax.apply_updates(weights, updates)

    alone = automagic_8bit(1e-4, weight_decay=0.1, **{name: part(mark) for name, mark in EVERY_MARK.items()})
    subset = part(params())
    subset_state = alone.init(subset)
    for t in range(3):
        updates, subset_state = alone.update(part(grads(t)), subset_state, subset)
        subset = optax.apply_updates(subset, updates)
    assert_same_bits(part(weights), subset)
    finished = finish_warmup(state)
    assert find_state(finished).walk is None


def part(tree: Any) -> Any:
    return {"dense": {"kernel": tree["dense"]["kernel"]}, "table": tree["table"]}


@pytest.mark.parametrize("partition", [optax.partition, optax.multi_transform])
def test_partition_with_frozen_leaves(partition: Any) -> None:
    labels = {"dense": {"kernel": "train", "bias": "frozen"}, "table": "train", "scale": "frozen"}
    inner = automagic_8bit(1e-4, weight_decay=0.1, **EVERY_MARK)
    tx = partition({"train": inner, "frozen": optax.set_to_zero()}, labels)
    weights = params()
    state = tx.init(weights)
    for t in range(3):
        updates, state = tx.update(grads(t), state, weights)
        weights = optax.apply_updates(weights, updates)
    for frozen, first in ((weights["scale"], params()["scale"]), (weights["dense"]["bias"], params()["dense"]["bias"])):
        assert_same_bits(frozen, first)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), part(weights), part(params()))))
    assert memory_report(state)["total_parameters"] == 4096 + 45
    assert find_state(state).walk["table"].shape == (9, 1)  # known to be an embedding
    finished = finish_warmup(state)
    later = [tx.update(grads(9), s, weights)[0] for s in (state, finished)]
    assert_same_bits(part(later[0]), part(later[1]))


def test_two_of_them_beside_each_other() -> None:
    labels = {"dense": {"kernel": "a", "bias": "b"}, "table": "b", "scale": "b"}
    tx = optax.partition({"a": automagic_8bit(1e-4), "b": automagic_8bit(1e-5)}, labels)
    state = tx.init(params())
    assert memory_report(state)["total_parameters"] == 4096 + 7 + 45 + 1
    updates, _ = tx.update(grads(), state, params())
    assert all(np.asarray(u).any() for u in jax.tree.leaves(updates))
    with pytest.raises(ValueError, match="ScaleByCameampState"):
        memory_report(optax.adam(1e-3).init(params()))
    with pytest.raises(ValueError, match="ScaleByCameampState"):
        finish_warmup(optax.adam(1e-3).init(params()))


def test_in_a_chain_behind_other_transformations() -> None:
    tx = optax.chain(optax.clip_by_global_norm(0.1), scale_by_cameamp(1e-4, weight_decay=0.1))
    state = tx.init(params())
    updates, state = tx.update(grads(), state, params())
    assert int(find_state(state).step) == 1
    assert all(np.asarray(u).any() for u in jax.tree.leaves(updates))
