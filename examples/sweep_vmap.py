"""Eight values of the weight decay in one compiled run: ``python -m examples.sweep_vmap``

`jax.vmap` trains eight classifiers of digits side by side, each with a weight decay of its own.  Each searches for its
own rate.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

from automagic_optax import automagic_8bit, learning_rate

DECAYS = jnp.array([0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0])
STEPS, WARM_UP, BATCH, WIDTH, TRAINED_ON = 300, 120, 32, 128, 300
PICTURE = Path("out/examples/sweep_vmap.png")
DIGITS = load_digits()
X, Y = jnp.asarray(DIGITS.data / 16, jnp.float32), jnp.asarray(DIGITS.target)
ORDER = np.random.default_rng(0).permutation(len(X))
TRAIN, HELD_OUT = ORDER[:TRAINED_ON], ORDER[TRAINED_ON:]


def loss_of(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Cross-entropy of a classifier with one hidden layer."""
    scores = jax.nn.relu(x @ params["entry"]) @ params["exit"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


def train(weight_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A whole run: the held-out loss and the rate in force, (steps,) each."""
    tx = automagic_8bit(
        optax.cosine_decay_schedule(1e-5, STEPS),
        weight_decay=weight_decay,
        profile="balanced",
        max_lr=1.0,
        warmup_steps=WARM_UP,
    )
    first, second = jax.random.split(jax.random.key(0))
    params = {
        "entry": jax.random.normal(first, (64, WIDTH)) / 8,
        "exit": jax.random.normal(second, (WIDTH, 10)) / WIDTH**0.5,
    }
    x, y = X[TRAIN], Y[TRAIN]

    def step(carry: tuple, key: jax.Array) -> tuple:
        params, state = carry
        chosen = jax.random.randint(key, (BATCH,), 0, TRAINED_ON)
        updates, state = tx.update(jax.grad(loss_of)(params, x[chosen], y[chosen]), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (loss_of(params, X[HELD_OUT], Y[HELD_OUT]), learning_rate(state))

    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(jax.random.key(1), STEPS))[1]


def main() -> None:
    """Trains, prints and draws."""
    print(f"Trains {len(DECAYS)} classifiers side by side for {STEPS} steps, under vmap: half a minute.", flush=True)
    losses, rates = map(np.asarray, jax.jit(jax.vmap(train))(DECAYS))

    figure, (curves, found) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.92, len(DECAYS)))
    for decay, loss, rate, colour in zip(DECAYS, losses, rates, colours, strict=True):
        curves.semilogy(loss, color=colour, label=f"{decay:g}")
        found.semilogy(rate, color=colour)
    curves.set(title=f"Loss on {len(HELD_OUT)} digits held out", xlabel="step")
    found.axvline(WARM_UP, color="black", linewidth=0.8, linestyle=":")
    found.set(title="The rate that each run found", xlabel="step")
    figure.legend(title="weight_decay", loc="outside right upper", frameon=False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=85)
    end, highest = losses[:, -1], rates.max(axis=1)
    best, worst = end.argmin(), end.argmax()
    print(
        f"Seen: a weight decay of {DECAYS[best]:g} ends lowest, at a held-out loss of {end[best]:.3f}, and "
        f"{DECAYS[worst]:g} highest, at {end[worst]:.3f}; the rates found lie between {highest.min():.1e} and "
        f"{highest.max():.1e}. Picture: {PICTURE}"
    )


if __name__ == "__main__":
    main()
