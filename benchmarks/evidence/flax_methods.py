"""The methods in JAX: each as its authors recommend, from optax where it has them (`rivals.recipes` says why)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from automagic_optax import automagic_8bit
from benchmarks.evidence.optimizers import fields_of_ours
from benchmarks.evidence.settings import RAMP_SHARE, WEIGHT_DECAY
from benchmarks.evidence.variants import Variant

AVERAGING = 8.0
"""γ of the polynomial average that DoG's authors combine it with."""

Start = Any
"""A float, or an array that a compiled step takes, so that all starts share one compilation."""


def cosine(rate: Start, steps: int, ramp: int) -> Callable[[Any], Any]:
    """`jobs.job.cosine` times a rate, of a step that may be traced."""

    def schedule(count: Any) -> Any:
        rise = jnp.minimum(1.0, (count + 1) / ramp) if ramp else 1.0
        return rate * rise * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count, steps) / steps))

    return schedule


def build(variant: Variant, start: Start, steps: int) -> optax.GradientTransformationExtraArgs:
    """The variant's transformation."""
    ramp = round(RAMP_SHARE * steps)
    if variant.optimizer == "ours":
        fields = fields_of_ours(variant, start, steps)
        return automagic_8bit(cosine(fields.pop("lr"), steps, 0), **fields)
    if variant.optimizer == "adamw":
        return optax.adamw(cosine(start, steps, ramp), weight_decay=WEIGHT_DECAY)
    if variant.optimizer == "prodigy":
        settings = {"betas": (0.9, 0.99), "safeguard_warmup": True, "weight_decay": WEIGHT_DECAY}
        return optax.contrib.prodigy(cosine(1.0, steps, 0), estim_lr0=start, **settings)
    if variant.optimizer == "d-adaptation":
        return optax.contrib.dadapt_adamw(cosine(1.0, steps, ramp), estim_lr0=start, weight_decay=WEIGHT_DECAY)
    if variant.optimizer == "mechanic":
        base = optax.adamw(cosine(1.0, steps, ramp), weight_decay=WEIGHT_DECAY)
        return optax.contrib.mechanize(base, s_init=start)
    if variant.optimizer == "dog":
        return optax.contrib.dog(init_step=("heuristic", start))
    if variant.optimizer == "schedule-free":
        return optax.contrib.schedule_free_adamw(start, warmup_steps=ramp, weight_decay=WEIGHT_DECAY)
    raise ValueError(f"optimizer = {variant.optimizer!r} is not known in JAX")


def average(old: Any, new: Any, count: Any) -> Any:
    """The polynomial average of iterates after the 0-based step `count`."""
    weight = (1 + AVERAGING) / (count + 1 + AVERAGING)
    return jax.tree.map(lambda mean, x: mean + weight * (x - mean), old, new)


def judged(variant: Variant, state: Any, params: Any, mean: Any) -> Any:
    """The parameters that a validation loss is taken of."""
    if variant.optimizer == "schedule-free":
        return optax.contrib.schedule_free_eval_params(state, params)
    return mean if variant.optimizer == "dog" else params


def found_rate(variant: Variant, state: Any, start: float) -> float | None:
    """The rate that was found, without the schedule; None where nothing searches."""
    get = optax.tree_utils.tree_get
    if variant.optimizer == "ours":
        scale = get(state, "log_rate_scale")
        return None if variant.tuned else start * float(jnp.exp(scale[...]))
    if variant.optimizer in ("prodigy", "d-adaptation"):
        return float(get(state, "estim_lr"))
    return float(jnp.sum(state.s)) if variant.optimizer == "mechanic" else None
