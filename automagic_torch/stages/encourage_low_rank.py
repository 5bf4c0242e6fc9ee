"""Stage 4: shrinks the weak singular directions of adapters (docs/algorithm.md, section 4.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from automagic_core import Layout
from automagic_core.config.constants import INVERSE_ROOT_STEPS, LARGEST_SQUARINGS, LOW_RANK_FLOOR
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

    What is formed of W Wᵀ is float64, a batch at once: float32 is not exact enough for the strongest directions, whose
    factors may be as small as 1 / n² of the others.  Nothing waits for a device.

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

    W, gradient = w.double(), g.double()
    gram = W.mT @ W if transposed else W @ W.mT
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    usable = trace.isfinite() & (trace > 0)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    weak, F, norm = functions_of(torch.where(usable[:, None, None], gram, identity))
    pull = F * (strength * _norms(gradient) / norm)[:, None, None]
    T = W @ pull if transposed else pull @ W
    kept = emphasis * identity - (emphasis - 1) * weak
    result = torch.baddbmm(T, gradient, kept) if transposed else torch.baddbmm(T, kept, gradient)
    result = chosen(usable, result.float(), g)
    return result if batched else result[0]


def functions_of(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The functions of G = W Wᵀ, shorter side first, of which the stage is made (section 4.4).

    Args:
        gram: float64, (arrays, side, side), finite and not zero.

    Returns:
        Ω, whose eigenvalues are ωᵢ; F, with which T = F W up to a factor; and ‖F W‖ for every array.
    """
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    K = gram * (len(identity) / _trace(gram))
    L = torch.linalg.cholesky_ex(identity + K @ K).L
    half = torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False)
    weak = half.mT @ half

    power = K / len(identity)
    for _ in range(LARGEST_SQUARINGS):
        power = power @ power
        power = power / _trace(power)
    largest = (power * K).sum((-2, -1), keepdim=True)
    scale = (1 + LOW_RANK_FLOOR) * largest
    F = weak * scale.rsqrt() @ inverse_root((K + LOW_RANK_FLOOR * largest * identity) / scale)
    return weak, F, ((F @ gram) * F).sum((-2, -1)).clamp(min=0).sqrt()


def inverse_root(M: Tensor) -> Tensor:
    """M^(-1/2) of symmetric matrices with eigenvalues in [1/101, 1]."""
    identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    X = identity
    for a, b, c in INVERSE_ROOT_STEPS:
        N = a * identity + b * M + c * (M @ M)
        X = X @ N
        M = N @ M @ N
    return X


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1))
    return norms
