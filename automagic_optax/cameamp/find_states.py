"""Finds the states of `scale_by_cameamp`, and of other transformations, in any optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import optax

from automagic_optax.arrays.containers import pure
from automagic_optax.arrays.leaves import leaf_name, leaves_of
from automagic_optax.cameamp.states import DROPPED, ScaleByCameampState

Part = TypeVar("Part")


def finish_warmup(opt_state: Any) -> Any:
    """Drops `s` and `walk`, which only the warm-up needs (`docs/algorithm.md`, section 6.3).

    It saves 4 bytes per row, and one byte per parameter where `torque_decay` > 0.  A run need not call it; the
    structure of the state then stays the same from `init` to the last step.  Call it once after `warmup_steps` steps;
    a jitted step then compiles once more.  Called earlier it ends the search, and the learning rate stays as it was
    found so far.

    A state saved after it loads into a fresh run: as it is from a pickle or with `flax.serialization`, with `restore`
    from Orbax, and with `load_either_form` where a file needs a template of its own form.

    Args:
        opt_state: any state that contains a `ScaleByCameampState`, as in `memory_report`.

    Returns:
        The same state without them.
    """
    find_states(opt_state)
    return map_states(without_warmup, opt_state)


def without_warmup(state: ScaleByCameampState) -> ScaleByCameampState:
    """The state without what only the warm-up needs."""
    gone: dict[str, Any] = dict.fromkeys(DROPPED)
    return state._replace(**gone)


def opt_state_of(optimizer: Any) -> Any:
    """The optimizer state of an ``nnx.Optimizer`` or a ``TrainState``; anything else is returned as it is."""
    return getattr(optimizer, "opt_state", optimizer)


def map_states(function: Callable[[ScaleByCameampState], Any], opt_state: Any) -> Any:
    """The optimizer state with the function's result in place of every `ScaleByCameampState`."""

    def is_state(x: Any) -> bool:
        return isinstance(x, ScaleByCameampState)

    return jax.tree.map(lambda x: function(x) if is_state(x) else x, opt_state, is_leaf=is_state)


def parts_of(opt_state: Any, kind: type[Part]) -> list[Part]:
    """Every state of one class inside an optimizer state, however it is wrapped."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def find_states(opt_state: Any) -> list[ScaleByCameampState]:
    """Every `ScaleByCameampState` inside an optimizer state.

    Raises:
        ValueError: there is none.
    """
    found = parts_of(opt_state, ScaleByCameampState)
    if not found:
        others = {type(x).__name__ for x in jax.tree.leaves(opt_state, is_leaf=_is_named) if _is_named(x)}
        raise ValueError(
            "found no ScaleByCameampState: this is not the state of automagic_8bit or scale_by_cameamp "
            f"(found: {', '.join(sorted(others)) or type(opt_state).__name__}); "
            "memory_report counts any other state if it is given the parameters too"
        )
    return found


def _is_named(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "_fields")


def refuse_several(counter: Any) -> None:
    """Raises a ValueError if a state's counter of steps has axes, so that the state is of several members."""
    if shape := np.shape(pure(counter)):
        raise ValueError(
            f"the state is of several members, as jax.vmap makes them: its counter of steps has shape {shape}; "
            "give one, jax.tree.map(lambda x: x[i], opt_state), and its parameters"
        )


def refuse_masked(params: Any, ages: Sequence[Any], where: str) -> None:
    """Raises a ValueError that names the first parameter whose state a mask took out."""
    for leaf, age in zip(leaves_of(params), ages, strict=True):
        if isinstance(age, optax.MaskedNode):
            raise ValueError(
                f"{where} has no state of {leaf_name(leaf.path)}, which a mask or a partition took out: give that part "
                "alone, its state and its tx, and params with optax.MaskedNode() in place of the others"
            )


def only_state(opt_state: Any, where: str) -> ScaleByCameampState:
    """The one state of this optimizer in an optimizer state."""
    found = find_states(opt_state)
    if len(found) != 1:
        raise ValueError(f"expected one ScaleByCameampState in {where}, found {len(found)}; take partitions one by one")
    return found[0]
