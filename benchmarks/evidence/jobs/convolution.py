"""A small convolutional diffusion model of digits, from scratch: every parameter is trained."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.evidence.jobs.digits import FREQUENCIES, DigitsTraining, images
from benchmarks.evidence.jobs.job import Base, Job, Training
from examples.digits_diffusion import data


class Settings(NamedTuple):
    """The sizes of the job."""

    channels: int = 32
    depth: int = 2
    batch: int = 64
    steps: int = 400
    held_out_noises: int = 2


class _Block(nn.Module):
    """Normalize, shift and scale by the time, two convolutions, and add."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels, affine=False)
        self.modulation = nn.Linear(2 * FREQUENCIES, 2 * channels)
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.outer.weight)

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        scale, shift = self.modulation(features)[:, :, None, None].chunk(2, dim=1)
        return h + self.outer(functional.silu(self.inner(self.norm(h) * (1 + scale) + shift)))


class ConvolutionalDenoiser(nn.Module):
    """(noisy image (n, 64), time (n,)) → v (n, 64), by convolutions over its 8 × 8 pixels."""

    frequencies: Tensor

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.entry = nn.Conv2d(1, settings.channels, 3, padding=1)
        self.blocks = nn.ModuleList([_Block(settings.channels) for _ in range(settings.depth)])
        self.norm = nn.GroupNorm(4, settings.channels)
        self.exit = nn.Conv2d(settings.channels, 1, 3, padding=1)
        nn.init.zeros_(self.exit.weight)
        self.register_buffer("frequencies", torch.pi * torch.logspace(0, np.log10(200), FREQUENCIES), persistent=False)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        features = torch.cat([angles.sin(), angles.cos()], dim=-1)
        h = self.entry(z.view(-1, 1, data.SIDE, data.SIDE))
        for block in self.blocks:
            h = block(h, features)
        return self.exit(functional.silu(self.norm(h))).flatten(1)


class ConvolutionalDiffusion(Job):
    """All parameters of a convolutional denoiser."""

    family = "convolution"
    heading = "Convolutional diffusion model from scratch"
    unit = "denoising loss"
    rate = 1e-2

    def __init__(self, sizes: Settings = Settings(), variation: str = "") -> None:  # noqa: B008  # an immutable tuple
        super().__init__(sizes, variation)

    @property
    def description(self) -> str:
        sizes = self.sizes
        return (
            f"A residual network of {2 * sizes.depth + 2} convolutions of 3 × 3 and {sizes.channels} channels learns "
            f"to denoise the digits 0 to 4, all parameters from scratch: {sizes.steps} steps of {sizes.batch} images."
        )

    def build_base(self) -> Base:
        return {}

    def start(self, base: Base, seed: int) -> Training:
        del base
        sizes = self.sizes
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        known = images(data.OLD_CLASSES, sizes.held_out_noises)
        return DigitsTraining(ConvolutionalDenoiser(sizes), [], generator, *known, sizes.batch)
