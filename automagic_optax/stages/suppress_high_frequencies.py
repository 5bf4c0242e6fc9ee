"""Stage 3: damps what changes faster than 0.3 cycles per sample (`docs/algorithm.md`, section 4.3)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from automagic_core import Layout, check_field, check_layout, last_kept_frequency, picture_axes
from automagic_optax.arrays.batches import Batched, enter
from automagic_optax.arrays.checks import check_dtypes, dtype_of
from automagic_optax.arrays.with_types import with_types
from automagic_optax.sharding.placement import scalar_like, whole
from automagic_optax.stages.energy import energy, removed_share


class SuppressHighFrequenciesState(NamedTuple):
    """`energy_removed`: float32 scalar, the share of Σ g² that the stage removed in the last step."""

    energy_removed: jax.Array


def suppress_high_frequencies(
    penalty: Any = 0.05, *, layout: Layout = "flax", spatial_scope: str = "all"
) -> optax.GradientTransformationExtraArgs:
    """Damps the part of each gradient that changes faster than 0.3 cycles per sample.

    G is rfft2(g) over the spatial axes.  H is 1 for frequencies with √(f₁² + f₂²) > 0.3, else 0.  Then

        g ← irfft2((1 − μ · H) · G)

    The energy above the cutoff is multiplied by (1 − μ)², and the rest is untouched.

    Args:
        penalty: μ in [0, 1].
        layout: what the parameters' axes mean, ``"flax"`` or ``"torch"`` (section 1.1).
        spatial_scope: ``"conv"`` works on convolution kernels alone, ``"all"`` on matrices too.

    Returns:
        A transformation of any gradients.  It passes on arrays without two spatial axes of length 3 or more, and
        arrays with an element that is not finite.

    Raises:
        ValueError: `penalty` outside its range; a parameter of an integer or a complex dtype.

    Reference: section 4.3.

    Example:
        >>> tx = optax.chain(suppress_high_frequencies(0.05), optax.adam(1e-3))
    """
    check_field("frequency_penalty", penalty, "penalty")
    check_field("spatial_scope", spatial_scope)
    check_layout(layout)

    def is_picture(x: Any) -> bool:
        return picture_axes(x.shape, layout, spatial_scope) is not None

    def one(g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        before = energy(g)
        axes = picture_axes(g.shape, layout, spatial_scope)
        if axes is None:
            return g, before, before
        new = jnp.where(jnp.isfinite(before), _damped(g.astype(jnp.float32), axes, penalty), g.astype(jnp.float32))
        return new.astype(dtype_of(g)), before, energy(new)

    def update(
        updates: Any, state: SuppressHighFrequenciesState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SuppressHighFrequenciesState]:
        del params, extra_args
        if not isinstance(updates, Batched) and not any(map(is_picture, jax.tree.leaves(updates))):
            return updates, state
        batched, leave = enter(updates, updates)
        results = batched.map_in_turn(one)
        removed = removed_share([result[1] for result in results], [result[2] for result in results])
        return leave(batched.replace([result[0] for result in results])), SuppressHighFrequenciesState(removed)

    def init(params: Any) -> SuppressHighFrequenciesState:
        check_dtypes(params)
        return SuppressHighFrequenciesState(scalar_like(params, 0, jnp.float32))

    return with_types(optax.GradientTransformationExtraArgs(init, update))


def _damped(g: jax.Array, axes: tuple[int, int], penalty: Any) -> jax.Array:
    n1, n2 = (g.shape[axis] for axis in axes)
    # Compared in the program, which would else hold half as many constants as the array has elements.
    is_high = jnp.arange(n2 // 2 + 1) > jnp.asarray(last_kept_frequency(n1, n2))[:, None]
    is_high = is_high.reshape(is_high.shape + (1,) * (g.ndim - 1 - axes[1]))
    factors = jnp.asarray(penalty, jnp.float32) * is_high.astype(jnp.float32)
    # An FFT needs the whole array: it is gathered once here, and not again between the steps of the FFT.
    high = whole(jnp.fft.rfft2(whole(g), axes=axes) * factors)
    # Only the damped part is transformed and subtracted, so the rounding errors are as small as that part.
    return g - whole(jnp.fft.irfft2(high, s=(n1, n2), axes=axes))
