"""Optimizer states from Orbax checkpoints, onto any mesh, in the form in which they were saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from automagic_optax.reports import find_states, finish_warmup
from automagic_optax.sharding import abstract_state

_WARM_UP = ("s", "last_polarity")


def restore(
    path: str | Path,
    tx: optax.GradientTransformation,
    params: Any,
    mesh: Mesh | None = None,
    finished: bool = False,
) -> Any:
    """An optimizer state that Orbax saved, by itself, with ``StandardCheckpointer`` (or its asynchronous form).

    Whether the states of the warm-up are there is read from the checkpoint's metadata: a state that was saved after
    `finish_warmup` comes back without them.  It may have been saved from other meshes.

    Args:
        path: the directory that was given to ``save``; absolute.
        tx: the transformation whose state it is.
        params: tree of arrays or of ``jax.ShapeDtypeStruct``, with the shardings that the parameters have now.
        mesh: as in `abstract_state`.
        finished: drop the states of the warm-up if they were saved.

    Returns:
        The state, in the structure of ``tx.init(params)`` or in that of `finish_warmup`.

    Raises:
        ImportError: Orbax is not installed.
        ValueError: the checkpoint holds no state of this optimizer, or of several some with the warm-up's states.

    Example:
        >>> ocp.StandardCheckpointer().save(path, opt_state)
        >>> opt_state = restore(path, tx, params)
    """
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(Path(path)).item_metadata
        saved = [_has_warm_up(fields) for fields in _states(getattr(metadata, "tree", metadata))]
        if not saved:
            raise ValueError(f"{path} holds no ScaleByCameampState: save the state of automagic_8bit by itself")
        if len(set(saved)) > 1:
            raise ValueError(f"{path} holds states with and without {' and '.join(_WARM_UP)}; valid: all or none")
        wanted = abstract_state(tx, params, mesh)
        keeps_some = any(jax.tree.leaves([state.s, state.last_polarity]) for state in find_states(wanted))
        if keeps_some and not saved[0]:
            wanted = finish_warmup(wanted)
        state = checkpointer.restore(Path(path), wanted)
    return finish_warmup(state) if finished else state


def _states(tree: Any) -> Iterator[Mapping[str, Any]]:
    """The fields of every `ScaleByCameampState` in the metadata, where a named tuple is a mapping."""
    if isinstance(tree, Mapping):
        if {"lr_scale", "exp_avg", *_WARM_UP} <= set(tree):
            yield tree
            return
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _states(part)


def _has_warm_up(fields: Mapping[str, Any]) -> bool:
    return bool(jax.tree.leaves([fields[name] for name in _WARM_UP]))
