"""A denoiser that knows the digits 0 to 8 learns the 9 from few images: all of it, or one embedding."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.evidence.jobs.job import Base, Training, cosine
from benchmarks.outside.jobs.common import Digits, FromFunctions, OutsideJob, digits, fixed, seeded
from examples.digits_diffusion import data

NEW = 9
FREQUENCIES = 8


class Settings(NamedTuple):
    """The sizes of both jobs; those that begin with `base` and those of the model are the base's."""

    width: int = 160
    depth: int = 3
    base_batch: int = 128
    base_steps: int = 1500
    base_rate: float = 3e-3
    few: int = 4
    batch: int = 4
    steps: int = 200


class Denoiser(nn.Module):
    """(noisy images (n, 64), times (n,), what they show (n, width)) → the way from image to noise (n, 64)."""

    def __init__(self, sizes: Settings) -> None:
        super().__init__()
        width = sizes.width
        self.entry = nn.Linear(data.PIXELS, width)
        self.time = nn.Linear(2 * FREQUENCIES, width)
        self.kinds = nn.Embedding(NEW + 1, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(sizes.depth)
        )
        self.exit = nn.Linear(width, data.PIXELS)

    def forward(self, noisy: Tensor, times: Tensor, shown: Tensor) -> Tensor:
        angles = 1.5 * times[:, None] * torch.arange(1, FREQUENCIES + 1)
        hidden = self.entry(noisy) + self.time(torch.cat([angles.sin(), angles.cos()], dim=1)) + shown
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.exit(hidden)


def denoising_loss(model: Denoiser, images: Tensor, shown: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error on images (n, 8, 8) at random times."""
    pixels = 2 * images.flatten(1) - 1
    times, noise = torch.rand(len(pixels), generator=generator), torch.randn(pixels.shape, generator=generator)
    share = times[:, None]
    return functional.mse_loss(model((1 - share) * pixels + share * noise, times, shown), noise - pixels)


def loss_of(model: Denoiser, part: Digits, generator: torch.Generator) -> Tensor:
    """`denoising_loss` where the model is told the digits by its own embeddings."""
    return denoising_loss(model, part.images, model.kinds(part.labels), generator)


def repeated(part: Digits, times: int) -> Digits:
    """Every image several times, for as many noises."""
    return Digits(part.images.repeat(times, 1, 1), part.labels.repeat(times))


class _FromDenoiser(OutsideJob):
    """A job that begins with the denoiser."""

    family = "denoiser"
    unit = "denoising loss"

    def base_settings(self) -> dict[str, Any]:
        # What is left out changes nothing in the base, so that both jobs share it.
        return {name: value for name, value in super().base_settings().items() if name != "few"}

    def build_base(self) -> Base:
        sizes, generator = self.sizes, seeded(0)
        known, _ = digits()
        old = known.where(known.labels != NEW)
        model = Denoiser(sizes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.base_rate)
        for step in range(sizes.base_steps):
            optimizer.param_groups[0]["lr"] = sizes.base_rate * cosine(step, sizes.base_steps, ramp=50)
            optimizer.zero_grad()
            loss_of(model, old.draw(sizes.base_batch, generator), generator).backward()
            optimizer.step()
        return {"model": model.state_dict()}

    def begin(self, base: Base, seed: int) -> tuple[Denoiser, torch.Generator, Digits]:
        """The denoiser, what draws the batches, and the few images of the new digit."""
        generator = seeded(seed)
        model = Denoiser(self.sizes)
        model.load_state_dict(base["model"])
        known, _ = digits()
        new = known.where(known.labels == NEW)
        return model, generator, new.where(torch.randperm(len(new.images), generator=generator)[: self.sizes.few])


class FewImages(_FromDenoiser):
    """All parameters, as in DreamBooth: the old digits are trained along, so that they are not forgotten."""

    own_name = "few-images"
    heading = "Pretrained denoiser learns a new digit from four images, all parameters"
    rate = 3e-4
    defaults = Settings()

    def start(self, base: Base, seed: int) -> Training:
        model, generator, few = self.begin(base, seed)
        known, held_out = digits()
        old = known.where(known.labels != NEW)
        new_held = repeated(held_out.where(held_out.labels == NEW), 8)
        old_held = repeated(held_out.where(held_out.labels != NEW), 2)

        def loss(new: Digits, rest: Digits, draws: torch.Generator) -> Tensor:
            return loss_of(model, new, draws) + loss_of(model, rest, draws)

        return FromFunctions(
            model,
            [],
            generator,
            lambda: loss(few, old.draw(self.sizes.batch, generator), generator),
            lambda: loss(new_held, old_held, fixed()),
        )


class WithEmbedding(nn.Module):
    """A frozen denoiser, and one embedding that is trained."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser.requires_grad_(False)
        # The new digit begins as the mean of the old ones.
        self.shown = nn.Parameter(denoiser.kinds.weight[:NEW].mean(0, keepdim=True).clone())

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The denoising loss where the images are said to show the embedding."""
        return denoising_loss(self.denoiser, images, self.shown, generator)


class OneEmbedding(_FromDenoiser):
    """One embedding, as in textual inversion."""

    own_name = "one-embedding"
    heading = "One embedding for a new digit, five images, the denoiser frozen"
    rate = 1e-2
    defaults = Settings(few=5, steps=250)

    def start(self, base: Base, seed: int) -> Training:
        denoiser, generator, few = self.begin(base, seed)
        model = WithEmbedding(denoiser)
        _, held_out = digits()
        held = repeated(held_out.where(held_out.labels == NEW), 8)
        return FromFunctions(
            model, [], generator, lambda: model(few.images, generator), lambda: model(held.images, fixed())
        )
