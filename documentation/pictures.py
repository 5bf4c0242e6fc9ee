"""Draws the pictures of docs/how-it-works.md with the packages' own code: ``python -m documentation.pictures``

Half a minute on one core.  A picture holds only what the code did, on numbers that are made here from fixed seeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

from automagic_core import Config, codebook_midpoints, dynamic_codebook
from automagic_core.config.constants import LEAST_GROWTH
from automagic_torch import (
    AutomagicCameAMP8bit,
    clip_by_percentile,
    encourage_low_rank,
    suppress_edges,
    suppress_high_frequencies,
)

FOLDER = Path(__file__).parents[1] / "docs/pictures"
BEFORE, AFTER, THIRD = "#7f8c9b", "#3949ab", "#d1572b"
STEPS, WARM_UP, BATCH = 300, 120, 32
STARTS = (1e-6, 1e-3, 1e-1)


class Found(NamedTuple):
    """What a search did, one value a step: the rate, the loss, and the answers to its three questions."""

    rates: list[float]
    losses: list[float]
    agreement: list[float]
    straightness: list[float]
    growth: list[float]


def draw_codebook() -> None:
    """The 256 values of both codebooks, and how exact they are."""
    figure, (values, gaps) = plt.subplots(1, 2, figsize=(9, 3.4))
    for signed, colour, label in (
        (True, AFTER, "signed: exp_avg"),
        (False, THIRD, "unsigned: roots of second moments"),
    ):
        book = dynamic_codebook(signed)
        values.plot(book, ".", color=colour, markersize=3, label=label)
        middle = codebook_midpoints(signed)
        positive = middle > 1e-7
        widths = (np.diff(book) / 2)[positive]
        gaps.loglog(middle[positive], 100 * widths / middle[positive], color=colour, label=label)
    values.set(xlabel="code", ylabel="value, of the largest in its block", title="256 values for one byte")
    values.legend(frameon=False, markerscale=3)
    gaps.set(
        xlabel="value, of the largest in its block", ylabel="largest error of nearest, %", title="What one byte loses"
    )
    gaps.legend(frameon=False)
    _write(figure, "codebook")


def draw_clip() -> None:
    """The norms of a run with two outliers, before and after stage 1."""
    rng = torch.Generator().manual_seed(3)
    sizes = 1 + 0.15 * torch.randn(120, generator=rng)
    sizes[[60, 95]] = torch.tensor([6.0, 4.0])
    history, place, after = torch.zeros(100), torch.zeros((), dtype=torch.int32), []
    for size in sizes:
        g = torch.randn(256, generator=rng)
        g = size * g / g.norm()
        (clipped,), history, place = clip_by_percentile([g], history, place, percentile=95)
        after.append(float(clipped.norm()))
    figure, axes = plt.subplots(figsize=(9, 2.6))
    axes.plot(sizes.abs(), color=BEFORE, label="before")
    axes.plot(after, color=AFTER, label="after, percentile_clipping=95")
    axes.set(xlabel="step", ylabel="norm of the gradients", title="1. clip_by_percentile: outliers are scaled down")
    axes.legend(frameon=False)
    _write(figure, "stage-clip")


def draw_edges() -> None:
    """A gradient with one rough patch, before and after stage 2, and what was taken away."""
    rng = torch.Generator().manual_seed(0)
    rows = torch.arange(32) / 32
    smooth = torch.sin(2 * torch.pi * rows)[:, None] * torch.cos(2 * torch.pi * rows)[None, :]
    history, age = torch.zeros(32, 1, 1, 1), torch.zeros((), dtype=torch.int32)
    kernels = [smooth.expand(32, 1, 32, 32) + 0.05 * torch.randn(32, 1, 32, 32, generator=rng) for _ in range(20)]
    kernels[-1][:, :, 10:18, 12:22] += 1.2 * torch.randn(32, 1, 8, 10, generator=rng)
    for g in kernels:
        age = age + 1
        after, history = suppress_edges(g, history, age, penalty=0.2, threshold=0.6)  # type: ignore[assignment]
    title = "2. suppress_edges: rough spots are smoothed (edge_penalty=0.2; the default is 0.1)"
    _images(kernels[-1][0, 0], after[0, 0], title, "stage-edges")


def draw_frequencies() -> None:
    """A gradient with a fine pattern on a coarse one, before and after stage 3, and what was taken away."""
    x = torch.arange(32.0)
    coarse = torch.sin(2 * torch.pi * x / 16)[:, None] + torch.cos(2 * torch.pi * x / 32)[None, :]
    fine = 0.8 * torch.cos(torch.pi * (x[:, None] + x[None, :]) * 0.8)
    g = (coarse + fine)[None, None]
    after = suppress_high_frequencies(g, penalty=0.8)
    title = "3. suppress_high_frequencies: fine patterns are damped (frequency_penalty=0.8; the default is 0.05)"
    _images(g[0, 0], after[0, 0], title, "stage-frequencies")


def draw_low_rank() -> None:
    """The singular values of an adapter that only stage 4 moves, and what it does to a gradient in each direction."""
    rng = torch.Generator().manual_seed(1)
    rank, width = 16, 256
    left, _ = torch.linalg.qr(torch.randn(rank, rank, generator=rng))
    right, _ = torch.linalg.qr(torch.randn(width, rank, generator=rng))
    values = torch.logspace(0, -1.3, rank)
    w = left @ torch.diag(values) @ right.T
    g = torch.randn(rank, width, generator=rng)
    weights = w.clone()
    for _ in range(60):
        pull = encourage_low_rank(g, weights, strength=0.3, emphasis=1.0) - g
        weights -= 0.01 * pull / pull.norm()
    along = [((left.T @ each) ** 2).sum(1).sqrt() for each in (g, encourage_low_rank(g, w, strength=0, emphasis=1.5))]
    figure, (first, second) = plt.subplots(1, 2, figsize=(9, 3))
    first.bar(range(1, rank + 1), values, color=BEFORE, label="before")
    first.bar(range(1, rank + 1), torch.linalg.svdvals(weights), 0.5, color=AFTER, label="after 60 steps of the pull")
    first.set(
        xlabel="singular direction of the adapter", ylabel="singular value", title="The pull shrinks weak directions"
    )
    first.legend(frameon=False)
    second.bar(range(1, rank + 1), along[1] / along[0], color=AFTER)
    second.axhline(1, color=BEFORE)
    second.set(xlabel="singular direction of the adapter", ylabel="gradient, after / before", ylim=(0.9, 1.55))
    second.set_title("low_rank_emphasis=1.5 favours strong ones")
    figure.suptitle("4. encourage_low_rank")
    _write(figure, "stage-low-rank")


def search(start: float) -> Found:
    """Trains a small classifier of digits from one starting rate."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    fields: dict[str, Any] = {"warmup_steps": WARM_UP, "max_lr": 1.0, "profile": "balanced", "force_8bit": True}
    optimizer = AutomagicCameAMP8bit(model.named_parameters(), lr=start, **fields)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / STEPS)
    found = Found([], [], [], [], [])
    group = optimizer.param_groups[0]
    for t in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,), generator=torch.Generator().manual_seed(t))
        loss = torch.nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.rates.append(optimizer.get_avg_learning_rate())
        found.losses.append(float(loss.detach()))
        if t < WARM_UP - 1:
            walk = sum(float(state["walk"].square().sum()) for state in optimizer.state.values())
            energy = float(group["automagic_walk_energy"])
            first = float(group["automagic_first_norm"])
            found.agreement.append(float(group["automagic_agreement"]))
            found.straightness.append((walk / energy) ** 0.5 if energy else float("nan"))
            found.growth.append(float(group["automagic_gradient_norm"]) / first if first else float("nan"))
    return found


def draw_search() -> None:
    """The rate and the loss from three starts, and the three questions of one of them."""
    runs = {start: search(start) for start in STARTS}
    figure, ((rates, losses), (agree, straight)) = plt.subplots(2, 2, figsize=(9, 5.6))
    for (start, found), colour, style in zip(runs.items(), (BEFORE, AFTER, THIRD), ("-", "-", "--"), strict=True):
        rates.semilogy(found.rates, style, color=colour, label=f"lr={start:g}")
        losses.semilogy(
            np.convolve(found.losses, np.ones(15) / 15, "valid"), style, color=colour, label=f"lr={start:g}"
        )
    rates.axvline(WARM_UP, color="black", linewidth=0.8, linestyle=":")
    rates.set(title="The rate in force: it climbs, rises, and follows the schedule", xlabel="step", ylabel="rate")
    losses.set(title="The loss, a mean over 15 steps", xlabel="step")
    rates.legend(frameon=False)
    losses.legend(frameon=False)
    found = runs[STARTS[1]]
    agree.plot(found.agreement, color=AFTER, label="1. agreement of gradient and momentum")
    agree.plot(found.growth, color=THIRD, label="3. length of the gradients, of the first ones")
    agree.axhline(0, color="black", linewidth=0.8)
    agree.set(title=f"Two of the questions, lr={STARTS[1]:g}", xlabel="step of the warm-up", ylim=(-0.5, 4.2))
    agree.legend(frameon=False, loc="upper left")
    straight.plot(found.straightness, color=AFTER, label="2. distance travelled, of a random walk's")
    limit = Config().straightness
    asked = limit * np.clip(found.growth, LEAST_GROWTH, 1)
    label = f"straightness={limit:g}, less where gradients\nhave shrunk: below it the rate stays"
    straight.plot(asked, color=BEFORE, label=label)
    straight.set(title="The other question", xlabel="step of the warm-up", ylim=(0.4, 3.1))
    straight.legend(frameon=False, loc="upper right")
    _write(figure, "search")


def _images(before: Any, after: Any, title: str, name: str) -> None:
    figure, places = plt.subplots(1, 3, figsize=(9, 3.1))
    limit = float(before.abs().max())
    for axes, image, label in zip(
        places, (before, after, before - after), ("before", "after", "taken away"), strict=True
    ):
        axes.imshow(image, cmap="RdBu", vmin=-limit, vmax=limit)
        axes.set(title=label, xticks=[], yticks=[])
    figure.suptitle(title)
    _write(figure, name)


def _write(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(FOLDER / f"{name}.png", dpi=85)
    plt.close(figure)


def main() -> None:
    """Draws all of them."""
    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10})
    FOLDER.mkdir(exist_ok=True)
    for draw in (draw_codebook, draw_clip, draw_edges, draw_frequencies, draw_low_rank, draw_search):
        draw()


if __name__ == "__main__":
    main()
