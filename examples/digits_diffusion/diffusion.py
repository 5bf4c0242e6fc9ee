"""The diffusion process: a cosine schedule, the denoising loss and the ancestral sampler.

An image x and noise e are mixed on a quarter circle, z = cos(a) x + sin(a) e with a = t * pi / 2, and the network
predicts v = cos(a) e - sin(a) x. From z and v the image follows by a rotation, well conditioned at every t.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]

# At t = 1 nothing of the image is left to predict from; below t = 0.05 the noise is finer than one grey level.
EARLIEST, LATEST = 0.05, 0.998


def mixing(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    angle = t * (jnp.pi / 2)
    return jnp.cos(angle), jnp.sin(angle)


def noise_and_times(key: jax.Array, count: int, pixels: int) -> tuple[jax.Array, jax.Array]:
    """Noise, and times spread evenly over the interval: far less scatter in the loss than independent times."""
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (count, pixels))
    strata = (jnp.arange(count) + jax.random.uniform(time_key)) / count
    return noise, EARLIEST + (LATEST - EARLIEST) * strata


def denoised(model: Denoiser, z: jax.Array, times: jax.Array) -> jax.Array:
    """The image that the model sees behind the noise.

    Clipped in training too: half of all pixels are pure white, and the network need not work out how to hit white
    exactly if anything whiter counts as white.
    """
    alpha, sigma = mixing(times[:, None])
    return jnp.clip(alpha * z - sigma * model(z, times), -1.0, 1.0)


def loss(model: Denoiser, images: jax.Array, noise: jax.Array, times: jax.Array) -> jax.Array:
    """Mean squared error of the image over the noise's variance; but for the clipping, that of v."""
    alpha, sigma = mixing(times[:, None])
    error = denoised(model, alpha * images + sigma * noise, times) - images
    return jnp.mean((error / sigma) ** 2)


def sample(model: Denoiser, key: jax.Array, count: int, pixels: int, steps: int) -> jax.Array:
    """Ancestral sampling: each step removes the predicted noise and adds a part of it anew."""
    grid = jnp.linspace(LATEST, EARLIEST, steps + 1)
    first_key, loop_key = jax.random.split(key)

    def step(z: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        now, then, step_key = inputs
        alpha, sigma = mixing(now)
        alpha_then, sigma_then = mixing(then)
        x = denoised(model, z, jnp.full((count,), now))
        noise = (z - alpha * x) / sigma
        # The scatter of the true reverse process, q(z_then | z_now, x).
        fresh = sigma_then / sigma * jnp.sqrt(jnp.maximum(1 - (alpha / alpha_then) ** 2, 0.0))
        kept = jnp.sqrt(jnp.maximum(sigma_then**2 - fresh**2, 0.0))
        return alpha_then * x + kept * noise + fresh * jax.random.normal(step_key, z.shape), None

    start = jax.random.normal(first_key, (count, pixels))
    z, _ = jax.lax.scan(step, start, (grid[:-1], grid[1:], jax.random.split(loop_key, steps)))
    return denoised(model, z, jnp.full((count,), grid[-1]))
