"""The two ways to train the adapters: this project's optimizer, and AdamW at a given rate.

Both sit behind the same gradient clipping and have the same ramp, cosine schedule and weight decay.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from automagic_optax import automagic_8bit, learning_rate
from examples.digits_diffusion.settings import Settings

CLIP_NORM = 1.0


class Recipe(NamedTuple):
    """An optimizer to try.

    Attributes:
        name: for tables and legends.
        tx: the transformation.
        rate: the learning rate of a step (from 0), given the optimizer state after it.
        warmup_steps: after which `finish_warmup` applies, or None where there is no such thing.
    """

    name: str
    tx: optax.GradientTransformation
    rate: Callable[[int, Any], float]
    warmup_steps: int | None = None


def automagic(settings: Settings) -> Recipe:
    # The search begins low and rises by itself, so the schedule is only the cosine.
    schedule = optax.cosine_decay_schedule(settings.starting_rate, settings.tuning_steps)
    tx = optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        automagic_8bit(
            schedule,
            weight_decay=settings.weight_decay,
            warmup_steps=settings.search_steps,
            max_lr=settings.max_rate,
        ),
    )

    return Recipe("Automagic 8-bit", tx, lambda _, state: float(learning_rate(state)), settings.search_steps)


def adamw(rate: float, settings: Settings) -> Recipe:
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, settings.warmup_steps, settings.tuning_steps)
    tx = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.adamw(schedule, weight_decay=settings.weight_decay))
    return Recipe(f"AdamW {rate:g}", tx, lambda step, _: float(schedule(step)))
