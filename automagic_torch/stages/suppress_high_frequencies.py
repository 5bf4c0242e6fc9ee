"""Stage 3: damps frequencies above 0.3 cycles per sample (docs/algorithm.md, section 4.3)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from automagic_core import Layout, last_kept_frequency
from automagic_torch.arrays.axes import array_shape, spatial_from_end


def suppress_high_frequencies(g: Tensor, *, penalty: float, layout: Layout = "torch", batched: bool = False) -> Tensor:
    """Multiplies the energy above the cutoff by (1 − μ)² and leaves the rest as it is.

    Args:
        g: gradient of one array, finite float32, or with `batched` of arrays stacked along a leading axis.
        penalty: μ in [0, 1].
        layout: decides which axes are spatial axes (section 1.3).
        batched: the first axis of g counts arrays.

    Returns:
        The new gradient; g itself for an array that the stage leaves alone.
    """
    axes = spatial_from_end(array_shape(g, batched), layout)
    if axes is None:
        return g
    lengths = [g.shape[axis] for axis in axes]
    spectrum = torch.fft.rfft2(g, dim=axes)
    factors = _factors(lengths[0], lengths[1], penalty, g.device)
    # Other axes follow the spatial ones in kernels of the Flax layout.
    factors = factors.view(*factors.shape, *[1] * (-axes[1] - 1))
    # Only the damped part goes through the FFT, since its rounding errors are then as small as that part.
    damped: Tensor = torch.fft.irfft2(spectrum.mul_(factors), s=lengths, dim=axes)
    return g - damped


def _factors(n1: int, n2: int, penalty: float, device: torch.device) -> Tensor:
    """μ · H for all entries of an rfft2: float32, (n1, n2 // 2 + 1)."""
    # Large ones are not kept, since they would need half as much memory as the gradients.
    make = _kept_factors if n1 * n2 <= 2**16 else _new_factors
    return make(n1, n2, penalty, device)


def _new_factors(n1: int, n2: int, penalty: float, device: torch.device) -> Tensor:
    is_high = torch.arange(n2 // 2 + 1, device=device) > _last_kept(n1, n2, device)[:, None]
    return penalty * is_high.view(torch.uint8).float()


_kept_factors = lru_cache(maxsize=64)(_new_factors)


@lru_cache(maxsize=256)
def _last_kept(n1: int, n2: int, device: torch.device) -> Tensor:
    return torch.from_numpy(last_kept_frequency(n1, n2).copy()).to(device, non_blocking=True)
