"""Writes a table of what an optimizer holds, with a verdict on the share of 8-bit states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from automagic_core.watching.memory import ADAM_BYTES_PER_PARAMETER

LOW_SHARE, HIGH_SHARE = 0.3, 0.8
"""The table warns below the first share of 8-bit parameters and praises above the second."""


class HeldStates(NamedTuple):
    """The contents of the table.

    Attributes:
        eight_bit, thirty_two_bit: numbers of parameters with 8-bit and with 32-bit states.
        without: number of parameters without states, because they never had a gradient.
        bytes_by_name: bytes by the name of the state; they include its absmax, or its row and column statistics.
        kept_in_32: why no state could be in 8 bits, or None where some could.
    """

    eight_bit: int
    thirty_two_bit: int
    without: int
    bytes_by_name: Mapping[str, int]
    kept_in_32: str | None


def memory_table(held: HeldStates) -> str:
    """Writes the table.

    Returns:
        Lines of at most 100 characters: parameters, bytes against Adam (two float32 moments for the parameters that
        have states), bytes by state, and a verdict.
    """
    parameters = held.eight_bit + held.thirty_two_bit
    every = parameters + held.without
    total = sum(held.bytes_by_name.values())
    adam = ADAM_BYTES_PER_PARAMETER * parameters
    lines = [
        _row("parameters", _whole(every)),
        _row("  with 8-bit states", _whole(held.eight_bit), _percent(held.eight_bit, every)),
        _row("  with 32-bit states", _whole(held.thirty_two_bit), _percent(held.thirty_two_bit, every)),
        _row("  without states", _whole(held.without), _percent(held.without, every)),
        "",
        _row("state", "bytes", "of all"),
    ]
    by_size = sorted(held.bytes_by_name.items(), key=lambda item: -item[1])
    lines += [_row(f"  {name}", _whole(size), _percent(size, total)) for name, size in by_size]
    lines += [
        "",
        _row("all states", _whole(total), f"{_percent(total, adam)} of Adam's" if adam else ""),
        _row("Adam's states", _whole(adam)),
        _row("saved", _whole(adam - total)),
        "",
        verdict(held),
    ]
    return "\n".join(lines)


def verdict(held: HeldStates) -> str:
    """One sentence on the share of 8-bit parameters among those that have states."""
    parameters = held.eight_bit + held.thirty_two_bit
    if parameters == 0:
        return "No states yet: an array gets its states in its first step with a gradient."
    share = held.eight_bit / parameters
    if held.kept_in_32 is not None and held.eight_bit == 0:
        return f"All states are in 32 bits: {held.kept_in_32}."
    said = f"{share:.1%} of the parameters have 8-bit states"
    if share < LOW_SHARE:
        return f"Warning: only {said}. A smaller min_8bit_size takes in more arrays."
    if share > HIGH_SHARE:
        return f"Very good: {said}."
    return f"{said[0].upper()}{said[1:]}."


def _row(name: str, value: str, share: str = "") -> str:
    return f"{name:<24}{value:>16}  {share:>10}".rstrip()


def _whole(number: int) -> str:
    return f"{number:,}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""
