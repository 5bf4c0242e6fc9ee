"""One run that begins in PyTorch, goes on in JAX and ends in PyTorch: ``python -m examples.both_frameworks``

A classifier of digits changes the framework in mid-search and again after it, beside the same run in PyTorch alone.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from sklearn.datasets import load_digits

from automagic_optax import automagic_8bit, from_torch_state, to_torch_state
from automagic_torch import AutomagicCameAMP8bit

STEPS, TO_JAX, TO_TORCH, BATCH = 300, 80, 200, 256
FIELDS: dict[str, Any] = {"profile": "balanced", "max_lr": 1.0, "warmup_steps": 120}
PICTURE = Path("out/examples/both_frameworks.png")
DIGITS = load_digits()


def rate(step: Any) -> Any:
    """Falls to 0; what the search finds is a factor on it."""
    return 1e-5 * (1 - step / STEPS)


def batch_of(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and digits, the same in both frameworks."""
    chosen = np.random.default_rng(step).integers(len(DIGITS.data), size=BATCH)
    return (DIGITS.data[chosen] / 16).astype(np.float32), DIGITS.target[chosen]


class InTorch:
    """The classifier and its optimizer in PyTorch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
        self.optimizer = AutomagicCameAMP8bit(self.model.named_parameters(), lr=1e-5, force_8bit=True, **FIELDS)

    def train(self, steps: range) -> list[float]:
        """The loss of every step."""
        losses = []
        for step in steps:
            self.optimizer.param_groups[0]["lr"] = rate(step)
            x, y = map(torch.from_numpy, batch_of(step))
            loss = torch.nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


def forward(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The same classifier in JAX, on PyTorch's arrays, which are (out, in)."""
    scores = jax.nn.relu(x @ params["0.weight"].T + params["0.bias"]) @ params["2.weight"].T + params["2.bias"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


def train_in_jax(params: Any, state: Any, steps: range) -> tuple[Any, Any, list[float]]:
    """The parameters, the state, and the loss of every step."""
    tx = automagic_8bit(rate, layout="torch", **FIELDS)

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple:
        loss, grads = jax.value_and_grad(forward)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for x, y in map(batch_of, steps):
        params, state, loss = step(params, state, x, y)
        losses.append(float(loss))
    return params, state, losses


def main() -> None:
    """Trains, prints and draws."""
    print(f"Trains a classifier for {STEPS} steps, in two frameworks and in one: half a minute.", flush=True)
    run = InTorch()
    losses = run.train(range(TO_JAX))

    params = {name: jnp.array(p.detach().numpy()) for name, p in run.model.named_parameters()}
    state = from_torch_state(run.optimizer.state_dict(), params)
    params, state, in_jax = train_in_jax(params, state, range(TO_JAX, TO_TORCH))

    run.model.load_state_dict({name: torch.tensor(np.asarray(array)) for name, array in params.items()})
    run.optimizer.load_state_dict(to_torch_state(state, params, like=run.optimizer.state_dict()))
    losses += in_jax + run.train(range(TO_TORCH, STEPS))

    alone = InTorch().train(range(STEPS))

    figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
    axes.semilogy(alone, color="#c3cad2", linewidth=4, label="PyTorch alone")
    for begin, end, colour, label in (
        (0, TO_JAX, "#c8452d", "PyTorch"),
        (TO_JAX, TO_TORCH, "#2b5fa5", "JAX"),
        (TO_TORCH, STEPS, "#c8452d", None),
    ):
        axes.semilogy(range(begin, end), losses[begin:end], color=colour, linewidth=1, label=label)
    axes.axvline(FIELDS["warmup_steps"], color="black", linewidth=0.8, linestyle=":", label="the search ends")
    axes.set(title="Loss of one run that changes the framework twice", xlabel="step", ylabel="loss")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=85)
    both, one = (float(np.mean(each[-50:])) for each in (losses, alone))
    print(
        f"Seen: the mean loss of the last 50 steps is {both:.5f}, and {one:.5f} where PyTorch trained alone: "
        f"{abs(both / one - 1):.2%} apart. Picture: {PICTURE}"
    )


if __name__ == "__main__":
    main()
