"""The threshold of progressive quantization, and what a migration's notes say."""

from __future__ import annotations

import itertools
import logging

import pytest

from automagic_core.moving.notes import Notes
from automagic_core.moving.progressive import NO_ARRAY, progressive_min_8bit_size


@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 100, 999, 10_000])
def test_three_phases_end_where_they_should(total: int) -> None:
    sizes = [progressive_min_8bit_size(step, total) for step in range(total + 3)]
    for step, size in enumerate(sizes):
        if step < 0.2 * total:
            assert size == NO_ARRAY
        elif step >= 0.8 * total:
            assert size == 1
        else:
            assert 2048 <= size <= 8192
    assert all(later <= earlier for earlier, later in itertools.pairwise(sizes))


def test_the_threshold_falls_by_equal_factors() -> None:
    sizes = [progressive_min_8bit_size(step, 1000) for step in (200, 350, 500, 650, 799)]
    # Half of it every 300 steps; the last one is a step short of 2048.
    assert sizes == [8192, round(8192 / 2**0.5), 4096, round(4096 / 2**0.5), round(2048 * 2 ** (1 / 300))]


@pytest.mark.parametrize(("step", "total", "name"), [(-1, 10, "step"), (0, 0, "total_steps")])
def test_numbers_outside_their_range_are_named(step: int, total: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} = "):
        progressive_min_8bit_size(step, total)


def test_notes_are_told_once_with_their_arrays_and_losses_first(caplog: pytest.LogCaptureFixture) -> None:
    notes = Notes()
    for array in ("a", "b", "c", "d", "e"):
        notes.changed("begins anew", array)
    notes.lost("is dropped", "a")
    notes.changed("holds")
    with caplog.at_level(logging.INFO, "some.logger"):
        told = notes.tell("some.logger")
    assert told == ["is dropped (a)", "begins anew (a, b, c and 2 more)", "holds"]
    assert [(record.levelname, record.message) for record in caplog.records] == list(
        zip(["WARNING", "INFO", "INFO"], told, strict=True)
    )
