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
from benchmarks.evidence.stages import MEASURES, measured
from benchmarks.evidence.statistics import interval
from benchmarks.evidence.variants import OURS, PLAIN, PROFILES, STAGED, VARIANTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLES: Mapping[str, tuple[str, str]] = {
    "balanced": ("tab:red", "s"),
    "adamw": ("black", "o"),
    "schedule-free": ("tab:gray", "x"),
    "prodigy": ("tab:blue", "D"),
    "prodigy-schedule-free": ("tab:cyan", "v"),
    "automagic-v3": ("tab:green", "^"),
    "d-adaptation": ("tab:purple", "<"),
    "mechanic": ("tab:brown", ">"),
    "dog": ("tab:olive", "p"),
}
"""Colour and marker of each method, the same in every picture."""
IN_FIRST = tuple(STYLES)[:6]
BOLD = ("adamw", "balanced")
MOST_SHOWN = 0.3
"""How far above the lowest loss the pictures go."""
SHADES = dict(zip(PROFILES, ("tab:orange", "tab:red", "tab:purple"), strict=True))


def write_figures(results: Results, jobs: Sequence[str], folder: Path) -> dict[str, Path]:
    """Writes what there are results for; returns the files by name."""
    figures = {
        "starts": _starts(results, jobs),
        "curves": _curves(results, jobs),
        "8bit": _eight_bits(results, jobs),
        "stages": _stages(results, jobs),
    }
    paths = {}
    for name, figure in figures.items():
        if figure is not None:
            paths[name] = folder / f"evidence-{name}.png"
            figure.savefig(paths[name], dpi=110)
            plt.close(figure)
    return paths


def _starts(results: Results, jobs: Sequence[str]) -> Figure | None:
    """Final loss of seed 0 against what one sets, one panel a job."""
    figure, row = plt.subplots(1, len(jobs), figsize=(4.6 * len(jobs), 4.8), layout="constrained", squeeze=False)
    drawn = [_start(axes, results, job) for axes, job in zip(row[0], jobs, strict=True)]
    if not any(drawn):
        plt.close(figure)
        return None
    handles = {
        label: handle for axes in row[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), fontsize="small", loc="outside upper center", ncols=3)
    figure.supxlabel(
        "what one sets (in brackets above), logarithmic; seed 0; points at the upper edge lie above it", fontsize=9
    )
    return figure


def _start(axes: Axes, results: Results, job: str) -> bool:
    curves = {name: results.over_starts(job, name) for name in IN_FIRST}
    points = {name: {lr: final_loss(record) for lr, record in curve.items()} for name, curve in curves.items() if curve}
    finite = [loss for curve in points.values() for loss in curve.values() if math.isfinite(loss)]
    if not finite:
        return False
    # Rates that are far too low or too high would leave no room for the rest.
    low = min(finite)
    top = min(max(finite), (1 + MOST_SHOWN) * low)
    for name, curve in points.items():
        colour, marker = STYLES[name]
        bold = name in BOLD
        axes.plot(
            list(curve),
            [min(loss, top) for loss in curve.values()],
            color=colour,
            marker=marker,
            linewidth=2.2 if bold else 1,
            alpha=1 if bold else 0.75,
            label=f"{VARIANTS[name].title} ({VARIANTS[name].knob})",
            zorder=3 if name == OURS.name else 2,
        )
    axes.set(xscale="log", title=JOBS[job].title, ylabel=f"validation loss ({JOBS[job].unit})")
    axes.set_ylim(low - 0.05 * (top - low), top + 0.01 * (top - low))
    axes.grid(alpha=0.3)
    return True


def _curves(results: Results, jobs: Sequence[str]) -> Figure | None:
    """Validation loss over the steps, each method at its best rate or default start, mean over the seeds."""
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
        if ends:
            axes.set_ylim(0.99 * min(ends), min(1.01 * max(axes.get_ylim()), (1 + MOST_SHOWN) * min(ends)))
        axes.grid(alpha=0.3)
        drawn = drawn or bool(ends)
    if not drawn:
        plt.close(figure)
        return None
    figure.legend(fontsize="small", loc="outside upper center", ncols=5)
    figure.supxlabel("the upper edge cuts off what is more than 30 % above the lowest end", fontsize=9)
    return figure


def _eight_bits(results: Results, jobs: Sequence[str]) -> Figure | None:
    """Relative differences of 8-bit and 32-bit losses, one point a seed, with intervals and bounds."""
    groups = [(job, profile, paired(results, job, profile)) for job in jobs for profile in PROFILES]
    groups = [(job, profile, [v for v in found if math.isfinite(v)]) for job, profile, found in groups]
    groups = [group for group in groups if group[2]]
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(9.5, 4.5), layout="constrained")
    for place, (_, profile, found) in enumerate(groups):
        shift = np.linspace(-0.18, 0.18, len(found)) if len(found) > 1 else [0.0]
        colour = SHADES[profile]
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
    alone, strong = STAGED[stage]
    settings = ((PLAIN, "off", "tab:gray"), (alone, "default", "tab:red"), (strong, "stronger", "tab:purple"))
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
