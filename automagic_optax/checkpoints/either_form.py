"""`load_either_form`: loads a state without knowing whether it was saved before or after `finish_warmup`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from automagic_optax.arrays.containers import is_nnx
from automagic_optax.cameamp.find_states import map_states, parts_of, without_warmup
from automagic_optax.cameamp.states import DROPPED, ScaleByCameampState

Loaded = TypeVar("Loaded")


def load_either_form(load: Callable[[Any], Loaded], like: Any) -> Loaded:
    """Loads a state that was saved before or after `finish_warmup`, from a file that needs a template of its own form.

    ``eqx.tree_deserialise_leaves`` and Orbax need one.  Pickles and ``flax.serialization`` do not, and `restore` finds
    the form in Orbax's metadata.  The template as it is comes first.  It cannot fit a finished state by chance, since
    it has more arrays.

    Args:
        load: loads into a template, and raises an exception where the template does not fit the file.
        like: the template as a fresh run has it: a tree with states of this optimizer anywhere in it, such as
            (model, opt_state), or an ``nnx.State`` or a dict of an optimizer's state.

    Returns:
        What `load` returns, in the form that was saved.

    Raises:
        ValueError: neither form fits; the exception for the template as it is stands before it.

    Reference: docs/algorithm.md, section 6.3.

    Example:
        >>> model, opt_state = load_either_form(
        ...     lambda like: eqx.tree_deserialise_leaves("run.eqx", like), (model, tx.init(params))
        ... )
    """
    try:
        return load(like)
    except Exception as first:
        finished = _finished(like)
        structure: Any = jax.tree.structure(finished)
        if structure == jax.tree.structure(like):
            raise
        try:
            return load(finished)
        except Exception as second:
            raise ValueError(
                f"the file fits the state neither with nor without what finish_warmup drops; without it: {second}"
            ) from first


def _finished(tree: Any) -> Any:
    """The tree after `finish_warmup`, also where the states are mappings of their fields."""
    if parts_of(tree, ScaleByCameampState):
        return map_states(without_warmup, tree)

    def below(node: Any) -> Any:
        if is_nnx(node, "State"):
            return type(node)(below(node.raw_mapping))
        if type(node) is not dict:
            return node
        gone = DROPPED if {"log_rate_scale", "exp_avg"} <= node.keys() else ()
        return {key: jax.tree.map(below, x, is_leaf=_is_mapping) for key, x in node.items() if key not in gone}

    return jax.tree.map(below, tree, is_leaf=_is_mapping)


def _is_mapping(x: Any) -> bool:
    return type(x) is dict or is_nnx(x, "State")
