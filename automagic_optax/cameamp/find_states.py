"""Finding the states of `scale_by_cameamp` in any optimizer state, however it is wrapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from automagic_optax.cameamp.states import ScaleByCameampState


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


def only_state(opt_state: Any, where: str) -> ScaleByCameampState:
    """The one state of this optimizer in an optimizer state."""
    found = find_states(opt_state)
    if len(found) != 1:
        raise ValueError(f"{where} has {len(found)} states of this optimizer; carry each partition by itself")
    return found[0]
