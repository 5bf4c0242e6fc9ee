"""Computes a batch in windows: so many arrays at a time as a compiled function is made for (docs/algorithm.md, 8.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from automagic_torch.arrays.stacked import filled_up
from automagic_torch.cameamp.learning_rate import Evidence, Vote
from automagic_torch.codec.stored import States
from automagic_torch.steps.new_values import Given, New


def run_in_windows(given: Given, window: int, run: Callable[[Given], New]) -> New:
    """One step of stacked arrays, whose new parameters and states are written into `given`.

    Args:
        given: as for `new_values`; no slab.
        window: a call of `run` gets so many arrays.  The last call is filled up with arrays that are skipped, since
            their gradients are NaN or `usable` says so.
        run: `new_values`, which writes into what it is given.
    """
    steps = []
    for first in range(0, len(given.before), window):
        count = min(window, len(given.before) - first)
        part = _window(given, first, count, window)
        step = run(part)
        if count < window:
            given.before[first:].copy_(part.before[:count])
            for name, x in part.stored.items():
                given.stored[name][first:].copy_(x[:count])
        steps.append((step, count))
    return New(
        after=given.before,
        stored=given.stored,
        found=_evidence([(step.found, count) for step, count in steps if step.found is not None]),
        cast=_votes([(step.cast, count) for step, count in steps if step.cast is not None]),
        lr_mask=given.stored.get("lr_mask"),
        square_norm=_sum([step.square_norm for step, _ in steps if step.square_norm is not None]),
        shown=_joined([step.shown[:count] for step, count in steps if step.shown is not None]),
    )


def _window(given: Given, first: int, count: int, window: int) -> Given:
    def cut(x: Tensor, value: float = 0.0) -> Tensor:
        return filled_up(x[first : first + count], window, value)

    def cut_all(states: States) -> States:
        return {name: cut(x) for name, x in states.items()}

    return given._replace(
        g=cut(given.g, torch.nan if given.usable is None else 0.0),
        before=cut(given.before),
        stored=cut_all(given.stored),
        stage_states=cut_all(given.stage_states),
        usable=None if given.usable is None else cut(given.usable),
    )


def _votes(votes: Sequence[tuple[Vote, int]]) -> Vote | None:
    if not votes:
        return None

    def joined(field: str) -> Any:
        return _joined([getattr(vote, field)[:count] for vote, count in votes if getattr(vote, field) is not None])

    of_arrays = {field: joined(field) for field in Vote._fields if field != "size"}
    return Vote(**of_arrays, size=votes[0][0].size)


def _evidence(parts: Sequence[tuple[Evidence, int]]) -> Evidence | None:
    own = [[x[:count] for x in found] for found, count in parts]
    return Evidence(*(torch.cat(x) for x in zip(*own, strict=True))) if own else None


def _sum(numbers: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(numbers)).sum() if numbers else None


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    return torch.cat(list(parts)) if parts else None
