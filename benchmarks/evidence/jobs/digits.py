"""The demo's job, made small: a diffusion model of the digits 0 to 4 becomes one of 5 to 9."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.evidence.jobs.job import Base, Job, Training, cosine
from benchmarks.evidence.lora import adapt
from examples.digits_diffusion import data

EARLIEST, LATEST = 0.05, 0.998
FREQUENCIES = 32
HELD_OUT_PIECE = 256


class Settings(NamedTuple):
    """The sizes of the job."""

    width: int = 256
    depth: int = 3
    rank: int = 16
    batch: int = 128
    steps: int = 400
    base_batch: int = 256
    base_steps: int = 800
    base_rate: float = 2e-3
    held_out_noises: int = 4


class _Block(nn.Module):
    """Normalize, shift and scale by the time, two linear layers, and add."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(2 * FREQUENCIES, 2 * width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        scale, shift = self.modulation(features).chunk(2, dim=-1)
        return h + self.outer(functional.silu(self.inner(self.norm(h) * (1 + scale) + shift)))


class Denoiser(nn.Module):
    """(noisy image (n, 64), time (n,)) → v (n, 64)."""

    frequencies: Tensor

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.entry = nn.Linear(data.PIXELS, settings.width)
        self.blocks = nn.ModuleList([_Block(settings.width) for _ in range(settings.depth)])
        self.norm = nn.LayerNorm(settings.width)
        self.exit = nn.Linear(settings.width, data.PIXELS)
        nn.init.zeros_(self.exit.weight)
        self.register_buffer("frequencies", torch.pi * torch.logspace(0, np.log10(200), FREQUENCIES), persistent=False)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        features = torch.cat([angles.sin(), angles.cos()], dim=-1)
        h = self.entry(z)
        for block in self.blocks:
            h = block(h, features)
        return self.exit(self.norm(h))


def noise_and_times(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise (count, 64), and times (count,) spread evenly over the interval."""
    noise = torch.randn(count, data.PIXELS, generator=generator)
    strata = (torch.arange(count) + torch.rand((), generator=generator)) / count
    return noise, EARLIEST + (LATEST - EARLIEST) * strata


def diffusion_loss(model: nn.Module, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Mean squared error of the denoised image over the noise's variance, as in the demo."""
    angle = times[:, None] * (torch.pi / 2)
    alpha, sigma = angle.cos(), angle.sin()
    z = alpha * images + sigma * noise
    denoised = (alpha * z - sigma * model(z, times)).clamp(-1, 1)
    return ((denoised - images) / sigma).square().mean()


def images(classes: tuple[int, ...], noises: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Images to train on, and held-out ones, each `noises` times, with noise and times; the same in every run."""
    train, held_out = data.split(data.load().only(classes), held_out=0.2, seed=0)
    repeated = torch.from_numpy(np.tile(held_out.images, (noises, 1)))
    fixed = torch.Generator().manual_seed(12345)
    repeated = repeated[torch.randperm(len(repeated), generator=fixed)]
    return torch.from_numpy(train.images), (repeated, *noise_and_times(len(repeated), fixed))


@dataclass
class DigitsTraining(Training):
    """Training images, and a held-out set as `images` gives it."""

    images: Tensor
    held_out: tuple[Tensor, Tensor, Tensor]
    batch: int

    def loss(self) -> Tensor:
        chosen = self.images[torch.randint(len(self.images), (self.batch,), generator=self.generator)]
        return diffusion_loss(self.model, chosen, *noise_and_times(self.batch, self.generator))

    @torch.no_grad()
    def validation_loss(self) -> float:
        pieces = zip(*(x.split(HELD_OUT_PIECE) for x in self.held_out), strict=True)
        return sum(float(diffusion_loss(self.model, *piece)) * len(piece[0]) for piece in pieces) / len(
            self.held_out[0]
        )


class DigitsDiffusion(Job):
    """LoRA on all linear layers of a small denoiser."""

    family = "digits"
    heading = "Diffusion model of digits"
    unit = "denoising loss"
    rate = 1e-2
    pictured = True

    def __init__(self, sizes: Settings = Settings(), variation: str = "") -> None:  # noqa: B008  # an immutable tuple
        super().__init__(sizes, variation)

    @property
    def description(self) -> str:
        sizes = self.sizes
        return (
            f"A residual network of width {sizes.width} that denoises the 8 × 8 digits 0 to 4 (scikit-learn) gets "
            f"adapters of rank {sizes.rank} on every linear layer and learns 5 to 9: {sizes.steps} steps of "
            f"{sizes.batch} images."
        )

    def build_base(self) -> Base:
        sizes = self.sizes
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        model = Denoiser(sizes)
        known = torch.from_numpy(data.load().only(data.OLD_CLASSES).images)
        optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.base_rate)
        for step in range(sizes.base_steps):
            optimizer.param_groups[0]["lr"] = sizes.base_rate * cosine(step, sizes.base_steps, ramp=50)
            chosen = known[torch.randint(len(known), (sizes.base_batch,), generator=generator)]
            optimizer.zero_grad()
            diffusion_loss(model, chosen, *noise_and_times(sizes.base_batch, generator)).backward()
            optimizer.step()
        return {"model": model.state_dict()}

    def start(self, base: Base, seed: int) -> Training:
        sizes = self.sizes
        generator = torch.Generator().manual_seed(seed)
        model = Denoiser(sizes)
        model.load_state_dict(base["model"])
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        adapters = adapt(model, layers, sizes.rank, generator)
        return DigitsTraining(model, adapters, generator, *images(data.NEW_CLASSES, sizes.held_out_noises), sizes.batch)
