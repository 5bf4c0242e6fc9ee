"""How cost grows with the size of an array and with the number of arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from PIL import Image

from benchmarks.speed.cases import JAX, TORCH, is_ours
from benchmarks.speed.tables import Row, cases, entries, measured

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

MARKERS = "ovsD^<>pP"
Looks = dict[str, tuple[Any, str]]
"""Colour and marker by name."""


def write(whole: dict[str, Any], path: Path) -> None:
    """Draws two panels for each framework; a white ground makes them readable on dark pages too."""
    # The reader's own style must not matter.
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(2, 2, figsize=(11, 8), layout="constrained", facecolor="white")
        ours: Looks = {}  # the same in both frameworks
        for (left, right), framework in zip(panels, (TORCH, JAX), strict=True):
            rows = measured(whole["rows"], framework=framework)
            peers: Looks = {}
            _draw(left, rows, ours, peers, adapters=False)
            _draw(right, rows, ours, peers, adapters=True)
            left.set_title(f"{framework}: one array", loc="left")
            right.set_title(f"{framework}: many adapters", loc="left")
            lines, names = left.get_legend_handles_labels()
            right.legend(lines, names, fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100, facecolor="white")
        plt.close(figure)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a quarter of the bytes


def _draw(axes: Axes, rows: list[Row], ours: Looks, peers: Looks, adapters: bool) -> None:
    names = cases(rows, adapters)
    for (_, name), by_case in entries(rows).items():
        mine = is_ours(name)
        known = ours if mine else peers
        place = len(known)
        fresh = mpl.colormaps["tab10"](place) if mine else str(0.15 + 0.08 * place), MARKERS[place % len(MARKERS)]
        colour, marker = known.setdefault(name.removesuffix(", eager").removesuffix(", compiled"), fresh)
        points = [by_case[case] for case in names if case in by_case]
        axes.plot(
            [row["arrays"] if adapters else row["parameters"] for row in points],
            [row["ms"] if adapters else 1e6 * row["ms"] / row["parameters"] for row in points],
            color=colour,
            marker=marker,
            markersize=4,
            linestyle=(":" if name.endswith("eager") else "-") if mine else "--",
            linewidth=1.6 if mine else 1,
            label=name,
        )
    if names:
        axes.set(xscale="log", yscale="log")
    axes.set_xlabel("adapters" if adapters else "parameters")
    axes.set_ylabel("milliseconds a step" if adapters else "nanoseconds a parameter")
    axes.grid(alpha=0.25, which="both")
