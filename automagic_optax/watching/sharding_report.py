"""`sharding_report`: what an optimizer state costs on a mesh (`docs/algorithm.md`, section 9.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from automagic_optax.arrays.containers import flatten_like, pure
from automagic_optax.arrays.leaves import leaf_name, leaves_of
from automagic_optax.cameamp.find_states import only_state
from automagic_optax.cameamp.states import ArrayState, scatter_states
from automagic_optax.codec.quantized_array import QuantizedArray, common_run
from automagic_optax.sharding.placement import parts
from automagic_optax.sharding.state_shardings import blocks_are_whole


def sharding_report(params: Any, opt_state: Any) -> dict[str, Any]:
    """How an optimizer state is split over devices, and what an update must exchange besides sums.

    Args:
        params: the parameters, on their mesh.
        opt_state: a state with one `ScaleByCameampState`, on its mesh.

    Returns:
        A dictionary of

        ``devices``: how many devices hold the parameters;
        ``state_bytes``: bytes of the whole state, each array counted once;
        ``state_bytes_per_device``: bytes on the device that holds most;
        ``cut_blocks``: name → bytes, for arrays with an 8-bit block that a border between devices cuts: what each
        device gathers for their absmax in one update.  Their states are right, but splitting another axis
        is cheaper;
        ``gathered_bytes``: the sum of these bytes;
        ``misplaced``: names of arrays whose states are not split like the array.

    Raises:
        ValueError: there is not exactly one state of this optimizer, or its arrays are not those of `params`.
    """
    tree = pure(params)
    state = pure(only_state(opt_state, "opt_state"))
    arrays = scatter_states(tree, state)
    cut: dict[str, int] = {}
    misplaced: list[str] = []
    for leaf, array in zip(leaves_of(tree), arrays, strict=True):
        held = array.exp_avg.codes if isinstance(array.exp_avg, QuantizedArray) else array.exp_avg
        if not isinstance(held, jax.Array):  # outside of a mask
            continue
        sharding, name = leaf.value.sharding, leaf_name(leaf.path)
        if not held.sharding.is_equivalent_to(sharding, held.ndim):
            misplaced.append(name)
        if isinstance(sharding, NamedSharding) and (gathered := _gathered(array, sharding)):
            cut[name] = gathered
    leaves = jax.tree.leaves(pure(opt_state))
    return {
        "devices": max((len(leaf.sharding.device_set) for leaf in flatten_like(tree, tree)), default=1),
        "state_bytes": sum(x.nbytes for x in leaves),
        "state_bytes_per_device": _largest_part(leaves),
        "cut_blocks": cut,
        "gathered_bytes": sum(cut.values()),
        "misplaced": misplaced,
    }


def _gathered(array: ArrayState, sharding: NamedSharding) -> int:
    """Bytes that each device gathers in one update because blocks are cut."""
    stored = (array.exp_avg, array.exp_avg_sq, array.exp_avg_res, array.s)
    total = 0
    for x in (x for x in stored if isinstance(x, QuantizedArray)):
        if blocks_are_whole(sharding, x.shape, x.block_size) or x.block_size is None:
            continue
        run = common_run(x.shape, x.block_size, sharding.mesh.size)
        last = parts(sharding.spec[-1], sharding.mesh) if len(sharding.spec) == len(x.shape) else 1
        total += 4 * x.size // (run if (x.shape[-1] // last) % run == 0 else 1)
    return total


def _largest_part(leaves: Sequence[jax.Array]) -> int:
    held: dict[Any, int] = {}
    for x in leaves:
        part = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for device in x.sharding.device_set:
            held[device] = held.get(device, 0) + part
    return max(held.values(), default=0)
