"""A training in Flax NNX: the adapters' parameters and the rest, split, and one compiled step for all starts."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from automagic_optax import finish_warmup
from benchmarks.evidence import flax_methods
from benchmarks.evidence.optimizers import fields_of_ours
from benchmarks.evidence.variants import VARIANTS, Variant
from examples.digits_diffusion import data, diffusion, training
from examples.digits_diffusion.model import Denoiser, with_adapters


class Start(NamedTuple):
    """What a run begins with: the model with its adapters, images, a held-out batch, a key for the batches."""

    model: Denoiser
    images: jax.Array
    held_out: Any
    key: jax.Array
    batch: int


def build_base(sizes: Any) -> dict[str, torch.Tensor]:
    """A denoiser of 5 to 9, all of it trained with AdamW; its arrays by number."""
    model = Denoiser(data.PIXELS, sizes.width, sizes.depth, nnx.Rngs(0))
    schedule = optax.warmup_cosine_decay_schedule(0.0, sizes.base_rate, 50, sizes.base_steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)
    known = jnp.asarray(data.load().only(data.NEW_CLASSES).images)
    for _ in range(sizes.base_steps):
        training.train_step(model, optimizer, known, jax.random.key(0), batch=sizes.base_batch, wrt=nnx.Param)
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return {str(number): torch.from_numpy(np.array(leaf)) for number, leaf in enumerate(leaves)}


def start(base: dict[str, torch.Tensor], sizes: Any, seed: int) -> Start:
    """Fresh adapters on the frozen base."""
    model = Denoiser(data.PIXELS, sizes.width, sizes.depth, nnx.Rngs(0))
    leaves = [jnp.asarray(base[str(number)].numpy()) for number in range(len(base))]
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(nnx.state(model, nnx.Param)), leaves))
    train, held_out = data.split(data.load().only(data.OLD_CLASSES), held_out=0.2, seed=0)
    fixed = training.held_out_batch(held_out.images, sizes.held_out_noises, jax.random.key(12345))
    adapted = with_adapters(model, sizes.rank, nnx.Rngs(seed + 1))
    return Start(adapted, jnp.asarray(train.images), fixed, jax.random.key(seed), sizes.batch)


class FlaxSession:
    """A training of `nnx.LoRA` adapters by an optax transformation."""

    def __init__(self, begin: Start, variant: Variant, start: float, steps: int) -> None:
        self.begin, self.variant, self.start, self.steps = begin, variant, start, steps
        self.graph, self.params, self.rest = nnx.split(begin.model, nnx.LoRAParam, ...)
        self.opt_state = flax_methods.build(variant, start, steps).init(self.params)
        self.mean = self.params
        ours = variant.optimizer == "ours"
        self.warm_up = fields_of_ours(variant, start, steps)["warmup_steps"] if ours else None

    def advance(self, step: int) -> None:
        if step == self.warm_up:
            self.opt_state = finish_warmup(self.opt_state)
        begin = self.begin
        self.params, self.mean, self.opt_state = _step(
            self.params, self.mean, self.opt_state, self.rest, begin.images, begin.key, jnp.float32(self.start), step,
            graph=self.graph, variant=self.variant.name, steps=self.steps, batch=begin.batch,
        )  # fmt: skip

    def validation_loss(self) -> float:
        params = flax_methods.judged(self.variant, self.opt_state, self.params, self.mean)
        return float(_held_out_loss(params, self.rest, self.begin.held_out, graph=self.graph))

    def found_rate(self) -> float | None:
        return flax_methods.found_rate(self.variant, self.opt_state, self.start)

    def state(self) -> dict[str, Any]:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        kept = (self.opt_state, self.mean) if self.variant.optimizer == "dog" else self.opt_state
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(kept))
        return {"state_bytes": held, "adam_bytes": 8 * count, "parameters": count}

    def measures(self) -> dict[str, float]:
        return {}

    def further_results(self) -> dict[str, float]:
        return {}


@partial(jax.jit, static_argnames=("graph", "variant", "steps", "batch"))
def _step(
    params: Any,
    mean: Any,
    opt_state: Any,
    rest: Any,
    images: jax.Array,
    key: jax.Array,
    start: jax.Array,
    step: int,
    *,
    graph: Any,
    variant: str,
    steps: int,
    batch: int,
) -> tuple[Any, Any, Any]:
    image_key, noise_key = jax.random.split(jax.random.fold_in(key, step))
    chosen = images[jax.random.randint(image_key, (batch,), 0, images.shape[0])]
    noise, times = diffusion.noise_and_times(noise_key, batch, data.PIXELS)

    def loss(trained: Any) -> jax.Array:
        return diffusion.loss(nnx.merge(graph, trained, rest), chosen, noise, times)

    gradients = jax.grad(loss)(params)
    updates, opt_state = flax_methods.build(VARIANTS[variant], start, steps).update(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, flax_methods.average(mean, params, step), opt_state


@partial(jax.jit, static_argnames=("graph",))
def _held_out_loss(params: Any, rest: Any, held_out: Any, *, graph: Any) -> jax.Array:
    return diffusion.loss(nnx.merge(graph, params, rest), *held_out)
