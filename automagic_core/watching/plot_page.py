"""Draws the page of `automagic_core.plot`: one panel for each kind of statistic, one colour for each run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from automagic_core.watching.metrics import (
    EFFECTIVE_RANK,
    ENERGY_REMOVED,
    RATE,
    RATE_FACTOR,
    SKIPPED_STEPS,
    STAGES,
    STATE_BYTES,
    TORQUE,
)
from automagic_core.watching.plot_names import shortened

Curves = Mapping[str, tuple[Sequence[int], Sequence[float]]]
Run = tuple[str, Curves]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
"""The colours of Okabe and Ito, which colour-blind people can distinguish, without yellow."""
LINE_STYLES = ("-", "--", "-.", ":")
INK, MUTED, GRID = "#222222", "#8a8a8a", "#e4e4e4"
LEGEND_ROW = 3
"""Runs in a row of the legend."""


def draw_page(runs: Sequence[Run]) -> Any:
    """Makes a matplotlib figure 10 inches wide, without changing the state of pyplot.

    Args:
        runs: names and curves, as `automagic_core.watching.run_log.read_run` gives them.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError("drawing needs matplotlib; pip install 'automagic-cameamp[dashboards]' brings it") from error
    layout = ConstrainedLayoutEngine(hspace=0.04, wspace=0.04)
    figure = Figure(figsize=(10, 12.5), dpi=120, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    panels = figure.subplots(4, 2).reshape(-1)
    for axes, (title, draw) in zip(panels, PANELS.items(), strict=True):
        _dress(axes, title)
        drawn = [draw(axes, curves, _Style(index, len(runs))) for index, (_, curves) in enumerate(runs)]
        _finish(axes, any(drawn), len(runs) > 1)
    keys = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=2.5, label=name) for i, (name, _) in enumerate(runs)
    ]
    columns = min(LEGEND_ROW, len(runs))
    figure.legend(handles=keys, loc="outside upper left", ncols=columns, frameon=False, fontsize=11, labelcolor=INK)
    return figure


class _Style:
    """The look of one run's curves: one colour for each run, or for each curve if there is a single run."""

    def __init__(self, index: int, runs: int) -> None:
        self.index, self.runs = index, runs

    def __call__(self, curve: int = 0) -> dict[str, Any]:
        colour = COLOURS[(self.index if self.runs > 1 else curve) % len(COLOURS)]
        return {"color": colour, "linestyle": LINE_STYLES[curve % len(LINE_STYLES)], "linewidth": 1.6}


def _loss(axes: Any, curves: Curves, style: _Style) -> bool:
    names = sorted((name for name in curves if "loss" in name), key=lambda name: (name != "loss", name))
    for curve, name in enumerate(names):
        _line(axes, curves[name], style(curve), name if len(names) > 1 else None)
    return bool(names)


def _band(name: str, log: bool) -> Callable[[Any, Curves, _Style], bool]:
    def draw(axes: Any, curves: Curves, style: _Style) -> bool:
        if f"{name}/mean" not in curves:
            return False
        if log and any(value > 0 for value in curves[f"{name}/mean"][1]):
            axes.set_yscale("log", nonpositive="mask")
        _line(axes, curves[f"{name}/mean"], style())
        if f"{name}/min" in curves and f"{name}/max" in curves:
            _shade(axes, curves[f"{name}/min"], curves[f"{name}/max"], style())
        return True

    return draw


def _single(name: str, **look: Any) -> Callable[[Any, Curves, _Style], bool]:
    def draw(axes: Any, curves: Curves, style: _Style) -> bool:
        if name in curves:
            _line(axes, curves[name], {**style(), **look})
        return name in curves

    return draw


def _counted(name: str, integer: bool = False) -> Callable[[Any, Curves, _Style], bool]:
    single = _single(name, drawstyle="steps-post", clip_on=False, zorder=3)  # a line at 0 keeps its full width

    def draw(axes: Any, curves: Curves, style: _Style) -> bool:
        from matplotlib.ticker import EngFormatter, MaxNLocator

        drawn = single(axes, curves, style)
        if drawn:
            # The axis already has room for the runs drawn before.
            highest = max(_finite(curves[name][1]), default=0.0)
            axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], 1.05 * highest, 1))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=integer))
            axes.yaxis.set_major_formatter(EngFormatter(unit="" if integer else "B", sep=" "))
        return drawn

    return draw


def _energy(axes: Any, curves: Curves, style: _Style) -> bool:
    from matplotlib.ticker import PercentFormatter

    stages = [stage for stage in STAGES if f"{ENERGY_REMOVED}/{stage}" in curves]
    for stage in stages:
        _line(axes, curves[f"{ENERGY_REMOVED}/{stage}"], style(STAGES.index(stage)), stage)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    return bool(stages)


def _ranks(axes: Any, curves: Curves, style: _Style) -> bool:
    """Draws the median and the range over all adapters; for a single run it also names the extreme ones."""
    of_arrays = {
        name.removeprefix(f"{EFFECTIVE_RANK}/"): curve
        for name, curve in curves.items()
        if name.startswith(f"{EFFECTIVE_RANK}/")
    }
    if not of_arrays:
        return False
    steps = sorted({step for steps, _ in of_arrays.values() for step in steps})
    table = np.full((len(of_arrays), len(steps)), math.nan)
    position = {step: index for index, step in enumerate(steps)}
    for row, (own_steps, values) in enumerate(of_arrays.values()):
        table[row, [position[step] for step in own_steps]] = values
    known = np.isfinite(table).any(axis=0)
    table, steps = table[:, known], [step for step, is_known in zip(steps, known, strict=True) if is_known]
    if not steps:
        return False
    _line(axes, (steps, list(np.nanmedian(table, axis=0))), style())
    low, high = np.nanmin(table, axis=0), np.nanmax(table, axis=0)
    _shade(axes, (steps, list(low)), (steps, list(high)), style())
    if style.runs == 1 and len(of_arrays) > 1:
        names, last = list(of_arrays), table[:, -1]
        for what, array, y in (("highest", np.nanargmax(last), 1), ("lowest", np.nanargmin(last), 0)):
            text = f"{what} at the end: {shortened(names[int(array)], 44)}"
            look = {"fontsize": 8, "color": MUTED, "ha": "right", "va": "top" if y else "bottom"}
            axes.text(0.99, 0.98 if y else 0.02, text, transform=axes.transAxes, **look)
        axes.margins(y=0.18)
    return True


PANELS: Mapping[str, Callable[[Any, Curves, _Style], bool]] = {
    "Loss": _loss,
    "Row rates: mean and range": _band(RATE, log=True),
    "Mean torque": _single(TORQUE),
    "Row factors found by the search: mean and range": _band(RATE_FACTOR, log=True),
    "Gradient energy removed by each stage": _energy,
    "Effective rank of LoRA arrays: median and range": _ranks,
    "Skipped steps, summed over arrays": _counted(SKIPPED_STEPS, integer=True),
    "State": _counted(STATE_BYTES),
}


def _line(
    axes: Any, curve: tuple[Sequence[int], Sequence[float]], look: Mapping[str, Any], label: str | None = None
) -> None:
    steps, values = curve
    # One or two values make no visible line.
    marker = {"marker": "o", "markersize": 4} if len(_finite(values)) < 3 else {}
    axes.plot(steps, values, label=label, **look, **marker)


def _shade(
    axes: Any,
    low: tuple[Sequence[int], Sequence[float]],
    high: tuple[Sequence[int], Sequence[float]],
    look: Mapping[str, Any],
) -> None:
    if list(low[0]) != list(high[0]):
        return
    if axes.get_yscale() == "log":
        # A logarithmic axis has no 0, so the band ends where a rate is 0.
        low, high = ((steps, [y if y > 0 else math.nan for y in values]) for steps, values in (low, high))
    if len(low[0]) == 1:
        axes.vlines(low[0], low[1], high[1], color=look["color"], alpha=0.35, linewidth=5)
    else:
        axes.fill_between(low[0], low[1], high[1], color=look["color"], alpha=0.15, linewidth=0)


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _dress(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=9, colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _finish(axes: Any, drawn: bool, several: bool) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    if not drawn:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color=MUTED)
        axes.set_yticks([])
        axes.set_xticks([])
        axes.grid(False)
        return
    axes.set_xlabel("step", fontsize=9, color=MUTED, labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    if len(by_label) > 2:  # too many for a corner: make room above the curves
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.1 * math.ceil(len(by_label) / 2) * (high - low))
    if by_label:
        where = {"loc": "upper left", "ncols": 2} if len(by_label) > 2 else {"loc": "best"}
        legend = axes.legend(by_label.values(), by_label.keys(), fontsize=8, frameon=False, labelcolor=INK, **where)
        if several:  # there a colour means a run
            for handle in legend.get_lines():
                handle.set_color(MUTED)
