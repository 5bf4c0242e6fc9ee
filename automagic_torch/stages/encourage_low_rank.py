"""Stage 4, `encourage_low_rank` (section 4): adapters feel the tail of their singular values."""

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
    """Strengthens g along the strong directions of w and adds the gradient of w's smooth nuclear tail (section 4).

    Everything is computed in float64, a batch at once.  The weakest directions enter T with a factor of 10 / √λ, where
    λ is the largest eigenvalue, the strongest perhaps with only 1 / n² of 1 / √λ, where n is the shorter side: in
    float32 the rounding of the decomposition would drown it.  float64 is also out of reach of the settings that allow
    products of reduced precision, and the scale of w, which cancels, need not be taken out.

    On CUDA `torch.linalg.eigh` waits for the device once, to look at its error code; nothing else here does.

    Args:
        g: gradient, finite float32, of a 2-D array, or with `batched` of such arrays stacked along a leading axis.
        w: the parameter, the shape of g.
        strength: ρ in [0, 1).
        emphasis: ε ≥ 1.
        layout, embedding: which side is the row axis; it matters for square arrays only.
        batched: the first axis of g and w counts arrays.

    Returns:
        The new gradient, float32.  g where the array is not 2-D, and where w is zero or not finite.

    Raises:
        ValueError: g and w differ in shape.
    """
    if g.shape != w.shape:
        raise ValueError(f"g has shape {tuple(g.shape)}, w {tuple(w.shape)}; valid: the same shape")
    shape = array_shape(g, batched)
    if len(shape) != 2 or 0 in g.shape:
        return g
    if not batched:
        g, w = g[None], w[None]
    turned = shape[1] < shape[0] or (shape[0] == shape[1] and rows_come_last(layout, embedding))

    W = w.to(torch.float64, copy=True)
    gram = W.mT @ W if turned else W @ W.mT
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    usable = trace.isfinite() & (trace > 0)
    # Where there is nothing to decompose a matrix of zeros is, which eigh accepts.
    values, Q = torch.linalg.eigh(torch.where(usable[:, None, None], gram, 0.0))
    weak, M, norm = tail(values, Q)
    kept = torch.eye(len(Q[0]), dtype=Q.dtype, device=Q.device) + (emphasis - 1) * _rebuilt(1 - weak, Q)

    # The longest arrays here: T becomes the result, and W makes room for g.
    result = W @ M if turned else M @ W
    gradient = W.copy_(g)
    result.mul_((strength * _norms(gradient) / norm)[:, None, None])
    result.baddbmm_(gradient, kept) if turned else result.baddbmm_(kept, gradient)
    result = chosen(usable, result.float(), g)
    return result if batched else result[0]


def tail(values: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What makes T of W.

    Args:
        values, Q: eigenvalues and eigenvectors of W Wᵀ, shorter side first: float64, (arrays, side[, side]).

    Returns:
        wᵢ; the symmetric M = Q diag(wᵢ / √(λᵢ + δ²)) Qᵀ, with T = M W; and ‖T‖ for every array.
    """
    values = values.clamp(min=0.0)
    weak = 1 / (1 + (values / values.mean(-1, keepdim=True)).square())
    factors = weak / (values + LOW_RANK_FLOOR * values.amax(-1, keepdim=True)).sqrt()
    return weak, _rebuilt(factors, Q), (factors.square() * values).sum(-1).sqrt()


def _rebuilt(values: Tensor, Q: Tensor) -> Tensor:
    """Q diag(values) Qᵀ."""
    return (Q * values.unsqueeze(-2)) @ Q.mT


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1))
