"""Permutations of an array's axes between the two layouts (docs/algorithm.md, section 1.1)."""

from __future__ import annotations

from collections.abc import Sequence

from automagic_core.arrays.layout import Layout, check_layout
from automagic_core.codec.blocks import Shape


def axes_between(ndim: int, source: Layout, target: Layout, *, embedding: bool = False) -> tuple[int, ...]:
    """The permutation that takes an array from one layout to another, as an argument of ``transpose``.

    Args:
        ndim: number of axes of the array.
        source, target: ``"torch"`` (out, in, *spatial) or ``"flax"`` (*spatial, in, out).
        embedding: the array is an embedding, (num, features) in both.

    Returns:
        Axis k of the result is axis ``axes[k]`` of the array.  Embeddings and arrays with fewer than two axes stay as
        they are, and so does every array if the layouts are equal.

    Raises:
        ValueError: an unknown layout.

    Example:
        >>> axes_between(4, "torch", "flax")
        (2, 3, 1, 0)
    """
    check_layout(source)
    check_layout(target)
    if source == target or ndim < 2 or embedding:
        return tuple(range(ndim))
    if target == "flax":
        return (*range(2, ndim), 1, 0)
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def inverse_axes(axes: Sequence[int]) -> tuple[int, ...]:
    """The permutation that takes the array back."""
    return tuple(sorted(range(len(axes)), key=lambda k: axes[k]))


def check_axes(axes: Sequence[int], ndim: int, name: str) -> tuple[int, ...]:
    """Checks a permutation and returns it as a tuple.

    Args:
        axes: a permutation given by hand.
        ndim: number of axes of the array.
        name: the parameter's name, for the error.

    Raises:
        ValueError: they are no permutation of the array's axes.
    """
    found = tuple(axes)
    if sorted(found) != list(range(ndim)):
        raise ValueError(f"axes = {found!r} of {name} are no permutation of its {ndim} axes; valid: 0 to {ndim - 1}")
    return found


def transposed_shape(shape: Shape, axes: Sequence[int]) -> Shape:
    """The shape of an array after ``transpose(axes)``."""
    return tuple(shape[axis] for axis in axes)


def keeps_memory_order(shape: Shape, axes: Sequence[int]) -> bool:
    """Whether ``transpose(axes)`` leaves the elements in their row-major order: only axes of length 1 move."""
    moved = [axis for axis in axes if shape[axis] != 1]
    return moved == sorted(moved) or 0 in shape
