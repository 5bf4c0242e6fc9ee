"""Other optax optimizers with 32-bit and with 8-bit states: ``python -m benchmarks.quantize_state``

Each trains the byte-level transformer from the same start on the same batches, as it is and inside `quantize_state`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.table import Table

from automagic_optax import QuantizedMoment, QuantizedState, quantize_state
from automagic_optax.arrays.parameter_places import parameter_places
from benchmarks import byte_transformer, results
from benchmarks.find_rate import validation_loss

Schedule = Callable[[Any], Any]

# Rates at which each trains well here: what rounding costs would be hidden in a run that goes nowhere.
OPTIMIZERS: dict[str, Callable[[Callable[[float], Schedule]], Any]] = {
    "adam": lambda peak: optax.adam(peak(3e-3)),
    "adamw": lambda peak: optax.adamw(peak(3e-3)),
    "adabelief": lambda peak: optax.adabelief(peak(3e-3)),
    "lion": lambda peak: optax.lion(peak(5e-4)),
    # At 0.3 it waits so long above the 3.1 of bytes without a context that 2 % are a matter of a few steps.
    "sgd": lambda peak: optax.sgd(peak(0.1), momentum=0.9),
    "rmsprop": lambda peak: optax.rmsprop(peak(1e-3), decay=0.99),
    "nadamw": lambda peak: optax.nadamw(peak(3e-3)),
    "adan": lambda peak: optax.adan(peak(3e-3)),
    "ademamix": lambda peak: optax.contrib.ademamix(peak(2e-3)),
    "muon": lambda peak: optax.contrib.muon(peak(1e-2)),
    "schedule_free_adamw": lambda peak: optax.contrib.schedule_free_adamw(3e-3, warmup_steps=30),
}


class Run(NamedTuple):
    """A training run.

    Attributes:
        params, state: at its end.
        loss: mean training loss of the last sixth of the steps.
    """

    params: Any
    state: Any
    loss: float


def optimizer(name: str, steps: int) -> Any:
    """One of `OPTIMIZERS`, its rate rising for a tenth of the steps and then falling to 0 on a cosine."""
    return OPTIMIZERS[name](lambda rate: optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps))


def train(tx: Any, shape: byte_transformer.Shape, steps: int, batch: int, seed: int = 0) -> Run:
    """Trains the byte-level transformer on Python's standard library."""
    params = byte_transformer.initial_params(jax.random.key(seed), shape)
    state = tx.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, windows: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(byte_transformer.loss)(params, windows, shape)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    text, rng = byte_transformer.standard_library().train, np.random.default_rng(seed)
    losses = []
    for _ in range(steps):
        params, state, loss = step(params, state, byte_transformer.windows(text, batch, shape.context, rng))
        losses.append(loss)
    return Run(params, state, float(np.mean(jax.device_get(losses[-steps // 6 :]))))


def bytes_of_states(run: Run) -> dict[bool, int]:
    """Bytes of all states in the parameters' shapes; under True those of copies of the parameters."""
    found = {True: 0, False: 0}
    places = parameter_places(run.params, run.state, is_leaf=lambda x: isinstance(x, QuantizedMoment))
    for place in places:
        if place.array.shape == place.parameter.shape:
            found[place.field == "z"] += sum(x.nbytes for x in jax.tree.leaves(place.array))
    return found


def _validation(name: str, run: Run) -> float:
    if name != "schedule_free_adamw":
        return validation_loss(run.params)
    state = run.state.inner_state if isinstance(run.state, QuantizedState) else run.state
    return validation_loss(optax.contrib.schedule_free_eval_params(state, run.params))


def main() -> None:
    """Prints the table and writes quantize_state.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize_state", description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    options = parser.parse_args()
    table = Table(title=f"Validation loss after {options.steps} steps", title_justify="left")
    for column in ("optimizer", "seed", "32-bit states", "8-bit states", "apart", "bytes of its moments"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    rows = []
    for name in options.only:
        for seed in range(options.seeds):
            inner = optimizer(name, options.steps)
            plain, eight = (
                train(tx, byte_transformer.Shape(), options.steps, options.batch, seed)
                for tx in (inner, quantize_state(inner))
            )
            losses = _validation(name, plain), _validation(name, eight)
            share = bytes_of_states(eight)[False] / bytes_of_states(plain)[False]
            rows.append({"optimizer": name, "seed": seed, "32 bits": losses[0], "8 bits": losses[1], "bytes": share})
            apart = losses[1] / losses[0] - 1
            table.add_row(name, str(seed), *(f"{x:.4f}" for x in losses), f"{apart:+.2%}", f"{share:.1%}")
            print(f"{name}: {losses[0]:.4f} {losses[1]:.4f} {apart:+.2%}", flush=True)
    results.console().print(table)
    results.write(
        results.FOLDER / "quantize_state.json", {"steps": options.steps, "batch": options.batch, "runs": rows}
    )


if __name__ == "__main__":
    main()
