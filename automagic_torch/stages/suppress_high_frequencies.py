"""Stage 3: damps frequencies above 0.3 cycles per sample (docs/algorithm.md, section 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from automagic_core import Layout, last_kept_frequency
from automagic_torch.arrays.axes import array_shape, spatial_from_end
from automagic_torch.codec.kept_tensors import kept_tensor

LARGE = 2**16
"""A matrix with more elements is large."""

STRIP = 2**18
"""A strip of a large matrix or of its spectrum has about this many numbers."""


def suppress_high_frequencies(
    g: Tensor, *, penalty: float, layout: Layout = "torch", batched: bool = False, in_place: bool = False
) -> Tensor:
    """Multiplies the energy above the cutoff by (1 − μ)² and leaves the rest as it is.

    Args:
        g: gradient of one array, finite float32, or with `batched` of arrays stacked along a leading axis.
        penalty: μ in [0, 1].
        layout: decides which axes are spatial axes (section 1.3).
        batched: the first axis of g counts arrays.
        in_place: the memory of g may be used for the result.

    Returns:
        The new gradient; g itself for an array that the stage leaves alone.
    """
    axes = spatial_from_end(array_shape(g, batched), layout)
    if axes is None:
        return g
    lengths = [g.shape[axis] for axis in axes]
    large = axes[1] == -1 and lengths[0] * lengths[1] > LARGE
    if large and g.device.type == "cpu" and not g.requires_grad:
        return _in_strips(g, penalty, g if in_place else torch.empty_like(g))
    spectrum = torch.fft.rfft2(g, dim=axes)
    factors = _factors(lengths[0], lengths[1], penalty, g.device)
    # Other axes follow the spatial ones in kernels of the Flax layout.
    factors = factors.view(*factors.shape, *[1] * (-axes[1] - 1))
    # Only the damped part goes through the FFT, since its rounding errors are then as small as that part.
    damped: Tensor = torch.fft.irfft2(spectrum.mul_(factors), s=lengths, dim=axes)
    return g - damped


def _in_strips(g: Tensor, penalty: float, out: Tensor) -> Tensor:
    """The same for a matrix that is large beside the cache of a CPU, written into `out`."""
    n1, n2 = g.shape[-2:]
    spectrum = torch.fft.rfft(g)
    last_kept = _last_kept(n1, n2, g.device)
    # Beyond this frequency along the rows all is above the cutoff, whatever the frequency along the columns.
    kept = int(last_kept_frequency(n1, n2).max()) + 1
    spectrum[..., kept:].mul_(penalty)
    width = max(1, STRIP // n1)
    for strip, frequencies in zip(
        torch.split(spectrum[..., :kept], width, -1),
        torch.split(torch.arange(kept, device=g.device), width),
        strict=True,
    ):
        factors = _damped(frequencies > last_kept[:, None], penalty)
        strip.copy_(torch.fft.ifft(torch.fft.fft(strip, dim=-2).mul_(factors), dim=-2))
    for strip, before, after in zip(
        *(torch.split(x, max(1, STRIP // n2), -2) for x in (spectrum, g, out)), strict=True
    ):
        torch.sub(before, torch.fft.irfft(strip, n=n2), out=after)
    return out


def _factors(n1: int, n2: int, penalty: float, device: torch.device) -> Tensor:
    """μ · H for all entries of an rfft2: float32, (n1, n2 // 2 + 1)."""
    # Large ones are not kept, since they would need half as much memory as the gradients.
    make = _kept_factors if n1 * n2 <= LARGE else _new_factors
    return make(n1, n2, penalty, device)


def _new_factors(n1: int, n2: int, penalty: float, device: torch.device) -> Tensor:
    return _damped(torch.arange(n2 // 2 + 1, device=device) > _last_kept(n1, n2, device)[:, None], penalty)


def _damped(is_high: Tensor, penalty: float) -> Tensor:
    """μ where `is_high`, else 0."""
    # A number times a bool would be of torch's default dtype.
    return penalty * is_high.view(torch.uint8).float()


_kept_factors = kept_tensor(_new_factors)


@kept_tensor
def _last_kept(n1: int, n2: int, device: torch.device) -> Tensor:
    return torch.from_numpy(last_kept_frequency(n1, n2).copy()).to(device, non_blocking=True)
