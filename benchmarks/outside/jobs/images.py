"""Digits: told apart by a transformer, compressed by an autoencoder, and matched with themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.evidence.jobs.job import Base, Training
from benchmarks.outside.jobs.common import Digits, FromFunctions, OutsideJob, digits, fixed, moved_and_noisy, seeded
from examples.digits_diffusion import data

CLASSES = 10


class VitSettings(NamedTuple):
    """The sizes of the job."""

    patch: int = 2
    width: int = 32
    heads: int = 4
    layers: int = 2
    dropout: float = 0.1
    noise: float = 0.1
    batch: int = 32
    steps: int = 300


class VisionTransformer(nn.Module):
    """Images (n, 8, 8) → logits of their digits (n, 10), read off a class token."""

    def __init__(self, sizes: VitSettings) -> None:
        super().__init__()
        self.patch, width = sizes.patch, sizes.width
        self.patches = nn.Linear(sizes.patch**2, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (data.SIDE // sizes.patch) ** 2, width))
        layers = [
            nn.TransformerEncoderLayer(
                width, sizes.heads, 4 * width, sizes.dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(sizes.layers)
        ]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patch = self.patch
        pieces = images.unfold(1, patch, patch).unfold(2, patch, patch).reshape(len(images), -1, patch**2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), self.patches(pieces)], dim=1)
        return self.logits(self.norm(self.layers(tokens + self.positions)[:, 0]))


class Vit(OutsideJob):
    """A vision transformer from scratch, with dropout, on images that are moved and noisy."""

    family = "vit"
    heading = "Vision transformer with class token and dropout on digits, from scratch"
    unit = "nats per image"
    rate = 3e-3
    defaults = VitSettings()

    def start(self, base: Base, seed: int) -> Training:
        del base
        sizes, generator = self.sizes, seeded(seed)
        known, held_out = digits()
        model = VisionTransformer(sizes)

        def next_loss() -> Tensor:
            drawn = known.draw(sizes.batch, generator)
            return functional.cross_entropy(model(moved_and_noisy(drawn.images, sizes.noise, generator)), drawn.labels)

        return FromFunctions(
            model, [], generator, next_loss, lambda: functional.cross_entropy(model(held_out.images), held_out.labels)
        )


class VaeSettings(NamedTuple):
    """The sizes of the job."""

    width: int = 128
    latent: int = 8
    batch: int = 64
    steps: int = 400


class Autoencoder(nn.Module):
    """A variational autoencoder of two MLPs."""

    def __init__(self, sizes: VaeSettings) -> None:
        super().__init__()
        self.encoder = _mlp(data.PIXELS, sizes.width, 2 * sizes.latent)
        self.decoder = _mlp(sizes.latent, sizes.width, data.PIXELS)

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """The negative bound on the log-likelihood of images (n, 64), with noise (n, latent): mean in nats."""
        mean, log_variance = self.encoder(pixels).chunk(2, dim=1)
        logits = self.decoder(mean + noise * (log_variance / 2).exp())
        lost = functional.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum(1)
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
        return (lost + divergence).mean()


def _mlp(inputs: int, width: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


class Vae(OutsideJob):
    """A variational autoencoder from scratch."""

    family = "vae"
    heading = "Variational autoencoder of digits"
    unit = "nats per image"
    rate = 3e-3
    defaults = VaeSettings()

    def start(self, base: Base, seed: int) -> Training:
        del base
        sizes, generator = self.sizes, seeded(seed)
        known, held_out = digits()
        model = Autoencoder(sizes)

        def loss(part: Digits, draws: torch.Generator) -> Tensor:
            return model(part.images.flatten(1), torch.randn(len(part.images), sizes.latent, generator=draws))

        return FromFunctions(
            model,
            [],
            generator,
            lambda: loss(known.draw(sizes.batch, generator), generator),
            lambda: loss(held_out, fixed()),
        )


class ContrastiveSettings(NamedTuple):
    """The sizes of the job."""

    channels: int = 32
    width: int = 64
    outputs: int = 32
    noise: float = 0.3
    batch: int = 64
    steps: int = 200


class Matcher(nn.Module):
    """A convolutional encoder, and a temperature that is learned with it."""

    def __init__(self, sizes: ContrastiveSettings) -> None:
        super().__init__()
        channels = sizes.channels
        self.encoder = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(channels * data.PIXELS // 4, sizes.width),
            nn.ReLU(),
            nn.Linear(sizes.width, sizes.outputs),
        )
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """How hard it is to find the partner of each image (n, 8, 8) among the others: mean in nats."""
        here, there = (functional.normalize(self.encoder(images[:, None]), dim=1) for images in (one, other))
        logits = here @ there.T * self.log_scale.exp().clamp(max=100)
        partners = torch.arange(len(one))
        return (functional.cross_entropy(logits, partners) + functional.cross_entropy(logits.T, partners)) / 2


class Contrastive(OutsideJob):
    """Two noisy views of an image are to find each other among those of a batch."""

    family = "contrastive"
    heading = "Encoder of digits by a contrastive loss, learned temperature"
    unit = "nats per image"
    rate = 3e-3
    defaults = ContrastiveSettings()

    def start(self, base: Base, seed: int) -> Training:
        del base
        sizes, generator = self.sizes, seeded(seed)
        known, held_out = digits()
        model = Matcher(sizes)
        # The loss depends on how many there are to be confused with: only whole batches.
        pieces = [piece for piece in held_out.images.split(sizes.batch) if len(piece) == sizes.batch]

        def loss(images: Tensor, draws: torch.Generator) -> Tensor:
            one, other = (moved_and_noisy(images, sizes.noise, draws) for _ in range(2))
            return model(one, other)

        def held_out_loss() -> Tensor:
            draws = fixed()
            return torch.stack([loss(piece, draws) for piece in pieces]).mean()

        return FromFunctions(
            model, [], generator, lambda: loss(known.draw(sizes.batch, generator).images, generator), held_out_loss
        )
