"""`quantize_state`: which states have 8 bits, what they store, and what becomes of numbers that cannot be stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from automagic_optax import QuantizedMoment, QuantizedState, quantize_state
from automagic_optax.arrays.parameter_places import parameter_places
from tests.optax_side.small import assert_nearly_same, assert_same_bits, grads, params, quantized_leaves
from tests.oracle import codec as oracle

pytestmark = pytest.mark.compiled_quickly
KERNEL = "['dense']['kernel']"
c = optax.contrib

# For each optimizer the states of the kernel that have 8 bits, + for the signed map and √ for roots with the unsigned.
FOUND: dict[str, tuple[Any, dict[str, str]]] = {
    "adam": (optax.adam(1e-3), {"mu": "+", "nu": "√"}),
    "adamw": (optax.adamw(1e-3), {"mu": "+", "nu": "√"}),
    "nadamw": (optax.nadamw(1e-3), {"mu": "+", "nu": "√"}),
    "adabelief": (optax.adabelief(1e-3), {"mu": "+", "nu": "√"}),
    "amsgrad": (optax.amsgrad(1e-3), {"mu": "+", "nu": "√", "nu_max": "√"}),
    "lion": (optax.lion(1e-3), {"mu": "+"}),
    "sgd": (optax.sgd(1e-3, momentum=0.9), {"trace": "+"}),
    "rmsprop": (optax.rmsprop(1e-3), {"nu": "√"}),
    "adagrad": (optax.adagrad(1e-3), {"sum_of_squares": "√"}),
    "adan": (optax.adan(1e-3), {"m": "+", "v": "+", "n": "√", "g": "+"}),  # its v is signed
    "ademamix": (c.ademamix(1e-3), {"m1": "+", "m2": "+", "nu": "√"}),
    "muon": (c.muon(1e-3), {"mu": "+"}),
    # z begins as the parameters and is kept as one.
    "schedule_free_adamw": (c.schedule_free_adamw(1e-3), {"nu": "√"}),
    "prodigy": (c.prodigy(1e-3), {"exp_avg": "+", "exp_avg_sq": "√", "grad_sum": "+"}),  # not params0
    "sophia": (c.sophia(1e-3), {"mu": "+", "nu": "+"}),  # a curvature may be negative
    "centered rmsprop": (optax.rmsprop(1e-3, centered=True), {}),  # it takes the root of nu − mu²
    "lbfgs": (optax.scale_by_lbfgs(), {}),
    "madgrad": (c.madgrad(1e-3), {}),  # the parameters are x0 − s / ∛n
    "momo": (c.momo(1.0), {}),  # its rate is a small difference of an average and of <exp_avg, params>
    "momo_adam": (c.momo_adam(1e-2), {"exp_avg_sq": "√"}),
    "sm3": (optax.sm3(1e-3), {"nu": "+"}),  # its momentum
    # A sum of gradients would be rounded anew at each addition.
    "multi_steps": (optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(), {"mu": "+", "nu": "√"}),
    "apply_every": (optax.apply_every(4), {}),
    "injected": (optax.inject_hyperparams(optax.adam)(1e-3), {"mu": "+", "nu": "√"}),
    "chained": (optax.chain(optax.clip(1.0), optax.trace(0.9), optax.ema(0.9)), {"trace": "+", "ema": "+"}),
    "masked by a prefix": (
        optax.masked(optax.adam(1e-3), {"dense": True, "table": False, "scale": False}),
        {"mu": "+", "nu": "√"},
    ),
    "partitioned": (
        optax.partition(
            {"a": optax.adam(1e-3), "b": optax.sgd(1e-3, momentum=0.9)}, {"dense": "a", "table": "b", "scale": "b"}
        ),
        {"mu": "+", "nu": "√"},
    ),
}


def stored(state: Any) -> dict[str, QuantizedMoment]:
    """Every state in 8 bits by its path."""
    named = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, QuantizedMoment))
    return {jax.tree_util.keystr(path): x for path, x in named if isinstance(x, QuantizedMoment)}


@pytest.mark.parametrize("name", FOUND)
def test_which_states_have_8_bits_and_in_which_map(name: str) -> None:
    tx, expected = FOUND[name]
    plain, state = tx.init(params()), quantize_state(tx).init(params())
    assert isinstance(state, QuantizedState)
    found = {
        path.removesuffix(KERNEL).rpartition(".")[2]: "+" if x.signed else "√" for path, x in stored(state).items()
    }
    assert found == expected
    assert all(path.endswith(KERNEL) for path in stored(state))
    # Everything else is there as it was, and 8 bits read as what was stored.
    read = jax.tree.map(
        lambda x: x.read() if isinstance(x, QuantizedMoment) else x,
        state.inner_state,
        is_leaf=lambda x: isinstance(x, QuantizedMoment),
    )
    # The square of adagrad's √0.1 in float32.
    assert_nearly_same(read, plain, 2e-7)


def test_a_like_shape_alone_is_no_parameters_state() -> None:
    class Preconditioned(NamedTuple):
        factor: Any
        momentum: Any

    def init(weights: Any) -> Preconditioned:
        first = jax.tree.leaves(weights)[0]
        return Preconditioned({"left": jnp.zeros_like(first)}, jax.tree.map(jnp.zeros_like, weights))

    tx = quantize_state(optax.GradientTransformation(init, lambda u, s, p=None: (u, s)))
    tree = {"kernel": jnp.ones((64, 64)), "other": jnp.ones(3)}
    assert list(stored(tx.init(tree))) == [".inner_state.momentum['kernel']"]
    # A single array has no structure to be known by.
    assert list(stored(tx.init(jnp.ones((64, 64))))) == [".inner_state.momentum"]
    # None and parameters left out do not hide the tree; another key does.
    places = parameter_places({"a": 1, "b": {"c": 2, "d": 3}}, [{"a": None, "b": {"c": 5, "d": 6}}, {"a": 7, "b": 8}])
    assert [(place.array, place.parameter) for place in places] == [(5, 2), (6, 3)]
    hidden = parameter_places({"a": 1, "b": {"c": 2, "d": 3}}, ({"a": 4, "b": optax.MaskedNode()}, {"a": 7}))
    assert [(place.array, place.parameter) for place in hidden] == [(4, 1)]


def test_a_projector_of_galore_is_no_moment() -> None:
    tx = quantize_state(optax.contrib.galore(1e-3, rank=128))  # as square as its parameter
    assert sorted(stored(tx.init({"kernel": jnp.ones((64, 64))}))) == [
        f".inner_state[0].base_optimizer_state.{name}['kernel']" for name in ("mu", "nu")
    ]


def test_the_callers_predicate_comes_first() -> None:
    def squares(path: tuple, leaf: Any) -> bool | None:
        assert leaf.shape == (16, 256)
        return True if path[-3].name == "mu" else None

    state = quantize_state(optax.adam(1e-3), nonnegative=squares).init(params())
    assert [x.signed for x in stored(state).values()] == [False, False]
    state = quantize_state(optax.adam(1e-3), nonnegative=lambda path, leaf: False).init(params())
    assert [x.signed for x in stored(state).values()] == [True, True]


def test_arrays_below_the_least_size_stay() -> None:
    sizes = {4096: 1, 4097: 0, 45: 2, 1: 4}
    for least, count in sizes.items():
        assert len(quantized_leaves(quantize_state(optax.lion(1e-3), least).init(params()))) == count


@pytest.mark.parametrize("stochastic", [True, False])
def test_a_step_is_the_inner_step_between_the_oracles_codes(stochastic: bool) -> None:
    inner = optax.adam(1e-3)
    tx = quantize_state(inner, block_size=64, stochastic_rounding=stochastic)
    weights, state = params(), tx.init(params())
    plain = inner.init(weights)
    for t in range(1, 3):
        updates, state = tx.update(grads(t), state, weights)
        expected, plain = inner.update(grads(t), plain, weights)
        assert_same_bits(updates, expected)
        found = iter(stored(state).values())
        for slot, (name, signed) in enumerate([("mu", True), ("nu", False)], start=5):
            tree = getattr(plain[0], name)
            exact = np.asarray(tree["dense"]["kernel"])
            root = exact if signed else np.asarray(jnp.sqrt(exact))  # a GPU's root is not numpy's
            codes, absmax = (
                oracle.quantize_stochastic(root, signed, 64, t, slot)
                if stochastic
                else oracle.quantize(root, signed, 64)
            )
            codes = codes if signed else np.maximum(codes, exact.reshape(codes.shape) > 0)
            ours = next(found)
            assert np.array_equal(ours.codes, codes)
            assert np.array_equal(np.asarray(ours.absmax).reshape(-1), absmax)
            value = oracle.dequantize(codes, absmax, signed, 64).reshape(exact.shape)
            tree["dense"]["kernel"] = jnp.asarray(value if signed else np.square(value))
    assert int(state.step) == 2


@pytest.mark.parametrize("stochastic", [True, False])
def test_no_step_explodes_where_gradients_in_a_block_differ_by_orders_of_magnitude(stochastic: bool) -> None:
    sizes = np.logspace(-8, 0, 256).astype(np.float32)
    tx = quantize_state(optax.adam(1.0), stochastic_rounding=stochastic)
    weights = {"w": jnp.zeros((16, 256)), "never": jnp.zeros((16, 256))}
    state, update = tx.init(weights), jax.jit(tx.update)
    rng = np.random.default_rng(0)
    for _ in range(20):
        noise = jnp.asarray(rng.standard_normal((16, 256)), jnp.float32) * sizes
        updates, state = update({"w": noise, "never": jnp.zeros((16, 256))}, state, weights)
        # Without a floor the root becomes 0 and steps are some hundreds long; a momentum rounded up makes ten of one.
        assert float(jnp.abs(updates["w"]).max()) < 30
    nu = state.inner_state[0].nu
    assert int(nu["w"].codes.min()) == 1
    assert int(nu["never"].codes.max()) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_cannot_be_stored_reads_as_nan_with_its_block(bad: float) -> None:
    tx = quantize_state(optax.trace(0.9))
    gradient = grads()
    gradient["dense"]["kernel"] = gradient["dense"]["kernel"].at[3, 7].set(bad)
    for update in (tx.update, jax.jit(tx.update)):
        updates, state = update(gradient, tx.init(params()))
        assert np.array_equal(updates["dense"]["kernel"][3, 7], np.float32(bad), equal_nan=True)
        values = np.asarray(stored(state)[f".inner_state.trace{KERNEL}"].read())
        assert np.isnan(values[3]).all()  # blocks of 256 are the rows
        assert np.isfinite(np.delete(values, 3, axis=0)).all()
        # It stays, as it would without 8 bits, whatever comes.
        updates, state = update(grads(1), state)
        assert np.isnan(updates["dense"]["kernel"][3]).all()
        assert np.isfinite(updates["dense"]["kernel"][:3]).all()


def test_a_negative_value_in_a_state_called_nonnegative_is_no_number() -> None:
    tx = quantize_state(optax.trace(0.9), nonnegative=lambda path, leaf: True)
    gradient = jax.tree.map(jnp.abs, grads())
    gradient["dense"]["kernel"] = gradient["dense"]["kernel"].at[0, 0].set(-1e-3)
    _, state = tx.update(gradient, tx.init(params()))
    values = np.asarray(stored(state)[f".inner_state.trace{KERNEL}"].read())
    assert np.isnan(values[0]).all()
    # √ rounds to the unsigned map's values, which lie at most 1.6 % apart below the block's largest: 3.2 % squared.
    np.testing.assert_allclose(values[1:], gradient["dense"]["kernel"][1:], rtol=0.2, atol=1e-3)


def test_a_state_that_is_passed_on_keeps_its_codes() -> None:
    # The largest of each block is negative, which reads as −0.993 of itself: rounded again it would shrink.
    tx = quantize_state(optax.MultiSteps(optax.trace(0.9), every_k_schedule=4).gradient_transformation())
    negative = jax.tree.map(lambda g: -jnp.abs(g), grads())
    update = jax.jit(tx.update)
    state = tx.init(params())
    kept = []
    for _ in range(8):
        _, state = update(negative, state)
        kept.append(stored(state)[f".inner_state.inner_opt_state.trace{KERNEL}"])
    for t in (4, 5, 6):
        assert_same_bits(kept[t], kept[3])
    assert (kept[7].codes != kept[3].codes).any() or (kept[7].absmax != kept[3].absmax).any()


@pytest.mark.parametrize(("decay", "share"), [(0.9, 0.94), (0.99, 0.59)])
def test_a_steady_negative_gradient_is_averaged_as_far_as_the_page_says(decay: float, share: float) -> None:
    tx = quantize_state(optax.trace(decay), min_8bit_size=256)
    update, weights = jax.jit(tx.update), jnp.zeros(256)
    for sign, expected in ((1, 1.0), (-1, share)):
        state = tx.init(weights)
        for _ in range(round(12 / (1 - decay))):
            updates, state = update(jnp.full(256, float(sign)), state, weights)
        np.testing.assert_allclose(updates * (1 - decay), sign * expected, rtol=0.01)


def test_wrong_arguments_are_named() -> None:
    for arguments, words in (
        ({"block_size": 100}, "block_size = 100 is not valid; valid: a power of two"),
        ({"min_8bit_size": 0}, "min_8bit_size = 0 is not valid"),
        ({"stochastic_rounding": 1}, "stochastic_rounding = 1 is not valid"),
        ({"nonnegative": "nu"}, "nonnegative = 'nu' is not valid"),
    ):
        with pytest.raises(ValueError, match=words):
            quantize_state(optax.adam(1e-3), **arguments)
    with pytest.raises(ValueError, match="static_args="):
        optax.inject_hyperparams(quantize_state)(optax.adam(1e-3)).init(params())
    inject = optax.inject_hyperparams(quantize_state, static_args=("min_8bit_size", "block_size"))
    called_as_a_schedule = inject(optax.adam(1e-3), nonnegative=lambda *args: jnp.float32(0))
    with pytest.raises(ValueError, match=r"static_args=.*'nonnegative'"):
        called_as_a_schedule.init(params())
    changing = optax.GradientTransformation(
        lambda p: jax.tree.map(jnp.zeros_like, p), lambda u, s, p=None: (u, {"else": s})
    )
    tx = quantize_state(changing)
    with pytest.raises(ValueError, match="changed the structure of its state"):
        tx.update(grads(), tx.init(params()))


@pytest.mark.parametrize("name", ["adamw", "schedule_free_adamw"])
def test_a_plain_state_is_refused_and_goes_on_as_the_page_says(name: str) -> None:
    tx, weights = FOUND[name][0], params()
    _, old = tx.update(grads(), tx.init(weights), weights)
    with pytest.raises(ValueError, match=r"is a .* and no QuantizedState: begin with quantize_state"):
        quantize_state(tx).update(grads(1), old, weights)
    page = Path(__file__).parents[3] / "docs/memory.md"
    known = {"tx": tx, "old": old, "params": weights, "jax": jax, "jnp": jnp, "quantize_state": quantize_state}
    exec(page.read_text().split("```python")[1].split("```")[0], known)
    state: Any = known["opt_state"]
    assert list(stored(state)) == list(stored(quantize_state(tx).init(weights)))
    updates, _ = quantize_state(tx).update(grads(1), state, weights)
    assert_nearly_same(updates, tx.update(grads(1), old, weights)[0], 0.05)
