"""The matrix functions of stage 4, without eigenvectors (`docs/algorithm.md`, section 4.4).

All are functions of the Gram matrix of an adapter, (n, n) for its shorter side n.  They are computed in float64 where
there is one: a float32 Gram matrix would leave noise of strong directions in weak ones.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from automagic_core.config.constants import INVERSE_ROOT_STEPS, LARGEST_SQUARINGS, LOW_RANK_FLOOR
from automagic_optax.arrays.means import WITH_FLOAT64
from automagic_optax.sharding.placement import whole

f32 = np.float32


class Directions(NamedTuple):
    """What stage 4 does to the directions of W.

    Attributes:
        tail: F, with T = F W up to a factor; as exact as `wide` numbers.
        weak: Ω, with P g = g − Ω g; float32.
        length: ‖F W‖, float32 scalar.
    """

    tail: jax.Array
    weak: jax.Array
    length: jax.Array


def wide_numbers() -> contextlib.AbstractContextManager[Any]:
    """Inside of it there is float64, where the backend has it."""
    return jax.enable_x64(True) if _wide() == np.float64 else contextlib.nullcontext()


def _wide() -> Any:
    return np.float64 if jax.default_backend() in WITH_FLOAT64 else np.float32


def widened(x: jax.Array) -> jax.Array:
    """x in float64, where the backend has it."""
    return lax.convert_element_type(x, _wide())


def narrowed(x: jax.Array) -> jax.Array:
    """x in float32."""
    return lax.convert_element_type(x, np.float32)


def product(a: jax.Array, b: jax.Array, turned: bool = False) -> jax.Array:
    """a · b, or a · bᵀ, in full precision; whole on every device of a mesh: in parts it would be summed otherwise."""
    axes = (((1,), (1 if turned else 0,)), ((), ()))
    return whole(lax.dot_general(a, b, axes, precision=lax.Precision.HIGHEST))


def gram(W: jax.Array) -> jax.Array:
    """W Wᵀ in wide numbers."""
    W = widened(W)
    return product(W, W, turned=True)


def directions(G: jax.Array) -> Directions:
    """F, Ω and ‖F W‖ from the Gram matrix G of W, inside `wide_numbers`; W is not zero."""
    n = G.shape[0]
    one = np.eye(n, dtype=_wide())
    K = G * (_number(n) / _trace(G))
    weak = _inverse(one + product(K, K))
    B = K * _number(1 / n)
    for squarings in range(1, LARGEST_SQUARINGS + 1):
        B = product(B, B)
        if squarings % 3 == 0 or squarings == LARGEST_SQUARINGS:  # three squarings stay far from the ends of the range
            B = B * (_number(1) / _trace(B))
    top = _inner(B, K)
    X: Any = None
    M = (K + top * _number(LOW_RANK_FLOOR) * one) * (_number(1 / (1 + LOW_RANK_FLOOR)) / top)
    for step, (a, b, c) in enumerate(INVERSE_ROOT_STEPS, 1):
        N = _number(a) * one + _number(b) * M + _number(c) * product(M, M)
        X = N if X is None else product(X, N)
        if step < len(INVERSE_ROOT_STEPS):
            M = product(N, product(M, N))
    F = product(weak, X) * lax.rsqrt(top * _number(1 + LOW_RANK_FLOOR))
    # ‖F W‖² = ⟨F G, F⟩
    length = lax.sqrt(_inner(product(F, G), F))
    return Directions(F, narrowed(weak), narrowed(length))


def _number(x: float) -> Any:
    return _wide()(x)


def _inner(a: jax.Array, b: Any) -> jax.Array:
    return jnp.sum(a * b)


def _trace(x: jax.Array) -> jax.Array:
    return _inner(x, np.eye(x.shape[0], dtype=_wide()))


@jax.custom_jvp
def _inverse(x: jax.Array) -> jax.Array:
    """Of a symmetric matrix with eigenvalues of at least 1."""
    with wide_numbers():  # also where JAX calls it later, for a derivative
        found: jax.Array = _one_inverse(x)
    return found


@_inverse.defjvp
def _of_inverse(primals: Any, tangents: Any) -> Any:
    with wide_numbers():
        found = _inverse(primals[0])
        return found, -product(product(found, tangents[0]), found)


def _by_cholesky(x: jax.Array) -> jax.Array:
    L = lax.linalg.cholesky(x)
    half = lax.linalg.triangular_solve(L, np.eye(x.shape[0], dtype=x.dtype), left_side=True, lower=True)
    return product(half.T, half)


_one_inverse = jax.custom_batching.custom_vmap(_by_cholesky)


@_one_inverse.def_vmap
def _inverse_of_batch(size: int, batched: list[bool], x: jax.Array) -> Any:
    del size, batched
    return one_at_a_time(_one_inverse, jax.vmap(_by_cholesky), x), True


def one_at_a_time(one: Any, many: Any, x: jax.Array) -> Any:
    """Calls `one` on each matrix on a CPU, elsewhere `many` on all.

    On a CPU jaxlib's functions of several matrices occupy a thread of XLA's pool while they wait for other threads of
    the pool, so as many such calls as there are threads block each other for ever.  One matrix at a time needs no
    other thread, and takes no longer.  `platform_dependent` asks where the arrays are, which the default backend does
    not tell.
    """
    return lax.platform_dependent(x, cpu=lambda x: lax.map(one, x), default=many)


def power_of_two_above(x: jax.Array) -> jax.Array:
    """The power of two p with |x| / p in [1/2, 1): 0 for |x| < 10⁻³⁸, infinite for huge x."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.uint32) & np.uint32(0x7F800000)
    return 2 * jax.lax.bitcast_convert_type(bits, jnp.float32)


def scaled(W: jax.Array) -> tuple[jax.Array, jax.Array]:
    """W divided by a power of two so that |W| < 1, and whether W is usable: finite and not zero.

    An identity takes the place of an unusable W, so that no NaN is made.
    """
    scale = power_of_two_above(jnp.max(jnp.abs(W)))
    usable = (scale > 0) & jnp.isfinite(scale)
    identity = np.eye(W.shape[0], W.shape[1], dtype=np.float32)
    return jnp.where(usable, W / jnp.where(usable, scale, f32(1)), identity), usable


@jax.custom_jvp
def effective_rank(G: jax.Array) -> jax.Array:
    """exp of the entropy of the normalized singular values of W, from its Gram matrix, inside `wide_numbers`.

    Between 1 and their number, 0 where all are 0.  A report, so it has no derivative.
    """
    sigma = narrowed(jnp.sqrt(jnp.maximum(_eigenvalues(G), 0)))
    share = sigma / jnp.where(jnp.sum(sigma) > 0, jnp.sum(sigma), f32(1))
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, f32(1))), f32(0)))
    return jnp.where(jnp.sum(sigma) > 0, jnp.exp(entropy), f32(0))


@effective_rank.defjvp
def _of_rank(primals: Any, tangents: Any) -> Any:
    with wide_numbers():
        rank = effective_rank(primals[0])
        return rank, jnp.zeros_like(rank)


@jax.custom_batching.custom_vmap
def _eigenvalues(symmetric: jax.Array) -> jax.Array:
    values: jax.Array = jnp.linalg.eigvalsh(symmetric)
    return values


@_eigenvalues.def_vmap
def _eigenvalues_of_batch(size: int, batched: list[bool], symmetric: jax.Array) -> Any:
    del size, batched
    return one_at_a_time(_eigenvalues, jnp.linalg.eigvalsh, symmetric), True
