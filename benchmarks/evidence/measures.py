"""What the stages of section 4 are for, measured on what a run has learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from automagic_core import last_kept_frequency
from benchmarks.evidence.lora import LoRALinear


def energy_above_cutoff(x: Tensor) -> tuple[float, float]:
    """Energy above the cutoff of `suppress_high_frequencies`, and all energy, of an array (n₁, n₂)."""
    n1, n2 = x.shape
    energy = torch.fft.rfft2(x.double()).abs().square()
    # The halved axis: every column stands for itself and its mirror image, but the first and an even length's last.
    energy[:, 1 : (n2 + 1) // 2] *= 2
    last = torch.from_numpy(last_kept_frequency(n1, n2).copy())
    above = torch.arange(n2 // 2 + 1) > last[:, None]
    return float(energy[above].sum()), float(energy.sum())


def roughness(x: Tensor) -> tuple[float, float]:
    """Mean |L| and mean |x| of an array (n₁, n₂): L is the 5-point Laplacian with replicated borders."""
    wide = functional.pad(x.double()[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    centre = wide[1:-1, 1:-1]
    laplacian = wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:] - 4 * centre
    return float(laplacian.abs().mean()), float(centre.abs().mean())


def effective_rank(B: Tensor, A: Tensor) -> float:
    """exp of the entropy of the normalized singular values of B A; 0 where the product is 0."""
    # The product of the triangles has the same singular values and only rank × rank elements.
    _, upper_b = torch.linalg.qr(B.double())
    _, upper_a = torch.linalg.qr(A.double().T)
    values = torch.linalg.svdvals(upper_b @ upper_a.T)
    if not values.sum() > 0:
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


@torch.no_grad()
def measures(adapters: Sequence[LoRALinear], start: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The figures of one run.

    Args:
        adapters: as they ended.
        start: A and B of each as they began.

    Returns:
        `frequency_factors`, `frequency_product`: share of the learned update's energy above the cutoff, of A and B
        and of the products B A; `edge_factors`, `edge_product`: mean |Laplacian| over mean magnitude, averaged over
        arrays; `effective_rank`: of the products, averaged.
    """
    factors = []
    products = []
    for adapter, (old_a, old_b) in zip(adapters, start, strict=True):
        factors += [adapter.A - old_a, adapter.B - old_b]
        products.append(adapter.B @ adapter.A - old_b @ old_a)
    found = {"effective_rank": _mean([effective_rank(adapter.B, adapter.A) for adapter in adapters])}
    for name, arrays in (("factors", factors), ("product", products)):
        energies = [energy_above_cutoff(x) for x in arrays]
        found[f"frequency_{name}"] = sum(above for above, _ in energies) / sum(total for _, total in energies)
        found[f"edge_{name}"] = _mean([rough / size for rough, size in map(roughness, arrays) if size > 0])
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
