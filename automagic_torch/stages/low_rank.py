"""Stage 4, `encourage_low_rank` (section 4): adapters feel the tail of their singular values."""

from __future__ import annotations

import torch
from torch import Tensor

from automagic_core import Layout
from automagic_core.constants import LOW_RANK_FLOOR
from automagic_torch.stages.axes import array_shape, rows_come_last


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

    The matrices are made and decomposed in float64, all of a batch at once.  A weak direction enters T with up to ten
    times the weight 1 of a direction as long as the longest, which itself may enter with little more than 1 / n² for a
    shorter side of n: in float32 the rounding of the decomposition would drown it.  float64 also keeps the products
    out of reach of the settings that allow reduced precision.

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
    turned = shape[1] < shape[0] or (shape[0] == shape[1] and rows_come_last(layout, embedding))
    W, gradient = (x.mT.double() if turned else x.double() for x in (w, g))

    peak = W.abs().amax((-2, -1), keepdim=True)
    usable = peak.isfinite() & (peak > 0)
    # Where there is nothing to decompose a matrix of zeros is, which eigh accepts.
    W = torch.where(usable, W / peak, 0.0)
    values, Q = torch.linalg.eigh(W @ W.mT)
    values = values.clamp(min=0.0).unsqueeze(-2)
    weak = 1 / (1 + (values / values.mean(-1, keepdim=True)).square())
    result = gradient
    if emphasis != 1:
        P = (Q * (1 - weak)) @ Q.mT
        result = result + (emphasis - 1) * (P @ gradient)
    if strength != 0:
        T = tail(W, Q, values, weak)
        result = result + (strength * _norm(gradient) / _norm(T)) * T
    result = torch.where(usable, result, gradient)
    return (result.mT if turned else result).float().contiguous()


def tail(W: Tensor, Q: Tensor, values: Tensor, weak: Tensor) -> Tensor:
    """T = Q diag(wᵢ / √(λᵢ + δ²)) Qᵀ W, whose singular values lie between 0 and 1.

    Args:
        W: scaled to a largest magnitude of 1, shorter side first, float64; batches behind leading axes.
        Q, values: eigenvectors and eigenvalues λ of W Wᵀ, the latter ≥ 0 and of shape (…, 1, side).
        weak: wᵢ, the shape of `values`.
    """
    floor = LOW_RANK_FLOOR * values.amax(-1, keepdim=True)
    return ((Q * (weak / (values + floor).sqrt())) @ Q.mT) @ W


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
