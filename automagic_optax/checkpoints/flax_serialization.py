"""Lets ``flax.serialization`` save and restore 8-bit states, where flax is installed.

flax knows named tuples but not `QuantizedArray`.  Codebook and block size come from the target of the restoration, as
shapes and dtypes do.

flax also wants a named tuple's fields exactly as the target has them.  A `ScaleByCameampState` may have been saved
before or after `finish_warmup`, and by a version that had fewer fields.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from automagic_optax.cameamp.states import DROPPED, ScaleByCameampState
from automagic_optax.checkpoints.earlier import with_search
from automagic_optax.checkpoints.earlier_forms import below, in_form_of, in_saved_form
from automagic_optax.codec.quantized_array import QuantizedArray
from automagic_optax.moments.quantized_moment import QuantizedMoment


def register() -> None:
    """Makes this package's states known to flax; does nothing without flax."""
    try:
        from flax import serialization
    except ImportError:
        return

    def to_state_dict(array: QuantizedArray) -> dict[str, Any]:
        return {name: serialization.to_state_dict(getattr(array, name)) for name in ("codes", "absmax")}

    def from_state_dict(target: QuantizedArray, state: dict[str, Any]) -> QuantizedArray:
        codes = serialization.from_state_dict(target.codes, state["codes"], name="codes")
        return dataclasses.replace(target, codes=codes, absmax=state["absmax"])

    for kind in (QuantizedArray, QuantizedMoment):
        serialization.register_serialization_state(kind, to_state_dict, from_state_dict, override=True)

    # flax looks up all named tuples under one private type, whatever their class.
    named_tuple = getattr(serialization, "_NamedTuple", None)
    pair = getattr(serialization, "_STATE_DICT_REGISTRY", {}).get(named_tuple)
    if pair is None:
        return

    def restore_named_tuple(target: Any, state: Any) -> Any:
        if type(target).__module__.startswith("automagic_optax.") and isinstance(state, dict):
            if isinstance(target, ScaleByCameampState):
                now, state = in_one_form(target, state)
                target = in_saved_form(now, lambda field, path: below(state.get(field), path), lambda x, _: x)
            like = serialization.to_state_dict(target)
            state = boxed_like(like, like | state)  # a field that the file lacks stays as the target has it
        restored = pair[1](target, state)
        if isinstance(target, ScaleByCameampState) and target is not now:
            return in_form_of(restored, now, lambda x, _: x)
        return restored

    serialization.register_serialization_state(named_tuple, pair[0], restore_named_tuple, override=True)


def in_one_form(target: ScaleByCameampState, state: dict[str, Any]) -> tuple[ScaleByCameampState, dict[str, Any]]:
    """Target and saved state in today's form, both without what only the warm-up needs unless both have it.

    Without it in the file the search has ended; without it in the target nothing says what form it has.
    """
    state = with_search(state, jax.tree.map(jnp.zeros_like, target.walk))
    dropped: dict[str, Any] = {
        name: None for name in DROPPED if state.get(name) is None or getattr(target, name) is None
    }
    return target._replace(**dropped), state | dropped


def boxed_like(like: Any, state: Any) -> Any:
    """A saved state with Linen's boxes exactly where the target has them.  Version 0.1.0 had a box around every state.

    Args:
        like: the target as a state dict, in which a box is a dict with the key ``value``.
        state: the saved state dict.
    """
    if _is_box(state) and not (isinstance(like, dict) and "value" in like):
        return boxed_like(like, state["value"])
    if _is_box(like) and not (isinstance(state, dict) and "value" in state):
        return {"value": boxed_like(like["value"], state)}
    if isinstance(like, dict) and isinstance(state, dict):
        return {name: boxed_like(like[name], x) if name in like else x for name, x in state.items()}
    return state


def _is_box(x: Any) -> bool:
    return isinstance(x, dict) and x.keys() == {"value"}
