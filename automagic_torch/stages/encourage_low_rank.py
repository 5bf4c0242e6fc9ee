"""Stage 4: shrinks the weak singular directions of adapters (docs/algorithm.md, section 4.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from automagic_core import Layout
from automagic_core.config.constants import LOW_RANK_FLOOR
from automagic_torch.arrays.axes import array_shape, rows_come_last
from automagic_torch.arrays.stacked import chosen


def encourage_low_rank(
    g: Tensor,
    w: Tensor,
    *,
    strength: float,
    emphasis: float,
    layout: Layout = "torch",
    embedding: bool = False,
    batched: bool = False,
) -> Tensor:
    """Strengthens g along the strong singular directions of w, and adds a pull that shrinks the weak ones.

    Everything is computed in float64, a batch at once: float32 is not exact enough for the strongest directions, whose
    factors may be as small as 1 / n² of the others.  On CUDA `torch.linalg.eigh` waits for the device once.

    Args:
        g: gradient of a 2-D array, finite float32, or with `batched` of such arrays stacked along a leading axis.
        w: the parameter, the shape of g.
        strength: ρ in [0, 1).
        emphasis: ε ≥ 1.
        layout, embedding: decide which side is the row axis, which matters only for square arrays.
        batched: the first axis of g and w counts arrays.

    Returns:
        The new gradient, float32; g itself where the array is not 2-D, and where w is zero or not finite.

    Raises:
        ValueError: g and w have different shapes.
    """
    if g.shape != w.shape:
        raise ValueError(f"g has shape {tuple(g.shape)}, w {tuple(w.shape)}; valid: the same shape")
    shape = array_shape(g, batched)
    if len(shape) != 2 or 0 in g.shape:
        return g
    if not batched:
        g, w = g[None], w[None]
    transposed = shape[1] < shape[0] or (shape[0] == shape[1] and rows_come_last(layout, embedding))

    W = w.to(torch.float64, copy=True)
    gram = W.mT @ W if transposed else W @ W.mT
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    usable = trace.isfinite() & (trace > 0)
    # `eigh` accepts zeros but no NaN.
    values, Q = torch.linalg.eigh(torch.where(usable[:, None, None], gram, 0.0))
    weak, M, norm = tail(values, Q)
    kept = torch.eye(len(Q[0]), dtype=Q.dtype, device=Q.device) + (emphasis - 1) * _rebuilt(1 - weak, Q)

    # These are the largest arrays, so their memory is reused: T becomes the result, and g replaces W.
    result = W @ M if transposed else M @ W
    gradient = W.copy_(g)
    result.mul_((strength * _norms(gradient) / norm)[:, None, None])
    result.baddbmm_(gradient, kept) if transposed else result.baddbmm_(kept, gradient)
    result = chosen(usable, result.float(), g)
    return result if batched else result[0]


def tail(values: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix M that gives T = M W.

    Args:
        values, Q: eigenvalues and eigenvectors of W Wᵀ, shorter side first: float64, (arrays, side[, side]).

    Returns:
        ωᵢ; the symmetric M = Q diag(ωᵢ / √(λᵢ + δ²)) Qᵀ; and ‖T‖ for every array.
    """
    values = values.clamp(min=0.0)
    weak = 1 / (1 + (values / values.mean(-1, keepdim=True)).square())
    factors = weak / (values + LOW_RANK_FLOOR * values.amax(-1, keepdim=True)).sqrt()
    return weak, _rebuilt(factors, Q), (factors.square() * values).sum(-1).sqrt()


def _rebuilt(values: Tensor, Q: Tensor) -> Tensor:
    """Q diag(values) Qᵀ."""
    return (Q * values.unsqueeze(-2)) @ Q.mT


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1))
    return norms
