"""`restore`: restores optimizer states from Orbax checkpoints onto any mesh."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.tree_util import keystr

from automagic_core.arrays.state_forms import SEARCH_SCALARS
from automagic_optax.cameamp.find_states import finish_warmup, parts_of
from automagic_optax.cameamp.states import WARM_UP_ONLY, ScaleByCameampState
from automagic_optax.checkpoints.abstract_state import abstract_state
from automagic_optax.checkpoints.earlier import with_search
from automagic_optax.checkpoints.earlier_forms import below, former, in_form_of, in_saved_form, replicated


def restore(
    path: str | Path,
    tx: optax.GradientTransformation,
    params: Any,
    mesh: Mesh | None = None,
    finished: bool = False,
) -> Any:
    """Restores an optimizer state that Orbax saved, without anything else, with ``StandardCheckpointer``.

    It may have been saved on another mesh.  A state that was saved after `finish_warmup` comes back without the states
    of the warm-up.  States of other transformations, also of `quantize_state`, are restored with it or alone.

    Args:
        path: the absolute path of the directory that was given to ``save``.
        tx: the transformation whose state it is.
        params: tree of arrays or of ``jax.ShapeDtypeStruct``, with the shardings that the parameters have now.
        mesh: as in `abstract_state`.
        finished: drop the states of the warm-up if they were saved.

    Returns:
        The state, in the structure of ``tx.init(params)``, or of its `finish_warmup`.

    Raises:
        ImportError: Orbax is not installed.
        ValueError: no such directory; `tx` has a state of this optimizer where the checkpoint has none; `finished`
            without such a state.

    Example:
        >>> checkpointer = ocp.StandardCheckpointer()
        >>> checkpointer.save(path, opt_state)
        >>> checkpointer.wait_until_finished()
        >>> opt_state = restore(path, tx, params)
    """
    import orbax.checkpoint as ocp

    if not Path(path).is_absolute() or not Path(path).is_dir():
        raise ValueError(
            f"{path} is no absolute path of a directory that Orbax wrote; Orbax writes in the background: wait for it "
            "with the checkpointer's `wait_until_finished()`"
        )
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(Path(path)).item_metadata
        saved = getattr(metadata, "tree", metadata)
        like = abstract_state(tx, params, mesh)
        wanted = _in_saved_form(like, saved, path)
        state = checkpointer.restore(Path(path), wanted)
        likes = iter(parts_of(like, ScaleByCameampState))
        state = jax.tree.map(lambda x: _as_now(x, next(likes)) if _is_state(x) else x, state, is_leaf=_is_state)
    return finish_warmup(state) if finished else state


_LATER = ("learning_rate", "walk", *SEARCH_SCALARS[1:])
_NOW = {"lr_scale": "log_rate_scale"}
_EARLIER_NAMES = ("step", *_NOW, *(name for name in ScaleByCameampState._fields[2:] if name not in _LATER))
_Earlier: Any = collections.namedtuple("_Earlier", _EARLIER_NAMES)  # type: ignore[misc]
"""The state as version 0.1.0 saved it."""


def _is_state(x: Any) -> bool:
    return isinstance(x, (_Earlier, ScaleByCameampState))


def _as_now(part: Any, like: Any) -> Any:
    """The restored state in today's form; `like` has its shapes and shardings."""
    if not isinstance(part, _Earlier):
        return in_form_of(part._replace(last_polarity=None), like, _placed)
    fields = with_search(part._asdict(), jax.tree.map(lambda x: _filled(x, 0), like.walk))
    # One more array for each scalar: two leaves of a state must not be one buffer, or it could not be donated.
    shared = {name: _filled(getattr(like, name), fields.get(name, 0)) for name in _LATER if name != "walk"}
    return in_form_of(ScaleByCameampState(**fields | shared), like, _placed)


def _placed(values: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    placed: jax.Array = jax.device_put(values, like.sharding)
    return placed


def _filled(like: jax.ShapeDtypeStruct, value: Any) -> jax.Array:
    return jnp.full(like.shape, value, like.dtype, device=like.sharding)


def _in_saved_form(wanted: Any, saved: Any, path: str | Path) -> Any:
    """The state with every `ScaleByCameampState` as it was saved, with or without the warm-up's states."""

    def in_form(keys: tuple[Any, ...], part: Any) -> Any:
        if not isinstance(part, ScaleByCameampState):
            return part
        fields = below(saved, keys)
        names = set(fields) if isinstance(fields, Mapping) else set()
        if not names & {"log_rate_scale", "lr_scale"} or not {"exp_avg", "s", "last_polarity"} <= names:
            place = keystr(keys) or "its root"
            raise ValueError(
                f"{path} holds no ScaleByCameampState at {place}: save the state of the same transformation by itself"
            )
        # If all arrays are masked, these fields are empty trees and not None.
        missing: dict[str, Any] = {name: None for name in WARM_UP_ONLY if fields.get(name) is None}
        part = in_saved_form(part._replace(**missing), lambda field, path: below(fields.get(field), path), replicated)
        part = part._replace(last_polarity=former(part, fields["last_polarity"], replicated))
        if "log_rate_scale" in fields:
            return part
        return _Earlier(*(getattr(part, _NOW.get(name, name)) for name in _EARLIER_NAMES))

    return jax.tree_util.tree_map_with_path(in_form, wanted, is_leaf=lambda x: isinstance(x, ScaleByCameampState))
