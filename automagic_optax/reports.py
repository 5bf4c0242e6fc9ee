"""What a person asks of an optimizer state: how much memory it holds, and to drop what the warm-up needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from automagic_core import ArrayMemory
from automagic_core import memory_report as core_memory_report
from automagic_optax.cameamp_state import ScaleByCameampState, scatter_states
from automagic_optax.codec import QuantizedArray
from automagic_optax.flax_variables import is_variable
from automagic_optax.parameter_places import parameter_places


def memory_report(opt_state: Any, params: Any = None) -> dict[str, Any]:
    """Counts the arrays that an optimizer state really holds.

    Args:
        opt_state: any state that contains a `ScaleByCameampState`, however it is wrapped: chained, masked, partitioned,
            injected, or inside an ``nnx.Optimizer`` or a ``TrainState``.
        params: the parameters, with which the state of any optax transformation can be counted, that of
            `quantize_state` too: a parameter counts as one in 8 bits when it has a state in 8 bits.

    Returns:
        The keys of `automagic_core.memory_report`; bytes in the whole state, those of wrappers included.

    Raises:
        ValueError: without `params`, the state holds none of this optimizer's states.
    """
    opt_state = opt_state_of(opt_state)
    if params is not None:
        return _report_of_any(opt_state, params)
    arrays = []
    for state in find_states(opt_state):
        # `age` has one scalar for each array, so its structure is the parameters'.
        for array in scatter_states(state.age, state):
            elements = int(jax.tree.leaves(array.exp_avg)[0].size)
            arrays.append(ArrayMemory(elements, isinstance(array.exp_avg, QuantizedArray), _bytes(array)))
    held = _bytes(opt_state)
    return core_memory_report(arrays, held - sum(array.state_bytes for array in arrays))


def _report_of_any(opt_state: Any, params: Any) -> dict[str, Any]:
    places = parameter_places(params, opt_state, is_leaf=lambda x: isinstance(x, QuantizedArray))
    eight = {place.parameter_path for place in places if isinstance(place.array, QuantizedArray)}
    arrays = [
        ArrayMemory(int(leaf.size), path in eight, 0)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_variable)[0]
    ]
    return core_memory_report(arrays, _bytes(opt_state))


def finish_warmup(opt_state: Any) -> Any:
    """Drops `s` and `last_polarity`, which are needed only while warming up.

    Call it once after `warmup_steps` steps; jitted steps compile once more.  Called earlier it also ends the votes: the
    learning rate stays as it was found so far.

    Args:
        opt_state: any state that contains a `ScaleByCameampState`, as in `memory_report`.

    Returns:
        The same state without them.
    """
    find_states(opt_state)
    return map_states(lambda state: state._replace(s=None, last_polarity=None), opt_state)


def opt_state_of(optimizer: Any) -> Any:
    """An optimizer state: itself, or that of an ``nnx.Optimizer`` or a ``TrainState``."""
    return getattr(optimizer, "opt_state", optimizer)


def _is_state(x: Any) -> bool:
    return isinstance(x, ScaleByCameampState)


def map_states(function: Callable[[ScaleByCameampState], Any], opt_state: Any) -> Any:
    """The optimizer state with the function's result for every `ScaleByCameampState` in it."""
    return jax.tree.map(lambda x: function(x) if _is_state(x) else x, opt_state, is_leaf=_is_state)


def find_states(opt_state: Any) -> list[ScaleByCameampState]:
    """Every `ScaleByCameampState` inside an optimizer state, however it is wrapped.

    Raises:
        ValueError: there is none.
    """
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(x)]
    if not found:
        raise ValueError(
            "found no ScaleByCameampState: this is not the state of automagic_8bit or scale_by_cameamp; "
            "memory_report counts any other state if it is given the parameters too"
        )
    return found


def _bytes(tree: Any) -> int:
    return sum(int(x.size) * x.dtype.itemsize for x in jax.tree.leaves(tree))
