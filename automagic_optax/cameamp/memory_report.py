"""`memory_report`: counts the bytes that an optimizer state holds."""

from __future__ import annotations

from typing import Any

import jax

from automagic_core import ArrayMemory
from automagic_core import memory_report as core_memory_report
from automagic_optax.arrays.leaves import leaves_of
from automagic_optax.arrays.parameter_places import parameter_places
from automagic_optax.cameamp.find_states import find_states, opt_state_of
from automagic_optax.cameamp.states import scatter_states
from automagic_optax.codec.quantized_array import QuantizedArray


def memory_report(opt_state: Any, params: Any = None) -> dict[str, Any]:
    """Counts the arrays that an optimizer state holds.

    Args:
        opt_state: any state that contains a `ScaleByCameampState`, however it is wrapped: chained, masked, partitioned,
            injected, or inside an ``nnx.Optimizer`` or a ``TrainState``.
        params: the parameters.  With them the state of any optax transformation is counted, also that of
            `quantize_state`; a parameter then counts as 8-bit if it has an 8-bit state.

    Returns:
        The keys of `automagic_core.memory_report`.  Bytes are those of the whole state, wrappers included.

    Raises:
        ValueError: without `params`, the state holds none of this optimizer's states.
    """
    opt_state = opt_state_of(opt_state)
    if params is not None:
        return _report_of_any(opt_state, params)
    arrays = []
    for state in find_states(opt_state):
        # `age` has one scalar for each array, so it has the structure of the parameters.
        for array in scatter_states(state.age, state):
            elements = int(jax.tree.leaves(array.exp_avg)[0].size)
            arrays.append(ArrayMemory(elements, isinstance(array.exp_avg, QuantizedArray), bytes_of(array)))
    held = bytes_of(opt_state)
    return core_memory_report(arrays, held - sum(array.state_bytes for array in arrays))


def _report_of_any(opt_state: Any, params: Any) -> dict[str, Any]:
    places = parameter_places(params, opt_state, is_leaf=lambda x: isinstance(x, QuantizedArray))
    eight = {place.parameter_path for place in places if isinstance(place.array, QuantizedArray)}
    arrays = [ArrayMemory(int(leaf.value.size), leaf.path in eight, 0) for leaf in leaves_of(params)]
    return core_memory_report(arrays, bytes_of(opt_state))


def bytes_of(tree: Any) -> int:
    """The bytes of all arrays of a tree; shapes and dtypes are enough."""
    return sum(int(x.size) * x.dtype.itemsize for x in jax.tree.leaves(tree))
