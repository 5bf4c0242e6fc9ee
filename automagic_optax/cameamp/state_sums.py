"""Sums a scalar state over all arrays without waiting for a device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from automagic_optax.cameamp.find_states import find_states

_TOGETHER = 32


def state_sums(opt_state: Any, name: str) -> list[jax.Array]:
    """The sum of one scalar state over all arrays: one result for each set of devices.  Nothing waits.

    Raises:
        ValueError: the state holds none of this optimizer's states.
    """
    by_devices: dict[frozenset[Any], list[jax.Array]] = {}
    for state in find_states(opt_state):
        for leaf in jax.tree.leaves(getattr(state, name)):
            array = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
            by_devices.setdefault(frozenset(array.devices()), []).append(array)
    return [_total(arrays) for arrays in by_devices.values()]


def _total(arrays: list[jax.Array]) -> jax.Array:
    # A few at a time, since one program for a thousand arrays takes seconds to compile.
    while True:
        arrays = [_sum(arrays[i : i + _TOGETHER]) for i in range(0, len(arrays), _TOGETHER)]
        if len(arrays) == 1:
            return arrays[0]


@jax.jit
def _sum(arrays: list[jax.Array]) -> jax.Array:
    return sum((jnp.sum(array) for array in arrays), start=jnp.zeros([], jnp.int32))


def count(sums: Iterable[jax.Array]) -> int:
    """Adds up on the host what `state_sums` returned."""
    return sum(int(total) for total in jax.device_get(list(sums)))
