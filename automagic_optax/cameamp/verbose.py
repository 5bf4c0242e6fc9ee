"""The messages of `verbose=True`: at the first step, every 100 steps and where the search ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import Config
from automagic_core.watching.verbose import EVERY, progress_message, search_message, start_message, tell
from automagic_optax.arrays.own_rules import own_rules
from automagic_optax.cameamp.memory_report import memory_report

LOGGER = "automagic_optax"


def start_line(config: Config, opt_state: Any, lora: int, embeddings: int) -> str:
    """The message of the first step.  It can be made while tracing, since it reads shapes and dtypes only.

    Args:
        config: the hyperparameters.
        opt_state: contains a `ScaleByCameampState`.
        lora, embeddings: how many arrays are adapters and how many are embeddings.
    """
    device = f"{jax.default_backend()} ({jax.local_devices()[0].device_kind})"
    return start_message(config, memory_report(opt_state), lora, embeddings, device)


def tell_step(
    config: Config,
    step: jax.Array,
    log_rate_scale: jax.Array,
    skipped: Any,
    *,
    rate: Any = None,
    peak_agreement: Any = None,
    start: Callable[[], str] | None = None,
) -> None:
    """Logs the message that is due after a step.  Unless `config.verbose`, nothing is compiled either.

    A compiled step looks at t, and calls the host at the first step, at every 100th and where the search ends.  JAX
    cannot keep such a program in its persistent compilation cache.  Of several processes only the first one logs.

    Args:
        config: the hyperparameters.
        step: int32 scalar, t.
        log_rate_scale: float32 scalar, ℓ.
        skipped: a tree of int32 scalars (`skipped_steps`); their sum is logged.
        rate: float32 scalar, η̂, or None where it is not known.
        peak_agreement: float32 scalar, P, or None where it is not known.
        start: makes the message of t = 1, by `start_line`.
    """
    if not config.verbose:
        return

    last = config.warmup_steps if config.searches else -1

    def speak(step: jax.Array, log_rate_scale: jax.Array, skipped: Any, max_lr: Any, *found: Any) -> None:
        total = sum((jnp.sum(x) for x in jax.tree.leaves(skipped)), start=jnp.zeros([], jnp.int32))
        line = None if start is None else start()

        def on_host(step: Any, log_rate_scale: Any, total: Any, max_lr: Any, *found: np.ndarray | None) -> None:
            if jax.process_index() != 0:
                return
            rate, peak = (None if x is None else float(x) for x in found)
            if step == 1 and line is not None:
                tell(LOGGER, line)
            # Under vmap this is called at every step.
            if step % EVERY == 0:
                tell(LOGGER, progress_message(int(step), rate, float(np.exp(log_rate_scale)), int(total)))
            if step == last:
                tell(LOGGER, search_message(int(step), rate, float(max_lr), peak))

        def under_own_rules(*values: Any) -> None:
            with own_rules():
                on_host(*values)

        jax.debug.callback(under_own_rules, step, log_rate_scale, total, max_lr, *found)

    operands = (step, log_rate_scale, skipped, config.max_lr, rate, peak_agreement if config.climbs else None)
    speaks = (step == 1) | (step % EVERY == 0) | (step == last)
    if isinstance(speaks, jax.core.Tracer):
        jax.lax.cond(speaks, speak, lambda *_: None, *operands)
    elif speaks:  # outside jit, cond compiles at each call
        speak(*operands)
