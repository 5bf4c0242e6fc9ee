"""A singular-value decomposition in float32 that stays accurate for weak directions.

`docs/algorithm.md`, section 4.4.  Its cost is that of the short side of the matrix.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from automagic_core.config.constants import LOW_RANK_FLOOR
from automagic_optax.sharding.placement import whole

f32 = np.float32
_HIGHEST = jax.lax.Precision.HIGHEST  # otherwise an accelerator multiplies in fewer bits


class Spectrum(NamedTuple):
    """W = Q · rows.

    Attributes:
        Q: (n, n), orthonormal columns.
        rows: QᵀW, (n, m); row i is the singular value σᵢ times its right singular vector.
        values: λᵢ = σᵢ², (n,).
    """

    Q: jax.Array
    rows: jax.Array
    values: jax.Array


def spectrum(W: jax.Array) -> Spectrum:
    """Decomposes W of shape (n, m), n ≤ m, |W| ≤ 1.

    `eigh` of the Gram matrix leaves some 10⁻⁷ of the strong directions in the weak ones, and so does a float32 product
    QᵀW.  That is too much: stage 4 may weight the strongest direction by as little as 1 / n² and weak ones by 1, and
    for n = 64 the noise would be a third of T.  So the rows QᵀW are computed more exactly than float32.  They should
    be orthogonal, so what is left of strong directions in weak ones shows in their products and is subtracted.
    """
    _, Q = eigh(product(W, W.T))
    rows = exact_product(Q.T, W)
    overlap = product(rows, rows.T)
    lengths = jnp.diagonal(overlap)
    gap = lengths[None, :] - lengths[:, None]
    # Directions of about the same length may stay mixed, and so may those too weak for eigh to tell apart: stage 4
    # treats them almost alike.
    longer = jnp.maximum(lengths[None, :], lengths[:, None])
    leak = (jnp.abs(gap) > f32(0.5) * longer) & (longer > f32(_RESOLVED) * jnp.max(lengths))
    turn = jnp.where(leak, overlap / jnp.where(leak, gap, f32(1)), f32(0))
    rows = rows + product(turn.T, rows)
    Q = Q + product(Q, turn)
    return Spectrum(Q, rows, jnp.sum(jnp.square(rows), axis=1))


@jax.custom_batching.custom_vmap
def eigh(symmetric: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues (n,), ascending, and eigenvectors (n, n), as columns, of a symmetric (n, n) matrix."""
    values, vectors = jnp.linalg.eigh(symmetric)
    return values, vectors


@eigh.def_vmap
def _eigh_of_batch(size: int, batched: list[bool], symmetric: jax.Array) -> Any:
    # On a CPU jaxlib's eigh of several matrices occupies one thread of XLA's pool while it waits for other threads of
    # the pool, so as many such calls as there are threads block each other for ever.  One matrix at a time needs no
    # other thread, and takes no longer.
    del size, batched
    found = lax.platform_dependent(
        symmetric,
        cpu=lambda matrices: lax.map(eigh, matrices),
        default=lambda matrices: tuple(jnp.linalg.eigh(matrices)),
    )
    return found, (True, True)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a · b in full float32, whole on every device of a mesh: in parts it would be summed in another order."""
    return whole(jnp.matmul(a, b, precision=_HIGHEST))


def power_of_two_above(x: jax.Array) -> jax.Array:
    """The power of two p with |x| / p in [1/2, 1): 0 for |x| < 10⁻³⁸, infinite for huge x."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.uint32) & np.uint32(0x7F800000)
    return 2 * jax.lax.bitcast_convert_type(bits, jnp.float32)


def scaled(W: jax.Array) -> tuple[jax.Array, jax.Array]:
    """W divided by a power of two so that |W| < 1, and whether W is usable: finite and not zero.

    Division by a power of two is exact.  Divided by its largest magnitude itself, a W of a single direction would gain
    noise in all others.  An identity takes the place of an unusable W, so that no NaN is made.
    """
    scale = power_of_two_above(jnp.max(jnp.abs(W)))
    usable = (scale > 0) & jnp.isfinite(scale)
    identity = jnp.eye(W.shape[0], W.shape[1], dtype=jnp.float32)
    return jnp.where(usable, W / jnp.where(usable, scale, f32(1)), identity), usable


def exact_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a · b with an absolute error of about 2⁻³⁶, for float32 matrices whose elements are at most 1 in magnitude.

    Both are cut into slices of so few bits that the product of two slices is summed without any rounding.  Products
    are added from the highest binary places down, so large terms cancel before small ones are added.

    Reference: Ozaki et al., *Error-free transformations of matrix multiplication by using fast routines of matrix
    multiplication*, Numerical Algorithms 59 (2012).
    """
    bits = (24 - math.ceil(math.log2(max(a.shape[1], 2)))) // 2
    count = math.ceil(_PLACES / bits)
    a_slices, b_slices = _slices(a, bits, count), _slices(b, bits, count)
    total = jnp.zeros((a.shape[0], b.shape[1]), jnp.float32)
    for place in range(count):
        for i in range(place + 1):
            total = total + product(a_slices[i], b_slices[place - i])
    return total


_RESOLVED = 1e-5
"""From this share of the largest λ on, eigh of a float32 Gram matrix tells a direction from weaker ones."""
_PLACES = 36
"""How many binary places `exact_product` computes."""


def _slices(x: jax.Array, bits: int, count: int) -> list[jax.Array]:
    slices = []
    for index in range(1, count + 1):
        unit = f32(2.0 ** (bits * index))
        part = jnp.round(x * unit) / unit
        slices.append(part)
        x = x - part
    return slices


def tail_and_strong(of_w: Spectrum, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """T and P g, both (n, m)."""
    values = of_w.values
    floor = f32(LOW_RANK_FLOOR) * jnp.max(values)
    weak = 1 / (1 + jnp.square(values / jnp.mean(values)))
    T = product(of_w.Q * (weak / jnp.sqrt(values + floor)), of_w.rows)
    seen = product(of_w.Q.T, g)
    return T, product(of_w.Q * (1 - weak), seen)


def effective_rank(values: jax.Array) -> jax.Array:
    """exp of the entropy of the normalized singular values √λ: between 1 and their number, 0 where all are 0."""
    sigma = jnp.sqrt(values)
    share = sigma / jnp.where(jnp.sum(sigma) > 0, jnp.sum(sigma), f32(1))
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, f32(1))), f32(0)))
    return jnp.where(jnp.sum(sigma) > 0, jnp.exp(entropy), f32(0))
