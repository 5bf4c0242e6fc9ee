"""Optimizer states from Orbax checkpoints, onto any mesh, in the form in which they were saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jax.tree_util import keystr

from automagic_optax.cameamp.find_states import finish_warmup
from automagic_optax.cameamp.states import ScaleByCameampState
from automagic_optax.checkpoints.abstract_state import abstract_state

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
    `finish_warmup` comes back without them.  It may have been saved from other meshes.  States of other
    transformations, those of `quantize_state` too, come back with it or alone.

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
        ValueError: no such directory; `tx` has a state of this optimizer where the checkpoint has none; `finished`
            without such a state.

    Example:
        >>> ocp.StandardCheckpointer().save(path, opt_state)
        >>> opt_state = restore(path, tx, params)
    """
    import orbax.checkpoint as ocp

    if not Path(path).is_absolute() or not Path(path).is_dir():
        raise ValueError(f"{path} is no absolute path of a directory that Orbax wrote")
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(Path(path)).item_metadata
        saved = getattr(metadata, "tree", metadata)
        wanted = _in_saved_form(abstract_state(tx, params, mesh), saved, path)
        state = checkpointer.restore(Path(path), wanted)
    return finish_warmup(state) if finished else state


def _in_saved_form(wanted: Any, saved: Any, path: str | Path) -> Any:
    """The state with every `ScaleByCameampState` as it was saved, with or without the warm-up's states."""

    def in_form(keys: tuple[Any, ...], part: Any) -> Any:
        if not isinstance(part, ScaleByCameampState):
            return part
        fields = _at(saved, keys)
        if not isinstance(fields, Mapping) or not {"lr_scale", "exp_avg", *_WARM_UP} <= set(fields):
            place = keystr(keys) or "its root"
            raise ValueError(
                f"{path} holds no ScaleByCameampState at {place}: save the state of the same transformation by itself"
            )
        # A state whose arrays are all masked has a tree of nothing there, and not nothing.
        missing: dict[str, Any] = {name: None for name in _WARM_UP if fields[name] is None}
        return part._replace(**missing)

    return jax.tree_util.tree_map_with_path(in_form, wanted, is_leaf=lambda x: isinstance(x, ScaleByCameampState))


def _at(saved: Any, keys: tuple[Any, ...]) -> Any:
    """What the metadata has under a path of the state; named tuples are mappings there.  None where it has nothing."""
    for key in keys:
        name = keystr((key,), simple=True)
        if isinstance(saved, Mapping):
            saved = saved.get(name)
        elif isinstance(saved, (list, tuple)) and name.isdigit() and int(name) < len(saved):
            saved = saved[int(name)]
        else:
            return None
    return saved
