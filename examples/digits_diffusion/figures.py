"""The two pictures: samples beside real digits, and the loss curves."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.layout_engine import ConstrainedLayoutEngine

from examples.digits_diffusion.data import SIDE
from examples.digits_diffusion.training import Run

OURS, BEST, OTHER = "#c8452d", "#2b5fa5", "#9aa5b1"
COLUMNS, ROWS = 20, 3


def save_samples(bands: Sequence[tuple[str, np.ndarray]], path: Path) -> None:
    """One band of images under its title for each entry of `bands`."""
    figure, axes = plt.subplots(
        len(bands), 1, figsize=(11, 2.1 * len(bands)), layout=ConstrainedLayoutEngine(hspace=0.06)
    )
    for axis, (title, images) in zip(axes, bands, strict=True):
        axis.imshow(_mosaic(images), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(title, loc="left", fontsize=12)
        axis.set_axis_off()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _mosaic(images: np.ndarray) -> np.ndarray:
    gap = 2
    tiles = np.pad(
        images[: ROWS * COLUMNS].reshape(ROWS, COLUMNS, SIDE, SIDE),
        ((0, 0), (0, 0), (0, gap), (0, gap)),
        constant_values=-1.0,
    )
    side = SIDE + gap
    return tiles.transpose(0, 2, 1, 3).reshape(ROWS * side, COLUMNS * side)[:-gap, :-gap]


def save_losses(ours: Run, adamw: Sequence[Run], path: Path) -> None:
    """Training loss, held-out loss and learning rate over the steps, of every run."""
    best = min(adamw, key=lambda run: run.final_loss)
    others = [run for run in adamw if run is not best]
    figure, (training, held_out, rate) = plt.subplots(1, 3, figsize=(14, 4.8), layout="constrained")

    def draw(run: Run, colour: str, width: float, label: str | None) -> None:
        training.plot(_smooth(run.losses), color=colour, linewidth=width, label=label)
        held_out.plot(list(run.held_out), list(run.held_out.values()), color=colour, linewidth=width)
        rate.plot(run.rates, color=colour, linewidth=width)

    draw(ours, OURS, 2.0, f"{ours.name}, one run: found {max(ours.rates):.2g}")
    draw(best, BEST, 2.0, f"{best.name}, the best of {len(adamw)} rates")
    for run in others:
        draw(run, OTHER, 1.2, "AdamW, the other rates" if run is others[0] else None)
    for axis in (training, held_out, rate):
        for line in axis.lines[:2]:
            line.set_zorder(3)

    training.set(title="Training loss, smoothed", ylabel="denoising loss")
    held_out.set(title="Loss on held-out digits 5 to 9, fixed noise", ylabel="denoising loss")
    highest = max(max(run.rates) for run in (ours, *adamw))
    rate.set(title="Learning rate", yscale="log", ylim=(highest / 3e4, highest * 2))
    # The first steps are far above all that follows, and much the same for all.
    _leave_out_start(training, [_smooth(run.losses) for run in (ours, *adamw)])
    _leave_out_start(held_out, [list(run.held_out.values()) for run in (ours, *adamw)])
    for axis in (training, held_out, rate):
        axis.set(xlabel="step", xlim=(0, len(ours.losses)))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    # Under the axes, where no curve is.
    figure.legend(*training.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _leave_out_start(axis: plt.Axes, curves: Sequence[Sequence[float]]) -> None:
    lowest = min(min(curve) for curve in curves)
    highest = max(curve[len(curve) // 10] for curve in curves)
    margin = 0.08 * (highest - lowest)
    axis.set_ylim(lowest - margin, highest + margin)


def _smooth(losses: Sequence[float], decay: float = 0.95) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smoothed, mean = [], 0.0
    for step, loss in enumerate(losses, start=1):
        mean = decay * mean + (1 - decay) * loss
        smoothed.append(mean / (1 - decay**step))
    return smoothed
