"""The gradient stages in anyone's chain and under optax's wrappers, in every precision."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from automagic_optax import (
    automagic_8bit,
    clip_by_percentile,
    encourage_low_rank,
    suppress_edges,
    suppress_high_frequencies,
)
from tests.optax_side.small import assert_nearly_same, assert_same_bits

pytestmark = pytest.mark.compiled_quickly
SHAPE = (6, 5)


def tree(seed: int, dtype: str = "float32") -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(SHAPE), dtype) for name in ("down", "up", "other")}


def adapters(path: tuple, leaf: Any) -> bool:
    return path[-1].key != "other"


STAGES = {
    "clip": clip_by_percentile(50),
    "edges": suppress_edges(0.1),
    "frequencies": suppress_high_frequencies(0.5),
    "low_rank": encourage_low_rank(0.1, lora=adapters),
}
ALL = optax.chain(*STAGES.values())


def follow(tx: Any, steps: int = 3, dtype: str = "float32") -> tuple[Any, Any]:
    """The last update and state, operation by operation."""
    params, state = tree(100, dtype), tx.init(tree(100, dtype))
    for t in range(steps):
        updates, state = tx.update(tree(t, dtype), state, params)
    return updates, state


def test_before_an_optimizer_of_someone_else() -> None:
    adam = optax.adam(1e-3)
    ours, _ = follow(optax.chain(suppress_edges(0.1), adam))
    stage, params = suppress_edges(0.1), tree(100)
    state, adams = stage.init(params), adam.init(params)
    for t in range(3):
        smoothed, state = stage.update(tree(t), state)
        expected, adams = adam.update(smoothed, adams)
    assert_same_bits(ours, expected)
    assert all(np.asarray(a != b).any() for a, b in zip(smoothed.values(), tree(2).values(), strict=True))


def test_masked() -> None:
    chosen = {"down": True, "up": False, "other": True}
    masked, _ = follow(optax.masked(ALL, chosen))
    part = {name: SHAPE for name, mark in chosen.items() if mark}
    state = ALL.init({name: tree(100)[name] for name in part})
    for t in range(3):
        alone, state = ALL.update({n: tree(t)[n] for n in part}, state, {n: tree(100)[n] for n in part})
    assert_same_bits({name: masked[name] for name in part}, alone)
    assert_same_bits(masked["up"], tree(2)["up"])


def test_multi_steps_is_one_step_on_the_mean_gradient() -> None:
    several = optax.MultiSteps(ALL, every_k_schedule=2)
    params = tree(100)
    state, plain = several.init(params), ALL.init(params)
    for t in range(0, 6, 2):
        for i in (t, t + 1):
            updates, state = several.update(tree(i), state, params)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, tree(t), tree(t + 1))
        expected, plain = ALL.update(mean, plain, params)
        # The mean is formed in another order: float32 rounding.
        assert_nearly_same(updates, expected)
    assert_nearly_same(state.inner_opt_state[1].edge_history, plain[1].edge_history)


def test_strengths_may_be_traced() -> None:
    fixed: dict[str, Any] = {"warmup_steps": 0, "optim_bits": 32, "lora": adapters, "spatial_scope": "all"}
    strengths = {"edge_penalty": 0.1, "frequency_penalty": 0.2, "rank_penalty_strength": 0.3}
    params, traces = tree(100), 0

    def first_update(values: Any) -> Any:
        tx = automagic_8bit(1e-3, **values, **fixed)
        return tx.update(tree(0), tx.init(params), params)[0]

    @jax.jit
    def traced(values: Any) -> Any:
        nonlocal traces
        traces += 1
        return first_update(values)

    before = traced(strengths)
    for name in strengths:
        changed = {**strengths, name: strengths[name] / 2}
        ours = traced(changed)
        # Compiled and operation by operation: float32 rounding, which the steep torque near 0 enlarges.
        assert_nearly_same(ours, first_update(changed), 1e-5)
        assert np.asarray(ours["up"] != before["up"]).any(), name
    assert traces == 1
    # As fields of the whole optimizer they pass through `inject_hyperparams` as they are.
    inject = optax.inject_hyperparams(automagic_8bit, static_args=("lora", "embedding"))
    tx = inject(learning_rate=1e-3, **strengths, **fixed)
    assert_same_bits(tx.update(tree(0), tx.init(params), params)[0], first_update(strengths))


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        (clip_by_percentile, {"percentile": 60}),
        (suppress_edges, {"penalty": 0.1, "threshold": 0.6}),
        (suppress_high_frequencies, {"penalty": 0.5}),
        (encourage_low_rank, {"strength": 0.1, "emphasis": 1.2}),
    ],
    ids=["clip", "edges", "frequencies", "low_rank"],
)
@pytest.mark.parametrize("jit", [False, True])
def test_strengths_are_hyperparameters_to_optax(stage: Any, arguments: dict[str, Any], jit: bool) -> None:
    marks = {"lora": adapters} if stage is encourage_low_rank else {}
    tx = optax.inject_hyperparams(stage, static_args=tuple(marks))(**arguments, **marks)
    params = tree(100)
    state = tx.init(params)
    assert set(state.hyperparams) == set(arguments)
    first = next(iter(arguments))
    half = type(arguments[first])(arguments[first] / 2)
    plain = stage(**{**arguments, first: half}, **marks)
    expected = plain.init(params)
    for t in range(3):  # a first step is never clipped
        state.hyperparams[first] = jnp.asarray(half, state.hyperparams[first].dtype)
        ours, state = (jax.jit(tx.update) if jit else tx.update)(tree(t), state, params)
        theirs, expected = (jax.jit(plain.update) if jit else plain.update)(tree(t), expected, params)
    # Compiled, a strength that is a constant rounds otherwise.
    assert_nearly_same(ours, theirs, 1e-5) if jit else assert_same_bits(ours, theirs)


@pytest.mark.parametrize("wrong", [0, 101, 95.0, "95", None, True, jnp.float32(95), jnp.ones(2, int)])
def test_another_percentile_is_refused_by_the_arguments_name(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^percentile = .* is not valid; valid: an integer in \[1, 100\]"):
        clip_by_percentile(wrong)


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (suppress_edges, "penalty"),
        (suppress_edges, "threshold"),
        (suppress_high_frequencies, "penalty"),
        (encourage_low_rank, "strength"),
        (encourage_low_rank, "emphasis"),
    ],
)
def test_a_wrong_strength_is_refused_by_the_arguments_name(stage: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} = -1\.0 is not valid; valid: "):
        stage(**{name: -1.0})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", STAGES)
def test_float64_of_numpy_is_float32_without_a_warning(name: str) -> None:
    wide = {key: np.asarray(x, np.float64) for key, x in tree(0).items()}
    ours, _ = STAGES[name].update(wide, STAGES[name].init(tree(100)), tree(100))
    ours = {key: jnp.asarray(x) for key, x in ours.items()}  # what no stage changes is passed on as it is
    assert_same_bits(ours, STAGES[name].update(tree(0), STAGES[name].init(tree(100)), tree(100))[0])


def test_a_parameter_of_another_shape_is_named() -> None:
    stage = suppress_edges()
    state = stage.init({"block": {"kernel": jnp.ones((8, 4))}})
    wide = {"block": {"kernel": jnp.ones((8, 5))}}
    with pytest.raises(ValueError, match=r"block\.kernel has shape \(8, 5\), but its edge_history .* \(1, 4\)"):
        jax.eval_shape(stage.update, wide, state, wide)


@pytest.mark.parametrize("name", STAGES)
def test_low_precision_gradients_keep_their_dtype(name: str) -> None:
    updates, state = follow(STAGES[name], dtype="bfloat16")
    assert {u.dtype for u in updates.values()} == {jnp.dtype("bfloat16")}
    assert {str(x.dtype) for x in jax.tree.leaves(state)} <= {"float32", "int32"}
    params, wide = jax.tree.map(lambda w: w.astype("float32"), tree(100, "bfloat16")), None
    other = STAGES[name].init(params)
    for t in range(3):
        grads = jax.tree.map(lambda g: g.astype("float32"), tree(t, "bfloat16"))
        wide, other = STAGES[name].update(grads, other, params)
    # Computed in float32 and rounded once.
    assert_same_bits(updates, jax.tree.map(lambda u: u.astype("bfloat16"), wide))


def test_the_same_with_x64() -> None:
    without = follow(ALL)
    with jax.enable_x64(True):
        within = follow(ALL)
        wide, state = follow(ALL, dtype="float64")
    assert_same_bits(within, without)
    assert {str(u.dtype) for u in wide.values()} == {"float64"}
    assert {str(x.dtype) for x in jax.tree.leaves(state)} == {"float32", "int32"}


@pytest.mark.parametrize("name", STAGES)
def test_complex_and_integer_arrays_are_an_error(name: str) -> None:
    # In float32 a complex gradient would lose its imaginary part.
    for dtype in ("complex64", "int32"):
        with pytest.raises(ValueError, match="down has dtype"):
            STAGES[name].init({"down": jnp.ones(SHAPE, dtype), "up": jnp.ones(SHAPE)})
        STAGES[name].init({"down": jax.ShapeDtypeStruct(SHAPE, jnp.float32), "up": jnp.ones(SHAPE)})
