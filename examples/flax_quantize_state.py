"""AdamW with 8-bit moments trains a LoRA in Flax NNX: ``python -m examples.flax_quantize_state``

A network that tells the digits 0 to 4 apart gets adapters and learns 5 to 9.  `quantize_state` stores the moments of
`optax.adamw` in 8 bits; the same run with plain `optax.adamw` stands beside it.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from automagic_optax import memory_report, quantize_state

WIDTH, RANK, BATCH, STEPS = 512, 16, 64, 300
PICTURE = Path("out/examples/flax_quantize_state.png")


class Network(nnx.Module):
    """64 pixels → scores of five digits, through two hidden layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(*sizes, rngs=rngs) for sizes in ((64, WIDTH), (WIDTH, WIDTH), (WIDTH, 5))])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def loss_of(model: Network, x: jax.Array, y: jax.Array) -> jax.Array:
    """Cross-entropy of the scores."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit(static_argnames="wrt")
def step(model: Network, optimizer: Any, x: jax.Array, y: jax.Array, wrt: Any) -> jax.Array:
    """One step on the parameters of kind `wrt`."""
    loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, wrt))(model, x, y)
    optimizer.update(model, grads)
    return loss


def train(model: Network, tx: optax.GradientTransformation, wrt: Any, x: Any, y: Any) -> tuple[list[float], Any]:
    """The loss of every step, and the state of the optimizer."""
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(STEPS):
        chosen = rng.integers(len(x), size=BATCH)
        losses.append(float(step(model, optimizer, x[chosen], y[chosen], wrt)))
    return losses, optimizer.opt_state


def with_adapters(base: Network) -> Network:
    """A copy of the network with `nnx.LoRA` around each layer."""
    model, rngs = nnx.clone(base), nnx.Rngs(1)
    model.layers = nnx.List(
        [nnx.LoRA(layer.in_features, RANK, layer.out_features, base_module=layer, rngs=rngs) for layer in model.layers]
    )
    return model


def main() -> None:
    """Trains, prints and draws."""
    print(f"Trains adapters of rank {RANK} twice, {STEPS} steps of optax.adamw each: half a minute.", flush=True)
    digits = load_digits()
    x, y = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
    old = digits.target < 5
    base = Network(nnx.Rngs(0))
    train(base, optax.adamw(1e-3), nnx.Param, x[old], y[old])

    found = {}
    for name, tx in (
        ("optax.adamw", optax.adamw(3e-3)),
        ("quantize_state(optax.adamw)", quantize_state(optax.adamw(3e-3))),
    ):
        model = with_adapters(base)
        losses, state = train(model, tx, nnx.LoRAParam, x[~old], y[~old] - 5)
        found[name] = losses, memory_report(state, nnx.state(model, nnx.LoRAParam))["state_bytes"]

    figure, (curves, bars) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(3, 2), layout="constrained")
    for (name, (losses, size)), colour in zip(found.items(), ("#2b5fa5", "#c8452d"), strict=True):
        smooth = np.convolve(losses, np.ones(10) / 10, "valid")
        curves.semilogy(smooth, "-" if "quant" not in name else "--", color=colour, label=name)
        bars.bar_label(bars.bar(name.replace("(", "(\n"), size / 1e3, color=colour), fmt="%.0f kB")
    curves.set(title="Loss on the digits 5 to 9, a mean over 10 steps", xlabel="step")
    curves.legend(frameon=False)
    bars.set(title="State of the optimizer", ylabel="kB")
    bars.margins(y=0.15)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=85)
    (plain, bytes_32), (ours, bytes_8) = found.values()
    print(
        f"Seen: with 8-bit moments the state takes {bytes_8:,} bytes, {bytes_8 / bytes_32:.0%} of {bytes_32:,}, and "
        f"the mean loss of the last 50 steps is {np.mean(ours[-50:]):.4f}, with 32 bits {np.mean(plain[-50:]):.4f}. "
        f"Picture: {PICTURE}"
    )


if __name__ == "__main__":
    main()
