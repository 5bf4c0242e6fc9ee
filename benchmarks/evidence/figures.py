"""The report's pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.evidence.eight_bits import BOUNDS, FEWEST, paired
from benchmarks.evidence.jobs import JOBS
from benchmarks.evidence.results import Results, final_loss
from benchmarks.evidence.stages import MEASURES, ON, measured, off, strong
from benchmarks.evidence.statistics import interval
from benchmarks.evidence.variants import PROFILES, VARIANTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLES: Mapping[str, tuple[str, str]] = {
    "adamw": ("black", "o"),
    "balanced": ("tab:red", "s"),
    "memory_optimized": ("tab:orange", "v"),
    "quality_optimized": ("tab:purple", "^"),
    "cautious-adamw": ("tab:blue", "D"),
    "adamw8bit": ("tab:gray", "x"),
    "came": ("tab:green", "+"),
}
"""Colour and marker of each optimizer, the same in every picture."""
BOLD = ("adamw", "balanced")


def write_figures(results: Results, jobs: Sequence[str], folder: Path) -> dict[str, Path]:
    """Writes what there are results for; returns the files by name."""
    figures = {f"rates-{job}": _rates(results, job) for job in jobs}
    figures |= {"curves": _curves(results, jobs), "8bit": _eight_bits(results, jobs), "stages": _stages(results, jobs)}
    paths = {}
    for name, figure in figures.items():
        if figure is not None:
            paths[name] = folder / f"evidence-{name}.png"
            figure.savefig(paths[name], dpi=110)
            plt.close(figure)
    return paths


def _rates(results: Results, job: str) -> Figure | None:
    """Final loss of seed 0 against the starting rate."""
    curves = {name: results.over_rates(job, name) for name in STYLES}
    points = {name: {lr: final_loss(record) for lr, record in curve.items()} for name, curve in curves.items() if curve}
    finite = [loss for curve in points.values() for loss in curve.values() if math.isfinite(loss)]
    if not finite:
        return None
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    # Rates that are far too high end anywhere above the start, and would leave no room for the rest.
    start = max(record["curve"][0][1] for curve in curves.values() for record in curve.values())
    low, high = min(finite), min(max(finite), start)
    top = high + 0.06 * (high - low)
    for name, curve in points.items():
        colour, marker = STYLES[name]
        drawn = [min(loss, top) for loss in curve.values()]
        bold = name in BOLD
        axes.plot(
            list(curve),
            drawn,
            color=colour,
            marker=marker,
            linewidth=2.2 if bold else 1,
            alpha=1 if bold else 0.7,
            label=VARIANTS[name].title.strip("`"),
            zorder=3 if bold else 2,
        )
    axes.set(xscale="log", xlabel="starting learning rate", ylabel=f"validation loss ({JOBS[job].unit})")
    beyond = any(loss > top for curve in points.values() for loss in curve.values())
    axes.set(title=f"{JOBS[job].title}, one seed" + ("\nPoints at the upper edge are above it" if beyond else ""))
    axes.set_ylim(low - 0.06 * (high - low), top)
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right center")
    return figure


def _curves(results: Results, jobs: Sequence[str]) -> Figure | None:
    """Validation loss over the steps, each optimizer at its best rate, mean over the seeds."""
    figure, row = plt.subplots(1, len(jobs), figsize=(4.4 * len(jobs), 4.3), layout="constrained", squeeze=False)
    drawn = False
    for axes, job in zip(row[0], jobs, strict=True):
        ends: list[float] = []
        for name, (colour, marker) in STYLES.items():
            runs = [record for record in results.by_seed(job, name).values() if record["loss"] is not None]
            if not runs:
                continue
            # Without the start, which is the same for all and would leave no room for what differs.
            steps = [step for step, _ in runs[0]["curve"][1:]]
            means = np.mean([[loss for _, loss in record["curve"][1:]] for record in runs], axis=0)
            label = None if drawn else VARIANTS[name].title.strip("`")
            axes.plot(steps, means, color=colour, marker=marker, markersize=4, label=label)
            ends.append(means[-1])
        axes.set(title=JOBS[job].title, xlabel="step", ylabel=f"validation loss ({JOBS[job].unit})")
        axes.grid(alpha=0.3)
        drawn = drawn or bool(ends)
    if not drawn:
        plt.close(figure)
        return None
    figure.legend(fontsize="small", loc="outside upper center", ncols=len(STYLES))
    return figure


def _eight_bits(results: Results, jobs: Sequence[str]) -> Figure | None:
    """Relative differences of 8-bit and 32-bit losses, one point a seed, with intervals and bounds."""
    groups = [(job, profile, paired(results, job, profile)) for job in jobs for profile in PROFILES]
    groups = [(job, profile, [v for v in found if math.isfinite(v)]) for job, profile, found in groups]
    if not any(found for *_, found in groups):
        return None
    figure, axes = plt.subplots(figsize=(9.5, 4.5), layout="constrained")
    for place, (_, profile, found) in enumerate(groups):
        if not found:
            continue
        shift = np.linspace(-0.18, 0.18, len(found)) if len(found) > 1 else [0.0]
        colour = STYLES[profile][0]
        axes.plot(place + np.asarray(shift), 100 * np.asarray(found), ".", color=colour, alpha=0.6)
        ends = interval(found)
        if ends.seeds >= FEWEST:
            error = [[100 * (ends.mean - ends.low)], [100 * (ends.high - ends.mean)]]
            axes.errorbar(place, 100 * ends.mean, yerr=error, fmt="o", color=colour, capsize=6, linewidth=2)
        else:
            axes.plot(place, 100 * ends.mean, "_", color=colour, markersize=18, markeredgewidth=2)
        axes.hlines(100 * BOUNDS[profile], place - 0.35, place + 0.35, color="black", linestyle="--", linewidth=1)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [f"{job}\n{profile.replace('_', chr(10))}" for job, profile, _ in groups])
    axes.tick_params(axis="x", labelsize="small")
    axes.set(ylabel="8-bit loss above 32-bit loss (%)", title="Points are seeds, bars 95 % intervals, dashes bounds")
    axes.grid(alpha=0.3, axis="y")
    return figure


def _stages(results: Results, jobs: Sequence[str]) -> Figure | None:
    """Each stage's measure without it, with it and with it stronger, at the same rate."""
    figure, row = plt.subplots(1, len(MEASURES), figsize=(12.5, 4.3), layout="constrained")
    drawn = [_stage(axes, results, jobs, stage) for axes, stage in zip(row, MEASURES, strict=True)]
    if not any(drawn):
        plt.close(figure)
        return None
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", loc="outside upper center", ncols=len(labels))
    return figure


def _stage(axes: Axes, results: Results, jobs: Sequence[str], stage: str) -> bool:
    measure = MEASURES[stage][0]
    settings = ((off(stage), "off", "tab:gray"), (ON, "on", "tab:red"), (strong(stage), "stronger", "tab:purple"))
    drawn = False
    for number, (variant, label, colour) in enumerate(settings):
        found = [measured(results, job, variant, measure) for job in jobs]
        places = [place + 0.27 * (number - 1) for place, cell in enumerate(found) if cell is not None]
        cells = [cell for cell in found if cell is not None]
        heights, errors = [cell.mean for cell in cells], [cell.spread for cell in cells]
        axes.bar(places, heights, 0.25, yerr=errors, color=colour, alpha=0.8, capsize=3, label=label)
        drawn = drawn or bool(cells)
    axes.set_xticks(range(len(jobs)), list(jobs))
    axes.set(title=f"{stage}: {measure.title}")
    axes.grid(alpha=0.3, axis="y")
    return drawn
