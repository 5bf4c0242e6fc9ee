"""`metrics(opt_state)` and its callback: wherever the state is wrapped, and without PyTorch."""

import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from automagic_core import Config
from automagic_optax import MetricsLogger, ScaleByCameampState, automagic_8bit, memory_report, metrics
from automagic_optax.cameamp.equations import spatial_factor
from automagic_optax.cameamp.learning_rate import rates

pytestmark = pytest.mark.compiled_quickly
# Two stages are off, to compile less; the parity test has all of them.
FIELDS = {"warmup_steps": 4, "max_lr": 1e-1, "min_8bit_size": 16, "frequency_penalty": 0, "edge_penalty": 0}
FIELDS |= {"lr_mask_gain": 0.2, "straightness": 0.5}
# 65 columns of the kernel are the fewest that have spatial variances.
SHAPES = {"dense": {"kernel": (65, 8), "bias": (8,)}, "lora_a": (10, 3), "lora_b": (3, 10)}


def tree(seed):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(0.5 + rng.standard_normal(s), jnp.float32), SHAPES, is_leaf=is_shape)


LR = optax.linear_schedule(2e-3, 5e-4, 8)
CONFIG = Config(lr=LR, **FIELDS)


@pytest.fixture(scope="module")
def run():
    """States and parameters after 0, 1, … steps.  Compiled once: that takes longer than all that is tested."""
    tx, params = automagic_8bit(LR, **FIELDS), tree(0)
    state, update = tx.init(params), jax.jit(tx.update)
    found = [(state, params)]
    for step in range(1, 7):
        updates, state = update(tree(step), state, params)
        params = optax.apply_updates(params, updates)
        found.append((state, params))
    return found


def scale_state(state):
    is_ours = lambda x: isinstance(x, ScaleByCameampState)  # noqa: E731
    (found,) = [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]
    return found


@pytest.mark.parametrize("steps", [1, 3, 4, 6])
def test_rates_are_those_of_the_next_step(steps, run):
    state = run[steps][0]
    said = metrics(state, config=CONFIG)
    assert said == metrics(state, LR, config=Config(**FIELDS))
    ours = scale_state(state)
    now = rates(LR, ours.log_rate_scale, ours.step + 1, CONFIG)
    used = [now.rows(None, None)]  # the bias
    for name in ("dense", "lora_a", "lora_b"):
        mask, variance = (tree[name] for tree in (ours.lr_mask, ours.spatial_variance))
        mask, variance = (x["kernel"] if name == "dense" else x for x in (mask, variance))
        assert (variance is None) == (name != "dense")
        used.append(now.rows(mask, None if variance is None else spatial_factor(variance)))
    used = np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in used])
    assert used.size == 8 + 1 + 3 + 10  # rows are output features, the last axis
    # float32 rates against float64 ones: a few roundings.
    assert said["rate/mean"] == pytest.approx(used.mean(), rel=1e-6)
    assert (said["rate/min"], said["rate/max"]) == pytest.approx((used.min(), used.max()), rel=1e-6)
    assert said["rate/max"] > 1.1 * said["rate/min"]


WRAPPED = {
    "chain": lambda state: (optax.EmptyState(), state),
    "masked": lambda state: optax.MaskedState(state),
    "inject": lambda state: optax.InjectStatefulHyperparamsState(jnp.zeros([], jnp.int32), {}, {}, state),
    "multi": lambda state: optax.MultiStepsState(
        jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), state, tree(0), optax.EmptyState()
    ),
    "train state": lambda state: types.SimpleNamespace(opt_state=state),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_wrapped_state_says_the_same(wrapper, run):
    plain, wrapped = (metrics(state, config=CONFIG) for state in (run[3][0], WRAPPED[wrapper](run[3][0])))
    assert plain.pop("state_bytes") <= wrapped.pop("state_bytes")
    assert wrapped == plain


def test_arrays_outside_of_a_mask_do_not_count():
    only = {"dense": {"kernel": True, "bias": True}, "lora_a": False, "lora_b": True}
    state = optax.masked(automagic_8bit(1e-3, **FIELDS), only).init(tree(0))
    is_ours = lambda x: isinstance(x, ScaleByCameampState)  # noqa: E731
    state = jax.tree.map(lambda x: x._replace(step=x.step + 1) if is_ours(x) else x, state, is_leaf=is_ours)
    assert [name for name in metrics(state) if "_rank/" in name] == ["effective_rank/lora_b"]


def test_without_a_config_there_are_factors_only(run):
    state, params = run[3]
    found = metrics(state)
    assert {name for name in metrics(state, config=Config(**FIELDS)) if name not in found} == {
        "rate/mean",
        "rate/min",
        "rate/max",
    }
    delta = [np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(scale_state(state).lr_mask)]
    factors = np.exp(float(scale_state(state).log_rate_scale) + np.concatenate([*delta, [0.0]]))
    assert found["rate_factor/mean"] == pytest.approx(factors.mean(), rel=1e-6)
    assert found["state_bytes"] == memory_report(state)["state_bytes"]
    sigma = np.linalg.svd(np.asarray(params["lora_a"], np.float64), compute_uv=False)
    share = sigma / sigma.sum()
    now = metrics(state, params=params)["effective_rank/lora_a"]
    assert now == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)
    assert all(type(value) is float for value in found.values())


def test_ranks_of_the_parameters_where_stage_4_is_off():
    params = tree(0)
    state = automagic_8bit(1e-3, profile="memory_optimized").init(params)
    assert not [name for name in metrics(state) if "_rank/" in name]
    found = metrics(state, params=params | {"lora_b": jnp.zeros((3, 10))})
    assert 1 < found["effective_rank/lora_a"] <= 3
    assert found["effective_rank/lora_b"] == 0
    assert "effective_rank/dense.kernel" in metrics(state, params=params, lora=lambda path, leaf: True)


def test_in_flax_and_before_the_first_step():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(8, 6, rngs=rngs)
            self.adapter = nnx.LoRA(6, 2, 6, rngs=rngs)

        def __call__(self, x):
            return self.adapter(self.layer(x))

    model = Model(nnx.Rngs(0))
    trained = nnx.Any(nnx.Param, nnx.LoRAParam)
    tx = automagic_8bit(1e-3, **FIELDS)
    optimizer = nnx.Optimizer(model, tx, wrt=trained)
    assert {name.split("/")[0] for name in metrics(optimizer)} == {"rate_factor", "skipped_steps", "state_bytes"}
    x = jax.random.normal(jax.random.key(0), (4, 8))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: (m(x) ** 2).mean(), argnums=nnx.DiffState(0, trained))(model))

    step(model, optimizer)
    step(model, optimizer)
    found = metrics(optimizer, config=Config(lr=1e-3, **FIELDS))
    assert 1 <= found["effective_rank/adapter.lora_a"] <= 2
    now = metrics(optimizer, config=Config(lr=1e-3, **FIELDS), params=nnx.state(model, trained))
    assert list(now) == list(found)
    assert now["effective_rank/adapter.lora_a"] == pytest.approx(found["effective_rank/adapter.lora_a"], rel=0.05)


def test_what_cannot_be_answered_is_said(run):
    state = run[1][0]
    with pytest.raises(ValueError, match="give config= too"):
        metrics(state, 1e-3)
    with pytest.raises(ValueError, match="found no ScaleByCameampState"):
        metrics(optax.adam(1e-3).init(tree(0)))
    with pytest.raises(ValueError, match="inside jit has no values"):
        jax.jit(metrics)(state)


WITHOUT_TORCH = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import jax.numpy as jnp
from automagic_optax import MetricsLogger, automagic_8bit
tx = automagic_8bit(1e-4)
w = {{"w": jnp.ones((4, 4))}}
state = tx.init(w)
with MetricsLogger(sys.argv[1], every=2) as logger:
    for step in range(1, 5):
        logger.log(step, state, loss=jnp.float32(2))
assert not {{"torch", "tensorflow"}} & {{name for name in sys.modules if sys.modules[name] is not None}}
"""


@pytest.mark.parametrize(
    "blocked",
    [pytest.param(("torch",), marks=pytest.mark.slow), ("torch", "tensorboard", "matplotlib")],
    ids=["torch", "tensorboard"],
)
def test_the_logger_without(blocked, tmp_path):
    command = [sys.executable, "-c", WITHOUT_TORCH.format(blocked=blocked), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tensorboard is not installed") == ("tensorboard" in blocked)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4]
    if "tensorboard" in blocked:
        return
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 2.0), (4, 2.0)]
    assert set(events.Tags()["scalars"]) == set(lines[0]) - {"step"}


def test_the_logger_reads_nothing_until_it_is_due(tmp_path, run):
    state = run[1][0]
    logger = MetricsLogger(tmp_path, every=10, config=CONFIG, tensorboard=False)
    assert logger.log(3, state, loss=1.0)["rate/mean"] > 0
    assert logger.log(4, object(), loss=object()) is None
    with pytest.raises(ValueError, match="every = 0 is not valid"):
        MetricsLogger(tmp_path, every=0)


def test_what_the_caller_gives_wins_and_none_is_left_out(tmp_path, run):
    state = run[1][0]
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        record = logger.log(1, state, learning_rate=7.0, loss=None, accuracy=jnp.float32(0.5))
    assert record == {**metrics(state), "learning_rate": 7.0, "accuracy": 0.5}
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, **record}


def test_a_scalar_of_several_numbers_is_named(run):
    for name, words in (("accuracy", "^accuracy"), ("loss", "^a loss")):
        with pytest.raises(ValueError, match=rf"{words} of shape \(2,\) is not one number"):
            MetricsLogger(None).log(1, run[1][0], **{"grad_norm": 1.0, name: jnp.ones(2)})
    with pytest.raises(ValueError, match="accuracy inside jit has no value"):
        jax.jit(lambda x: MetricsLogger(None).log(1, run[1][0], accuracy=x)["accuracy"])(1.0)
