"""Loads states that an earlier version stored in other forms (`docs/algorithm.md`, section 6.4).

A state is first read in the form in which it was saved, and then brought into today's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr

from automagic_core.arrays.state_forms import COMPANDED, WARM_UP_ONLY, Form, moment_of
from automagic_core.moving.earlier_forms import FORMER_MIN_8BIT_SIZE, form_of, moved
from automagic_optax.arrays.containers import is_container, is_stored, pure, refilled
from automagic_optax.cameamp.states import WARM_UP_ONLY as WARM_UP_FIELDS
from automagic_optax.cameamp.states import ArrayState, ScaleByCameampState, flat_fields
from automagic_optax.codec.quantized_array import QuantizedArray
from automagic_optax.codec.stored import RowColumn

Paths = tuple[Any, ...]
_DROPPED = {"background_scale", "spatial_variance"}
"""Some arrays had these and have them no more."""


def in_saved_form(
    like: ScaleByCameampState, saved: Callable[[str, Paths], Any], leaf: Callable[[Any, Any], Any]
) -> ScaleByCameampState:
    """The state with its leaves in the forms of a file; as it is where the file has today's, or no earlier one.

    Args:
        like: a fresh state.
        saved: gives what the file has of a field at a path below it: a mapping, something with shape and dtype, or
            None.
        leaf: makes a leaf from what the file has and any leaf of the same array.

    Raises:
        ValueError: the file has 8 bits where `like` has 32.
    """
    paths, arrays = _arrays(like)
    found = [_in_saved_form(array, path, saved, leaf) for path, array in zip(paths, arrays, strict=True)]
    pairs = list(zip(found, arrays, strict=True))
    if all(_flat_forms(x) == _flat_forms(y) for x, y in pairs):
        return like
    if all(_is_earlier(x, y) for x, y in pairs):
        return _with_arrays(like, like, found)
    if any("exp_avg_absmax" in _flat_forms(x).keys() - _flat_forms(y) for x, y in pairs):
        raise ValueError(
            "states were saved in 8 bits that have 32 bits here. If `progressive_quantization` stored them, restore "
            "with Orbax or flax into progressive_quantization(tx.init(params), step, total_steps); else give the "
            "fields of the run that was saved"
        )
    return like


def former(like: ScaleByCameampState, saved: Any, leaf: Callable[[Any, Any], Any]) -> Any:
    """The field `last_polarity` of a file, from whose leaves `leaf` makes those of a template; None where it has none.

    Args:
        like: a fresh state.
        saved: what the file has of the field.
        leaf: as for `in_saved_form`.
    """
    if saved is None:
        return None
    paths, arrays = _arrays(like)
    structure: Any = jax.tree.structure(like.exp_avg, is_leaf=is_stored)
    leaves = [
        None if (held := below(saved, path)) is None else leaf(held, jax.tree.leaves(array.exp_avg)[0])
        for path, array in zip(paths, arrays, strict=True)
    ]
    return structure.unflatten(leaves)


def in_form_of(state: ScaleByCameampState, like: ScaleByCameampState, place: Callable[[np.ndarray, Any], Any]) -> Any:
    """A state that was read in its saved form, in that of `like`.

    Args:
        state: the state.
        like: a fresh state, or its shapes.
        place: makes a leaf from its values and the leaf of `like`.
    """
    arrays, likes = _arrays(state)[1], _arrays(like)[1]
    if all(_flat_forms(x) == _flat_forms(y) for x, y in zip(arrays, likes, strict=True)):
        return state
    missing: dict[str, Any] = {name: None for name in WARM_UP_FIELDS if getattr(state, name) is None}
    found = [_moved(x, y, place) for x, y in zip(arrays, likes, strict=True)]
    return _with_arrays(state, like._replace(**missing), found)


def replicated(metadata: Any, beside: Any) -> jax.ShapeDtypeStruct:
    """A leaf as Orbax reads it, whole on every device that the leaf `beside` it is on."""
    sharding = beside.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(metadata.shape, metadata.dtype, sharding=sharding)


def below(saved: Any, keys: Paths) -> Any:
    """What a file has at a path of the state, where named tuples are mappings; None where there is nothing."""
    for key in keys:
        name = keystr((key,), simple=True)
        if isinstance(saved, Mapping):
            saved = saved.get(name)
        elif isinstance(saved, (list, tuple)) and name.isdigit() and int(name) < len(saved):
            saved = saved[int(name)]
        else:
            return None
    return saved


def _arrays(state: ScaleByCameampState) -> tuple[list[Paths], list[ArrayState]]:
    """The paths of all arrays below a field, and their states."""
    structure: Any
    found, structure = jax.tree_util.tree_flatten_with_path(state.exp_avg, is_leaf=is_stored)

    def leaves(name: str) -> list[Any]:
        tree = getattr(state, name)
        return [None] * len(found) if tree is None else structure.flatten_up_to(tree)

    columns = [leaves(name) for name in ArrayState._fields]
    return [path for path, _ in found], [ArrayState(*values) for values in zip(*columns, strict=True)]


def _with_arrays(
    state: ScaleByCameampState, like: ScaleByCameampState, arrays: list[ArrayState]
) -> ScaleByCameampState:
    """The state with other arrays.  A field that is None in both stays so; otherwise it is a tree."""
    structure: Any = jax.tree.structure(state.exp_avg, is_leaf=is_stored)
    trees: dict[str, Any] = {}
    for name in ArrayState._fields:
        values = [getattr(array, name) for array in arrays]
        if getattr(like, name) is not None or any(x is not None for x in values):
            trees[name] = structure.unflatten(values)
        else:
            trees[name] = None
    return state._replace(**trees)


def _in_saved_form(
    like: ArrayState, path: Paths, saved: Callable[[str, Paths], Any], leaf: Callable[[Any, Any], Any]
) -> ArrayState:
    block_size = like.exp_avg.block_size if isinstance(like.exp_avg, QuantizedArray) else None
    container = like.exp_avg.codes if isinstance(like.exp_avg, QuantizedArray) else like.exp_avg
    (beside,) = jax.tree.leaves(container)

    def stored(field: str, node: Any, now: Any) -> Any:
        if isinstance(node, Mapping) and "codes" in node:
            codes, absmax = (now.codes, now.absmax) if isinstance(now, QuantizedArray) else (None, None)
            codes, absmax = stored(field, node["codes"], codes), stored(field, node["absmax"], absmax)
            return QuantizedArray(codes, absmax, field not in COMPANDED, block_size)
        if isinstance(node, Mapping) and "row" in node:
            row, column = now if isinstance(now, RowColumn) else (None, None)
            return RowColumn(stored(field, node["row"], row), stored(field, node["column"], column))
        boxed = isinstance(node, Mapping)
        while isinstance(node, Mapping) and node.keys() == {"value"}:
            node = node["value"]
        if not hasattr(node, "shape"):
            return None
        if hasattr(pure(now), "dtype") and form_of(pure(now)) == form_of(node):
            return now  # and keeps how it is split
        return refilled(container, leaf(node, beside)) if boxed and is_container(container) else leaf(node, beside)

    return ArrayState(*(stored(field, saved(field, path), getattr(like, field)) for field in ArrayState._fields))


def _flat_forms(array: ArrayState) -> dict[str, Form]:
    return {name: form_of(x) for name, x in flat_fields(pure(array)).items() if name not in WARM_UP_ONLY}


def _is_earlier(saved: ArrayState, like: ArrayState) -> bool:
    """Whether an earlier version stored an array so that has now the form of `like`."""
    was, now = _flat_forms(saved), _flat_forms(like)
    if was == now:
        return True
    of_res = {name for name in was.keys() | now if moment_of(name) == "exp_avg_res"}
    absmax = {name for name in was.keys() | now if name.endswith("_absmax")}
    # Of all moments only `exp_avg_res` is in other parts now.
    if (was.keys() ^ now) - of_res - absmax - _DROPPED or not _DROPPED & was.keys() - now:
        return False
    to_codes = "exp_avg_absmax" in now and "exp_avg_absmax" not in was
    if to_codes and pure(like.exp_avg).size >= FORMER_MIN_8BIT_SIZE:
        return False
    changed = {name: (was[name], now[name]) for name in was.keys() & now if was[name] != now[name]}
    return all(
        old.shape == new.shape and (old.dtype, new.dtype) == ("float32", "uint8") for old, new in changed.values()
    )


def _moved(saved: ArrayState, like: ArrayState, place: Callable[[np.ndarray, Any], Any]) -> ArrayState:
    gone: dict[str, Any] = {name: None for name in WARM_UP_FIELDS if getattr(saved, name) is None}
    like = like._replace(**gone)
    bare = pure(like)
    wanted = flat_fields(bare)
    own = flat_fields(pure(saved))
    block_size = next((x.block_size for x in bare if isinstance(x, QuantizedArray)), None)
    new = moved(
        own, {name: form_of(x) for name, x in wanted.items()}, bare.exp_avg.shape, block_size, np.asarray, _changed
    )
    names = {id(x): name for name, x in wanted.items()}

    def leaf(x: Any) -> Any:
        value = new[names[id(x)]]
        return place(value.values, x) if isinstance(value, _Changed) else value

    found: ArrayState = jax.tree.map(leaf, like)
    return found


class _Changed(NamedTuple):
    values: np.ndarray


def _changed(values: np.ndarray) -> Any:
    return _Changed(values)
