"""Convolutions: a ResNet tells digits apart, a U-Net finds discs among squares, a stack over time forecasts series."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.evidence.jobs.job import Base, Training
from benchmarks.outside.jobs.common import Digits, FromFunctions, OutsideJob, digits, fixed, from_rows, seeded
from benchmarks.outside.jobs.images import CLASSES


class ResNetSettings(NamedTuple):
    """The sizes of the job."""

    channels: int = 12
    noise: float = 0.3
    batch: int = 48
    steps: int = 250


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm, added to what came in; with `stride` 2 the image shrinks to half its side."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.past = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.past(x) + self.body(x))


class ResNet(OutsideJob):
    """A ResNet from scratch, judged with the means and variances that its batch norms have gathered."""

    family = "resnet"
    heading = "ResNet with batch norm on noisy digits, from scratch"
    unit = "nats per image"
    rate = 3e-3
    defaults = ResNetSettings()

    def start(self, base: Base, seed: int) -> Training:
        del base
        sizes, generator = self.sizes, seeded(seed)
        (known, held_out), width = digits(), sizes.channels
        model = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            ResidualBlock(width, width),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 4 * width, stride=2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, CLASSES),
        )  # fmt: skip

        def loss(part: Digits, draws: torch.Generator) -> Tensor:
            images = part.images + sizes.noise * torch.randn(part.images.shape, generator=draws)
            return functional.cross_entropy(model(images[:, None]), part.labels)

        def next_loss() -> Tensor:
            return loss(known.draw(sizes.batch, generator), generator)

        return FromFunctions(model, [], generator, next_loss, lambda: loss(held_out, fixed()))


class UNetSettings(NamedTuple):
    """The sizes of the job."""

    side: int = 24
    objects: int = 4
    noise: float = 0.2
    images: int = 480
    known_images: int = 360
    channels: int = 8
    batch: int = 12
    steps: int = 250


@cache
def scenes(sizes: UNetSettings) -> tuple[Tensor, Tensor]:
    """Images (n, side, side) of discs and squares under uneven light, and where the discs are, 0 or 1."""
    generator = torch.Generator().manual_seed(6)
    count, objects, side = sizes.images, sizes.objects, sizes.side
    places = side * torch.rand(count, objects, 1, 1, 2, generator=generator)
    radii = side * (0.08 + 0.12 * torch.rand(count, objects, 1, 1, generator=generator))
    shine = 0.4 + 0.6 * torch.rand(count, objects, 1, 1, generator=generator)
    pixels = torch.arange(side) + 0.5
    offsets = torch.stack(torch.meshgrid(pixels, pixels, indexing="ij"), dim=-1) - places
    # The first half of the objects are discs, the others squares.
    norms = [offsets[:, : objects // 2].norm(dim=-1), offsets[:, objects // 2 :].abs().amax(-1)]
    inside = (torch.cat(norms, dim=1) < radii).float()
    light = torch.randn(count, 1, 1, generator=generator) * pixels / side
    noise = sizes.noise * torch.randn(count, side, side, generator=generator)
    return (shine * inside).amax(1) + light + noise, inside[:, : objects // 2].amax(1)


def _convolutions(inputs: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Images (n, side, side) → logits of each pixel's being sought (n, side, side), over three resolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fine = _convolutions(1, channels)
        self.middle = _convolutions(channels, 2 * channels)
        self.coarse = _convolutions(2 * channels, 4 * channels)
        self.to_middle = _convolutions(6 * channels, 2 * channels)
        self.to_fine = _convolutions(3 * channels, channels)
        self.exit = nn.Conv2d(channels, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(images[:, None])
        middle = self.middle(functional.max_pool2d(fine, 2))
        up = self.coarse(functional.max_pool2d(middle, 2))
        for layers, beside in ((self.to_middle, middle), (self.to_fine, fine)):
            up = layers(torch.cat([functional.interpolate(up, scale_factor=2), beside], dim=1))
        return self.exit(up)[:, 0]


class Segmentation(OutsideJob):
    """A U-Net from scratch by the two losses that are usual together."""

    family = "segmentation"
    heading = "U-Net that finds the discs in noisy images, Dice loss and cross-entropy"
    unit = "Dice loss + nats per pixel"
    rate = 3e-3
    defaults = UNetSettings()

    def start(self, base: Base, seed: int) -> Training:
        del base
        sizes, generator = self.sizes, seeded(seed)
        images, masks = scenes(sizes)
        model = UNet(sizes.channels)

        def loss(rows: Tensor | slice) -> Tensor:
            logits, sought = model(images[rows]), masks[rows]
            found = logits.sigmoid()
            dice = (2 * (found * sought).sum((1, 2)) + 1) / ((found + sought).sum((1, 2)) + 1)
            return 1 - dice.mean() + functional.binary_cross_entropy_with_logits(logits, sought)

        return from_rows(model, generator, loss, sizes.known_images, sizes.batch)


DAY, WEEK = 24, 168
QUANTILES = (0.1, 0.5, 0.9)


class ForecastSettings(NamedTuple):
    """The sizes of the job; times are in hours."""

    series: int = 30
    hours: int = 2000
    known_hours: int = 1600
    seen: int = 48
    ahead: int = 12
    channels: int = 24
    layers: int = 5
    batch: int = 32
    steps: int = 300
    windows: int = 400


@cache
def history(series: int, hours: int) -> Tensor:
    """Series (series, hours): days and weeks, each series' of its own shape, a slow drift, and noise with outliers."""
    generator = torch.Generator().manual_seed(7)

    def waves(period: float, strength: float) -> Tensor:
        parts = strength * torch.randn(series, 2, 1, generator=generator)
        time = 2 * math.pi / period * torch.arange(hours)
        return parts[:, 0] * time.sin() + parts[:, 1] * time.cos()

    regular = waves(DAY, 1.0) + waves(DAY / 2, 0.5) + waves(WEEK, 0.7)
    drift = 0.03 * torch.randn(series, hours, generator=generator).cumsum(1)
    spread = torch.where(torch.rand(series, hours, generator=generator) < 0.02, 2.0, 0.2)
    return regular + drift + spread * torch.randn(series, hours, generator=generator)


class Forecaster(nn.Module):
    """(what was seen (n, 5, hours), which series (n,)) → quantiles of the hours ahead (n, ahead, 3).

    Dilated convolutions, each over hours twice as far apart as the one before, and none that looks ahead.
    """

    def __init__(self, sizes: ForecastSettings) -> None:
        super().__init__()
        channels = sizes.channels
        self.entry = nn.Conv1d(5, channels, 1)
        self.series = nn.Embedding(sizes.series, channels)
        self.layers = nn.ModuleList(nn.Conv1d(channels, channels, 2, dilation=2**i) for i in range(sizes.layers))
        self.exit = nn.Linear(channels, sizes.ahead * len(QUANTILES))

    def forward(self, seen: Tensor, series: Tensor) -> Tensor:
        hidden = self.entry(seen) + self.series(series)[:, :, None]
        for i, layer in enumerate(self.layers):
            hidden = hidden + functional.gelu(layer(functional.pad(hidden, (2**i, 0))))
        return self.exit(hidden[:, :, -1]).unflatten(1, (-1, len(QUANTILES)))


class Forecast(OutsideJob):
    """One model for all series; held out are later hours."""

    family = "forecast"
    heading = "Dilated convolutions that forecast quantiles of seasonal series"
    unit = "quantile loss"
    rate = 3e-3
    defaults = ForecastSettings()

    def start(self, base: Base, seed: int) -> Training:
        del base
        sizes, generator = self.sizes, seeded(seed)
        model, levels, length = Forecaster(sizes), torch.tensor(QUANTILES), sizes.seen + sizes.ahead

        def loss(count: int, between: tuple[int, int], draws: torch.Generator) -> Tensor:
            series = torch.randint(sizes.series, (count, 1), generator=draws)
            starts = torch.randint(between[0], between[1] - length + 1, (count, 1), generator=draws)
            hours = starts + torch.arange(length)
            past, future = history(sizes.series, sizes.hours)[series, hours].split([sizes.seen, sizes.ahead], dim=1)
            angles = 2 * math.pi * hours[:, None, : sizes.seen] / torch.tensor([[DAY], [WEEK]])
            forecast = model(torch.cat([past[:, None], angles.sin(), angles.cos()], dim=1), series[:, 0])
            short = future[:, :, None] - forecast
            return torch.maximum(levels * short, (levels - 1) * short).mean()

        early, late = (0, sizes.known_hours), (sizes.known_hours, sizes.hours)
        return FromFunctions(
            model,
            [],
            generator,
            lambda: loss(sizes.batch, early, generator),
            lambda: loss(sizes.windows, late, fixed()),
        )
