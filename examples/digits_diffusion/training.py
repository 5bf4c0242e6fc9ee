"""The train step, and the loop around it that every run shares."""

import sys
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from automagic_optax import finish_warmup
from examples.digits_diffusion import diffusion
from examples.digits_diffusion.data import PIXELS
from examples.digits_diffusion.model import Denoiser, with_adapters
from examples.digits_diffusion.optimizers import Recipe
from examples.digits_diffusion.settings import Settings

Batch = tuple[jax.Array, jax.Array, jax.Array]


class Run(NamedTuple):
    """What one fine-tuning run left behind."""

    name: str
    model: Denoiser
    optimizer: nnx.Optimizer[Denoiser]
    losses: list[float]
    held_out: dict[int, float]
    rates: list[float]
    step_seconds: float

    @property
    def final_loss(self) -> float:
        return self.held_out[max(self.held_out)]


@partial(nnx.jit, static_argnames=("batch", "wrt"))
def train_step(
    model: Denoiser,
    optimizer: nnx.Optimizer[Denoiser],
    images: jax.Array,
    key: jax.Array,
    *,
    batch: int,
    wrt: type[nnx.Param],
) -> jax.Array:
    """One step on a batch that depends on `key` and the number of the step alone, the same for every optimizer."""
    image_key, noise_key = jax.random.split(jax.random.fold_in(key, optimizer.step[...]))
    chosen = images[jax.random.randint(image_key, (batch,), 0, images.shape[0])]
    noise, times = diffusion.noise_and_times(noise_key, batch, PIXELS)
    gradient = nnx.value_and_grad(diffusion.loss, argnums=nnx.DiffState(0, wrt))
    loss, grads = gradient(model, chosen, noise, times)
    optimizer.update(model, grads)
    return loss


held_out_loss = nnx.jit(diffusion.loss)


def held_out_batch(images: np.ndarray, noises: int, key: jax.Array) -> Batch:
    """Each image `noises` times, with noise and times fixed once and for all."""
    order_key, noise_key = jax.random.split(key)
    # Times rise along the batch: shuffled, so that every image meets early and late ones.
    repeated = jax.random.permutation(order_key, jnp.tile(jnp.asarray(images), (noises, 1)))
    return repeated, *diffusion.noise_and_times(noise_key, len(repeated), PIXELS)


def train_base(images: np.ndarray, settings: Settings, key: jax.Array) -> Denoiser:
    """A denoiser trained from scratch, all of it, with AdamW."""
    model = Denoiser(PIXELS, settings.width, settings.depth, nnx.Rngs(settings.seed))
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.base_rate, 50, settings.base_steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)
    on_device = jnp.asarray(images)
    with progress("base, AdamW", settings.base_steps) as bar:
        for _ in bar:
            loss = train_step(model, optimizer, on_device, key, batch=settings.batch, wrt=nnx.Param)
            bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
    return model


def fine_tune(
    base: Denoiser, recipe: Recipe, images: np.ndarray, held_out: Batch, settings: Settings, key: jax.Array
) -> Run:
    """Fresh adapters on a frozen `base`, the same start for every recipe, trained by one of them."""
    model = with_adapters(base, settings.rank, nnx.Rngs(settings.seed + 1))
    optimizer = nnx.Optimizer(model, recipe.tx, wrt=nnx.LoRAParam)
    on_device = jnp.asarray(images)
    losses, rates, seconds = [], [], []
    checks = {0: float(held_out_loss(model, *held_out))}

    with progress(recipe.name, settings.tuning_steps) as bar:
        for step in bar:
            if step == recipe.warmup_steps:
                optimizer.opt_state = finish_warmup(optimizer.opt_state)
            started = time.perf_counter()
            loss = train_step(model, optimizer, on_device, key, batch=settings.batch, wrt=nnx.LoRAParam)
            losses.append(float(loss))
            seconds.append(time.perf_counter() - started)
            rates.append(recipe.rate(step, optimizer.opt_state))
            if (step + 1) % settings.held_out_every == 0 or step + 1 == settings.tuning_steps:
                checks[step + 1] = float(held_out_loss(model, *held_out))
            bar.set_postfix(
                loss=f"{losses[-1]:.3f}", held_out=f"{checks[max(checks)]:.4f}", lr=f"{rates[-1]:.1e}", refresh=False
            )
    # The median leaves out the steps that compiled.
    return Run(recipe.name, model, optimizer, losses, checks, rates, float(np.median(seconds)))


def progress(name: str, steps: int) -> Any:
    # A log file keeps every refresh of the bar, so there a refresh is rare.
    seconds = 0.2 if sys.stderr.isatty() else 10.0
    said = "compiling the first step"
    return tqdm(range(steps), desc=f"{name:>16}", mininterval=seconds, maxinterval=seconds, unit="step", postfix=said)
