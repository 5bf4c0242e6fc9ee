"""A run moves from eight devices to four: ``python -m examples.eight_devices``

The devices are simulated on the CPU.  Parameters and states are split over them, as in FSDP; Orbax carries both over.
"""

import os
import shutil
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from automagic_optax import automagic_8bit, restore

STEPS, BATCH, WIDTH = 100, 256, 1024
PICTURE = Path("out/examples/eight_devices.png")
CHECKPOINT = Path("out/examples/eight_devices").absolute()
DIGITS = load_digits()
SHAPES = {"entry": (64, WIDTH), "middle": (WIDTH, WIDTH), "exit": (WIDTH, 10)}


def split(mesh: Mesh) -> dict[str, NamedSharding]:
    """Every matrix is split by rows."""
    return {name: NamedSharding(mesh, P("data", None)) for name in SHAPES}


def loss_of(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Cross-entropy of a classifier with two hidden layers."""
    hidden = jax.nn.relu(jax.nn.relu(x @ params["entry"]) @ params["middle"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["exit"], y).mean()


SCHEDULE = optax.cosine_decay_schedule(1e-5, 2 * STEPS)
TX = automagic_8bit(SCHEDULE, profile="balanced", max_lr=1.0, warmup_steps=int(0.8 * STEPS))


@jax.jit
def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
    """One step; the compiler splits it as its arrays are split."""
    loss, grads = jax.value_and_grad(loss_of)(params, x, y)
    updates, state = TX.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def train(params: Any, state: Any, mesh: Mesh, steps: range) -> tuple[Any, Any, list[float]]:
    """Parameters, state, and the loss of every step; the batch is split over the devices too."""
    losses = []
    for number in steps:
        chosen = np.random.default_rng(number).integers(len(DIGITS.data), size=BATCH)
        x = jax.device_put((DIGITS.data[chosen] / 16).astype(np.float32), NamedSharding(mesh, P("data", None)))
        params, state, loss = step(params, state, x, jnp.asarray(DIGITS.target[chosen]))
        losses.append(float(loss))
    return params, state, losses


def held(tree: Any) -> list[int]:
    """Bytes on each device."""
    bytes_on = dict.fromkeys(jax.devices(), 0)
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            bytes_on[shard.device] += shard.data.nbytes
    return list(bytes_on.values())


def main() -> None:
    """Trains, saves, restores, goes on, prints and draws."""
    print(f"Trains {STEPS} steps on eight simulated devices and {STEPS} on four: a minute.", flush=True)
    eight, four = (Mesh(jax.devices()[:count], ("data",)) for count in (8, 4))
    keys = dict(zip(SHAPES, jax.random.split(jax.random.key(0), len(SHAPES)), strict=True))
    params = {name: jax.random.normal(keys[name], shape) / shape[0] ** 0.5 for name, shape in SHAPES.items()}
    params = jax.device_put(params, split(eight))
    params, state, before = train(params, TX.init(params), eight, range(STEPS))
    on_eight = held(params), held(state)

    shutil.rmtree(CHECKPOINT, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(CHECKPOINT / "params", params)
        checkpointer.save(CHECKPOINT / "state", state)

    like = jax.tree.map(lambda w, s: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=s), params, split(four))
    with ocp.StandardCheckpointer() as checkpointer:
        params_on_four = checkpointer.restore(CHECKPOINT / "params", like)
    state_on_four = restore(CHECKPOINT / "state", TX, like)
    on_four = held(params_on_four), held(state_on_four)
    _, _, after = train(params_on_four, state_on_four, four, range(STEPS, 2 * STEPS))
    _, _, stayed = train(params, state, eight, range(STEPS, 2 * STEPS))

    figure, (curve, bars) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    curve.semilogy(range(STEPS, 2 * STEPS), stayed, color="#c3cad2", linewidth=4, label="eight, without a stop")
    curve.semilogy(range(STEPS), before, color="#2b5fa5", label="on eight devices")
    curve.semilogy(range(STEPS, 2 * STEPS), after, color="#c8452d", linewidth=1, label="on four, restored")
    curve.set(title="Loss", xlabel="step")
    for (weights, states), colour, shift in ((on_eight, "#2b5fa5", -0.2), (on_four, "#c8452d", 0.2)):
        places = np.arange(8) + shift
        bars.bar(places, np.array(weights) / 1e3, 0.4, color=colour)
        bars.bar(places, np.array(states) / 1e3, 0.4, bottom=np.array(weights) / 1e3, color=colour, alpha=0.5)
    bars.set(title="On each device: parameters dark, states light", xlabel="device", ylabel="kB", xticks=range(8))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(PICTURE, dpi=85)
    bytes_held = [(weights[0] + states[0]) / 1e3 for weights, states in (on_eight, on_four)]
    print(
        f"Seen: a device of eight held {bytes_held[0]:,.0f} kB, one of four {bytes_held[1]:,.0f}. The first loss on "
        f"four was {after[0]:.6f}, where eight gave {stayed[0]:.6f}; the mean of the last 20 was "
        f"{np.mean(after[-20:]):.6f} and {np.mean(stayed[-20:]):.6f}. Picture: {PICTURE}"
    )


if __name__ == "__main__":
    main()
