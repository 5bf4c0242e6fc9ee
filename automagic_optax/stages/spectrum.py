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


@jax.custom_jvp
def eigh(symmetric: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues (n,), ascending, and eigenvectors (n, n), as columns, of a symmetric (n, n) matrix."""
    values, vectors = _eigh(symmetric)
    return values, vectors


@eigh.defjvp
def _no_derivative(primals: Any, tangents: Any) -> Any:
    # Eigenvectors have none where eigenvalues are equal.  `tail_and_strong` has one, and needs only its values here.
    raise NotImplementedError(
        "encourage_low_rank has first derivatives only: set lora_rank_penalty=False for derivatives of derivatives "
        "through updates"
    )


@jax.custom_batching.custom_vmap
def _eigh(symmetric: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(symmetric)
    return values, vectors


@_eigh.def_vmap
def _eigh_of_batch(size: int, batched: list[bool], symmetric: jax.Array) -> Any:
    # On a CPU jaxlib's eigh of several matrices occupies one thread of XLA's pool while it waits for other threads of
    # the pool, so as many such calls as there are threads block each other for ever.  One matrix at a time needs no
    # other thread, and takes no longer.
    del size, batched
    found = lax.platform_dependent(
        symmetric,
        cpu=lambda matrices: lax.map(_eigh, matrices),
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


class _Factors(NamedTuple):
    """The factors of singular directions, each (1, n): ωᵢ, 1 / √(λᵢ + δ²) and their product, that of T."""

    weak: jax.Array
    inverse: jax.Array
    tail: jax.Array


def _factors(values: jax.Array) -> _Factors:
    values = values[None, :]
    weak = 1 / (1 + jnp.square(values / jnp.mean(values)))
    inverse = 1 / jnp.sqrt(values + f32(LOW_RANK_FLOOR) * jnp.max(values))
    return _Factors(weak, inverse, weak * inverse)


@jax.custom_jvp
def tail_and_strong(W: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """T and P g, both (n, m), and λ, (n,), of W as for `spectrum`."""
    of_w = spectrum(W)
    return _rebuilt(of_w, _factors(of_w.values), product(of_w.Q.T, g))


def _rebuilt(of_w: Spectrum, factors: _Factors, seen: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    strong = product(of_w.Q * (1 - factors.weak), seen)
    return product(of_w.Q * factors.tail, of_w.rows), strong, of_w.values


@tail_and_strong.defjvp
def _derivative(primals: Any, tangents: Any) -> Any:
    """The derivatives of T and P g, right for equal λ too; λ counts as a constant, since nothing but reports uses it.

    T = f(A) W and P = 1 − ω(A) with A = W Wᵀ.  In the basis of Q the derivative of f(A) is that of A times the divided
    differences (f(λᵢ) − f(λⱼ)) / (λᵢ − λⱼ) (Daleckii and Krein).  Both are written here without the difference of the
    eigenvalues: those of ω are −ωᵢ ωⱼ (λᵢ + λⱼ) / λ̄², and those of h = 1 / √(λ + δ²) are −hᵢ² hⱼ² / (hᵢ + hⱼ).
    """
    (W, g), (dW, dg) = primals, tangents
    Q, rows, values = of_w = spectrum(W)
    factors, seen = _factors(values), product(Q.T, g)
    (w_i, h_i, f_i), (w_j, h_j, f_j) = jax.tree.map(jnp.transpose, factors), factors
    mean, top = jnp.mean(values), jnp.max(values)
    of_weak = -w_i * w_j * (values[:, None] + values[None, :]) / jnp.square(mean)
    of_inverse = -jnp.square(h_i * h_j) / (h_i + h_j)

    moved = product(Q.T, dW)
    half = product(moved, rows.T)
    dA = half + half.T
    changes = jnp.diagonal(dA)
    # Both factors also depend on λ̄, and h on the largest λ.
    largest = (values >= top * f32(1 - 1e-5)).astype(jnp.float32)  # of equal ones the mean
    d_mean, d_top = jnp.mean(changes), jnp.sum(largest * changes) / jnp.sum(largest)
    by_mean = 2 * jnp.square(w_j * values[None, :]) / (jnp.square(mean) * mean) * d_mean
    by_top = f_j * jnp.square(h_j) * f32(-0.5 * LOW_RANK_FLOOR) * d_top
    d_weak = of_weak * dA + jnp.diag(by_mean[0])
    d_tail = (of_weak * h_i + w_j * of_inverse) * dA + jnp.diag((by_mean * h_j + by_top)[0])
    dT = product(Q, product(d_tail, rows) + f_i * moved)
    dP_g = product(Q, (1 - w_i) * product(Q.T, dg) - product(d_weak, seen))
    return _rebuilt(of_w, factors, seen), (dT, dP_g, jnp.zeros_like(values))


def effective_rank(values: jax.Array) -> jax.Array:
    """exp of the entropy of the normalized singular values √λ: between 1 and their number, 0 where all are 0."""
    sigma = jnp.sqrt(values)
    share = sigma / jnp.where(jnp.sum(sigma) > 0, jnp.sum(sigma), f32(1))
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, f32(1))), f32(0)))
    return jnp.where(jnp.sum(sigma) > 0, jnp.exp(entropy), f32(0))
