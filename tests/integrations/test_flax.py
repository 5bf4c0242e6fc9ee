"""`nnx.Optimizer` of `nnx.LoRA` alone, a chain around masks, Linen's `TrainState`; saved and restored by Orbax"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import optax
import pytest

from automagic_optax import automagic_8bit, found_marks
from tests.integrations.jax_runs import FIELDS, OPTIMIZERS, SAVED_AT, STEPS, assert_same_bits, batch, has_codes, loss

pytest.importorskip("flax")
ocp = pytest.importorskip("orbax.checkpoint")
from flax import linen, nnx  # noqa: E402
from flax.training.train_state import TrainState  # noqa: E402

DISTRIBUTIONS = ("flax", "orbax-checkpoint")


class Adapted(nnx.Module):
    """A frozen layer with an adapter beside it, and a trained one."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = nnx.LoRALinear(16, 32, lora_rank=4, rngs=rngs)
        self.outer = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outer(nnx.tanh(self.inner(x)))


def optimizer_of(model: Adapted, tx: Any) -> nnx.Optimizer:
    return nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)


@nnx.jit
def nnx_step(model: Adapted, optimizer: nnx.Optimizer, x: jax.Array) -> None:
    grads = nnx.grad(lambda model: loss(model(x), x), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_adapter_is_the_undisturbed_one(name: str, tmp_path: Path) -> None:
    tx = OPTIMIZERS[name]()
    model = Adapted(nnx.Rngs(0))
    optimizer = optimizer_of(model, tx)
    before = nnx.state(model.outer)
    assert len(found_marks(nnx.state(model, nnx.LoRAParam))["lora"]) == 2
    checkpointer = ocp.StandardCheckpointer()
    for number in range(STEPS):
        if number in SAVED_AT:
            state = nnx.to_pure_dict(nnx.state((model, optimizer)))
            checkpointer.save(tmp_path / str(number), state)
        nnx_step(model, optimizer, batch(number))
    checkpointer.wait_until_finished()
    assert has_codes(nnx.state(optimizer))
    assert_same_bits(nnx.state(model.outer), before)
    for saved_at in SAVED_AT:
        fresh = Adapted(nnx.Rngs(1))
        pair = (fresh, optimizer_of(fresh, tx))
        state = nnx.state(pair)
        nnx.replace_by_pure_dict(state, checkpointer.restore(tmp_path / str(saved_at), nnx.to_pure_dict(state)))
        nnx.update(pair, state)
        for number in range(saved_at, STEPS):
            nnx_step(*pair, batch(number))
        assert_same_bits(nnx.state(pair), nnx.state((model, optimizer)))


def labels_of(params: Any) -> Any:
    return jax.tree.map(lambda x: "train" if x.ndim > 1 else "freeze", params)


@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_a_mask_inside_an_optimizer_of_nnx(wrap: str) -> None:
    """Vectors stay; as `optax.adamw` does in the same places."""
    inner = automagic_8bit(1e-3, **FIELDS)
    if wrap == "masked":
        matrices = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)  # noqa: E731
        vectors = lambda params: jax.tree.map(lambda x: x.ndim < 2, params)  # noqa: E731
        tx = optax.chain(optax.masked(inner, matrices), optax.masked(optax.set_to_zero(), vectors))
    else:
        tx = optax.partition({"train": inner, "freeze": optax.set_to_zero()}, labels_of)
    model = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jax.tree.map(jax.numpy.copy, nnx.state(model))

    @nnx.jit
    def step(model: nnx.Linear, optimizer: nnx.Optimizer, x: jax.Array) -> None:
        optimizer.update(model, nnx.grad(lambda model: loss(model(x), x))(model))

    for number in range(3):
        step(model, optimizer, batch(number) + 1)
    assert_same_bits(model.bias[...], before["bias"][...])
    assert (model.kernel[...] != before["kernel"][...]).all()


class Boxed(linen.Module):
    """Partitioned as T5X and MaxText do."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width, names in ((64, ("data", "model")), (16, ("model", "data"))):
            init = linen.with_partitioning(linen.initializers.lecun_normal(), names)
            x = linen.Dense(width, kernel_init=init)(linen.tanh(x))
        return x


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_train_state_is_the_undisturbed_one(name: str, tmp_path: Path) -> None:
    """On a mesh: `nn.get_partition_spec` of the state says how it is split, and Orbax brings it back so."""
    if jax.device_count() < 8:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
    mesh = jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    net, tx = Boxed(), OPTIMIZERS[name]()

    def create(key: jax.Array) -> TrainState:
        return TrainState.create(apply_fn=net.apply, params=net.init(key, batch(0))["params"], tx=tx)

    def is_spec(x: Any) -> bool:
        return isinstance(x, jax.sharding.PartitionSpec)

    abstract = jax.eval_shape(create, jax.random.key(0))
    specs = linen.get_partition_spec(abstract)
    shardings = jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), specs, is_leaf=is_spec)

    @jax.jit
    def step(state: TrainState, x: jax.Array) -> TrainState:
        grads = jax.grad(lambda params: loss(net.apply({"params": params}, x), x))(state.params)
        return state.apply_gradients(grads=grads)

    begin = jax.jit(create, out_shardings=shardings)
    state, checkpointer = begin(jax.random.key(0)), ocp.StandardCheckpointer()
    step = jax.jit(step, out_shardings=shardings)
    for number in range(STEPS):
        if number in SAVED_AT:
            checkpointer.save(tmp_path / str(number), state)
        state = step(state, batch(number))
    checkpointer.wait_until_finished()
    assert has_codes(state.opt_state)
    for saved_at in SAVED_AT:
        resumed = checkpointer.restore(tmp_path / str(saved_at), begin(jax.random.key(1)))
        for number in range(saved_at, STEPS):
            resumed = step(resumed, batch(number))
        assert_same_bits(resumed, state)
