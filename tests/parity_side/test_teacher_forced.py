"""Step parity on a few steps, and that taking any one feature out of one side is noticed."""

import jax
import jax.numpy as jnp
import pytest

from automagic_optax import ScaleByCameampState, SuppressEdgesState
from parity import stages, teacher_forced
from parity.sides import JaxSide
from parity.streams import SHAPES
from parity.teacher_forced import BASE, CODE_BOUND, ELEMENT_BOUND, UPDATE_BOUND, Comparison, compare

pytestmark = pytest.mark.compiled_quickly
STEPS = 12
# Nine of the steps in the warm-up: the climb, which `TURN` ends, the rise after it, and the absence of both.
FIELDS = {**BASE, "warmup_steps": 9}
FEW = (SHAPES[0], SHAPES[1], SHAPES[6])  # 8-bit with either kind of blocks, and 32-bit
# To take a feature out: all of the steps in the warm-up, where every feature is at work.
ALL_ON = {**BASE, "lr": 2e-5, "warmup_steps": 10, "factored": "none", "percentile_clipping": 30}
# With these the rate rises after its climb has ended, so what bounds the rise is seen.
RISES = {"straightness": 0.3, "agreement_floor": -0.9}
TWO = (SHAPES[1], SHAPES[6], SHAPES[8])
ALL = {"steps": 9, "shapes": TWO}


@pytest.fixture(autouse=True, scope="module")
def _one_program_for_each_configuration():
    """The JAX side of a configuration is compiled once: it keeps nothing from step to step."""
    sides = {}

    def side(*arguments):
        key = repr(arguments)
        if key not in sides:
            sides[key] = JaxSide(*arguments)
        return sides[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_forced, "JaxSide", side)
        yield


@pytest.fixture
def _never_optimized():
    """What only shows that a difference is seen needs no optimized program."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def is_equal(found: Comparison) -> bool:
    """Whether a comparison keeps the bounds of the report."""
    codes = found.codes == 0 or (found.codes_equal / found.codes >= CODE_BOUND and found.code_step <= 1)
    return found.update <= UPDATE_BOUND and found.state <= UPDATE_BOUND and codes


@pytest.mark.slow  # the stages below take the same steps; `test_without_a_change_...` has PyTorch's layout
@pytest.mark.parametrize("factored", ["none", "second_moment", "all"])
def test_each_step_is_the_same(factored):
    found = compare({**FIELDS, "factored": factored}, steps=STEPS, shapes=SHAPES)
    assert found.codes > 100_000 or factored == "all"
    assert found.update <= UPDATE_BOUND
    assert found.state <= UPDATE_BOUND
    assert found.codes_equal / found.codes >= CODE_BOUND
    assert found.code_step <= 1


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"block_wise": False, "factored": "none"}, marks=pytest.mark.slow),
        pytest.param({"optim_bits": 32}, marks=pytest.mark.slow),
        pytest.param({"betas": (0, 0, 0)}, marks=pytest.mark.slow),
    ],
)
def test_each_step_is_the_same_in_other_forms(fields):
    assert is_equal(compare({**FIELDS, **fields}, steps=STEPS, shapes=FEW))


def test_the_stages_are_the_same_on_a_few_arrays():
    # Adapters of either long side, of zeros and of equal singular values, a kernel, a row.
    chosen = [0, 2, 6, 7, 12, 14]
    shapes, weights = ([every[i] for i in chosen] for every in (stages.SHAPES, stages.weights()))
    fields = FIELDS | {name: value for on in stages.ON.values() for name, value in on.items()}
    assert is_equal(compare(fields, steps=STEPS, shapes=tuple(shapes), layout="flax", weights=weights))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["torch", "flax"])
def test_the_stages_are_the_same_in_both_layouts(layout):
    assert all(check.passed for check in stages.checks(tuple(stages.ON), layout, "cpu", STEPS))


@pytest.mark.parametrize(
    ("dtype", "stochastic"),
    [
        ("bfloat16", True),
        ("float16", False),
        ("bfloat16", False),
        ("float16", True),
    ],
)
@pytest.mark.slow  # each framework's rounding has an oracle of its own
def test_low_precision_parameters_are_the_same(dtype, stochastic):
    fields = {**FIELDS, "stochastic_rounding_params": stochastic}
    found = compare(fields, steps=STEPS, dtype=dtype, shapes=FEW)
    assert is_equal(found)
    assert found.elements_equal / found.elements >= ELEMENT_BOUND
    assert found.element_step <= 1


WITHOUT = {
    "torque": {"torque": False},
    "torque_decay": {"torque_decay": 0.9},
    "background_regularization": {"background_regularization": False},
    "weight_decay": {"weight_decay": 0.0},
    "update_clip": {"update_clip": 1.0},
    "confidence_floor": {"confidence_floor": 1e-6},
    "stochastic_rounding": {"stochastic_rounding": False},
    "warm-up": {"warmup_steps": 8},
    "max_lr": {"max_lr": 2e-5},
    "lr_mask_gain": {"lr_mask_gain": 0.1},
    "search_gain": {"search_gain": 0.11},
    "straightness": {"straightness": 1.1},
    "agreement_floor": {"agreement_floor": 0.9},
    # So small that the stage does nothing, but its state is there to be carried across.
    "edges": {"edge_penalty": 1e-9},
    "edge_penalty": {"edge_penalty": 0.09},
    "edge_threshold": {"edge_threshold": 0.5},
    "frequencies": {"frequency_penalty": 1e-9},
    "rank_penalty_strength": {"rank_penalty_strength": 0.1},
    "low_rank_emphasis": {"low_rank_emphasis": 1.2},
    "clipping": {"percentile_clipping": 99},
    "beta1": {"betas": (0.8, 0.99, 0.999)},
    "beta2": {"betas": (0.9, 0.98, 0.999)},
    "beta3": {"betas": (0.9, 0.99, 0.99)},
}


# Each compiles a program of its own; those below, of every section, share one and are in the quick half.
@pytest.mark.slow
@pytest.mark.usefixtures("_never_optimized")
@pytest.mark.parametrize("feature", WITHOUT)
def test_a_feature_missing_on_one_side_is_noticed(feature):
    fields = ALL_ON | (RISES if feature in ("search_gain", *RISES) else {})
    assert not is_equal(compare(fields, **ALL, ours=WITHOUT[feature]))


@pytest.mark.usefixtures("_never_optimized")
@pytest.mark.parametrize("more", [{}, pytest.param(RISES, marks=pytest.mark.slow)])
def test_without_a_change_the_sides_are_equal(more):
    assert is_equal(compare(ALL_ON | more, **ALL))


def _edited(kind=ScaleByCameampState, **fields):
    def edit(state):
        return tuple(
            part._replace(**{name: fields[name](getattr(part, name)) for name in fields})
            if isinstance(part, kind)
            else part
            for part in state
        )

    return edit


EDITS = {
    "spatial factor": _edited(spatial_variance=lambda tree: [None for _ in tree]),
    "row rates": _edited(lr_mask=lambda tree: jax.tree.map(jnp.zeros_like, tree)),
    "log_rate_scale": _edited(log_rate_scale=jnp.zeros_like),
    "walk_energy": _edited(walk_energy=jnp.zeros_like),
    "agreement": _edited(agreement=jnp.zeros_like),
    "peak_agreement": _edited(peak_agreement=jnp.zeros_like),
    "walk": _edited(walk=lambda tree: None if tree is None else jax.tree.map(jnp.zeros_like, tree)),
    "bias correction": _edited(age=lambda tree: jax.tree.map(lambda age: age + 1, tree)),
    "torque mean": _edited(torque_mean=lambda tree: jax.tree.map(jnp.ones_like, tree)),
    "random bits": _edited(step=lambda step: jnp.where(step > 3, step + 1, step)),
    "background scale": _edited(background_scale=lambda tree: jax.tree.map(jnp.zeros_like, tree)),
    "edge history": _edited(SuppressEdgesState, edge_history=lambda tree: jax.tree.map(jnp.zeros_like, tree)),
    "edge age": _edited(SuppressEdgesState, age=lambda tree: jax.tree.map(lambda age: age + 1, tree)),
}


@pytest.mark.usefixtures("_never_optimized")
@pytest.mark.parametrize("feature", EDITS)
def test_a_state_that_does_nothing_on_one_side_is_noticed(feature):
    assert not is_equal(compare(ALL_ON, **ALL, edit=EDITS[feature]))
