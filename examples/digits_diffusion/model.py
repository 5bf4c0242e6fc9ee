"""The denoiser, a residual network over the 64 pixels, and the LoRA adapters around its linear layers."""

import jax
import jax.numpy as jnp
from flax import nnx

FREQUENCIES = 32


def time_features(t: jax.Array) -> jax.Array:
    """Sines and cosines of the time, from half a period over the interval to a hundred of them."""
    frequencies = jnp.pi * jnp.geomspace(1.0, 200.0, FREQUENCIES)
    angles = t[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Block(nnx.Module):
    """Normalize, shift and scale by the time, two linear layers, and add."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(width, use_bias=False, use_scale=False, rngs=rngs)
        self.modulation = nnx.Linear(2 * FREQUENCIES, 2 * width, rngs=rngs)
        self.inner = nnx.Linear(width, width, rngs=rngs)
        # Starting from zero makes the block the identity, so that depth costs nothing at first.
        self.outer = nnx.Linear(width, width, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, h: jax.Array, features: jax.Array) -> jax.Array:
        scale, shift = jnp.split(self.modulation(features), 2, axis=-1)
        return h + self.outer(nnx.silu(self.inner(self.norm(h) * (1 + scale) + shift)))


class Denoiser(nnx.Module):
    def __init__(self, pixels: int, width: int, depth: int, rngs: nnx.Rngs) -> None:
        self.entry = nnx.Linear(pixels, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.exit = nnx.Linear(width, pixels, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, z: jax.Array, t: jax.Array) -> jax.Array:
        features = time_features(t)
        h = self.entry(z)
        for block in self.blocks:
            h = block(h, features)
        return self.exit(self.norm(h))


def with_adapters(base: Denoiser, rank: int, rngs: nnx.Rngs) -> Denoiser:
    """A copy of `base` whose linear layers are wrapped in `nnx.LoRA`; it starts as the same function."""
    model = nnx.clone(base)

    def wrap(layer: nnx.Linear) -> nnx.LoRA:
        return nnx.LoRA(layer.in_features, rank, layer.out_features, base_module=layer, rngs=rngs)

    model.entry, model.exit = wrap(model.entry), wrap(model.exit)
    for block in model.blocks:
        block.modulation, block.inner, block.outer = map(wrap, (block.modulation, block.inner, block.outer))
    return model
