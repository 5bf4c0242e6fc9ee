"""The singular-value decomposition of W at the cost of its short side, in float32 and exact for weak directions too."""

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
_HIGHEST = jax.lax.Precision.HIGHEST  # an accelerator would otherwise multiply in fewer bits


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

    eigh of the Gram matrix leaves some 10⁻⁷ of the strong directions in the weak ones, and so would a float32 product
    QᵀW.  Stage 4 gives weak directions up to ten times the weight of the strongest, whose own may be little more than
    1 / n²: for n = 64 the noise would be a third of T.  So the rows QᵀW are made more exactly than float32, and what
    they then show of strong directions in weak ones (they should be orthogonal) is taken out.
    """
    _, Q = eigh(product(W, W.T))
    rows = exact_product(Q.T, W)
    overlap = product(rows, rows.T)
    lengths = jnp.diagonal(overlap)
    gap = lengths[None, :] - lengths[:, None]
    # Directions of about one length may stay mixed, and so may those too weak for eigh to tell apart: stage 4 does
    # about the same to all of them.
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
    # On a CPU jaxlib's eigh of several matrices occupies one thread of XLA's pool until other threads of the pool have
    # worked for it: as many such calls as there are threads wait for each other for ever.  One matrix at a time needs
    # no other thread, and takes no longer.
    del size, batched
    found = lax.platform_dependent(
        symmetric,
        cpu=lambda matrices: lax.map(eigh, matrices),
        default=lambda matrices: tuple(jnp.linalg.eigh(matrices)),
    )
    return found, (True, True)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a · b in full float32, on a mesh made whole on every device: in parts it would be summed in another order."""
    return whole(jnp.matmul(a, b, precision=_HIGHEST))


def power_of_two_above(x: jax.Array) -> jax.Array:
    """The power of two that takes |x| into [1/2, 1) when x is divided by it; 0 for |x| < 10⁻³⁸, infinite for huge x.

    What is divided by it keeps every bit; divided by x itself, a W of a single direction would gain noise in all
    others.  Nothing of stage 4 depends on the scale of W.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.uint32) & np.uint32(0x7F800000)
    return 2 * jax.lax.bitcast_convert_type(bits, jnp.float32)


def exact_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a · b with an absolute error of about 2⁻³⁶, for float32 matrices of elements of at most 1 in magnitude.

    Both are cut into slices of so few bits that the products of two slices add up without any rounding; those of the
    highest places cancel before the lower ones join them.

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
"""λ relative to the largest above which eigh of a float32 Gram matrix tells a direction from weaker ones."""
_PLACES = 36
"""Binary places of `exact_product`."""


def _slices(x: jax.Array, bits: int, count: int) -> list[jax.Array]:
    slices = []
    for index in range(1, count + 1):
        unit = f32(2.0 ** (bits * index))
        part = jnp.round(x * unit) / unit
        slices.append(part)
        x = x - part
    return slices


def tail_and_strong(of_w: Spectrum, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """T and P g of section 4, both (n, m)."""
    values = of_w.values
    floor = f32(LOW_RANK_FLOOR) * jnp.max(values)
    weak = 1 / (1 + jnp.square(values / jnp.mean(values)))
    T = product(of_w.Q * (weak / jnp.sqrt(values + floor)), of_w.rows)
    seen = product(of_w.Q.T, g)
    return T, product(of_w.Q * (1 - weak), seen)


def effective_rank(values: jax.Array) -> jax.Array:
    """exp of the entropy of the normalised singular values √λ: between 1 and their number, 0 where all are 0."""
    sigma = jnp.sqrt(values)
    share = sigma / jnp.where(jnp.sum(sigma) > 0, jnp.sum(sigma), f32(1))
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, f32(1))), f32(0)))
    return jnp.where(jnp.sum(sigma) > 0, jnp.exp(entropy), f32(0))
