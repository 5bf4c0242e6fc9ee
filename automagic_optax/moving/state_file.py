"""Loads and saves the state file of a run, without PyTorch (`docs/algorithm.md`, section 11.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from automagic_core import Config, Layout
from automagic_core.moving.neutral import Axes, NeutralGroup, one_group
from automagic_core.moving.notes import Notes
from automagic_core.moving.state_file import read_groups, write_groups
from automagic_core.moving.torch_dict import plain
from automagic_optax.arrays.leaves import leaves_of
from automagic_optax.arrays.marks import Mark, resolve_mark
from automagic_optax.cameamp.verbose import LOGGER
from automagic_optax.moving.neutral_state import blocks_of, continued, group_of
from automagic_optax.moving.torch_names import Names, given_names, torch_indices


class LoadedState(NamedTuple):
    """The contents of a state file.

    Attributes:
        opt_state: the state of ``automagic_8bit(lr, layout=..., **fields)`` that goes on with the run.
        lr: the learning rate when the file was written, which a scheduler may have set.
        fields: all other hyperparameters.
        told: what was lost, one sentence each; also logged by ``automagic_optax``.
    """

    opt_state: Any
    lr: float
    fields: dict[str, Any]
    told: list[str]


def load_state_file(
    path: str | Path,
    params: Any,
    *,
    group: int | None = None,
    names: Names = None,
    layout: Layout = "flax",
    axes: Axes | None = None,
    lora: Mark = None,
    embedding: Mark = None,
) -> LoadedState:
    """Loads the run in a state file.

    Args:
        path: written by ``python -m automagic_core.convert`` or `save_state_file`.
        params: the parameters.
        group, names, axes: as for `from_torch_state`; a file from PyTorch has PyTorch's names.
        layout: of `params`.  From another layout arrays are transposed, and 8-bit states are rounded again.
        lora, embedding: as for ``automagic_8bit``.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is damaged or does not fit; the message says where.
        ImportError: safetensors is missing; the message says how to get it.

    Example:
        >>> opt_state, lr, fields, told = load_state_file("run.safetensors", params, names=peft_name)
        >>> tx = automagic_8bit(lr, layout="flax", **fields)
    """
    theirs, notes = one_group(read_groups(path), group, str(path)), Notes()
    _compare_marks(theirs, params, names, layout, lora, embedding, notes)
    opt_state = continued(
        theirs, params, names, layout, axes, lora=lora, embedding=embedding, label=str(path), notes=notes
    )
    fields = {name: value for name, value in theirs.fields.items() if name != "lr"}
    return LoadedState(opt_state, theirs.fields["lr"], fields, notes.tell(LOGGER))


def save_state_file(
    path: str | Path,
    opt_state: Any,
    params: Any,
    config: Config | None = None,
    *,
    like: str | Path | None = None,
    group: int | None = None,
    names: Names = None,
    layout: Layout = "flax",
    lora: Mark = None,
    embedding: Mark = None,
) -> None:
    """Writes a run into a state file, with every bit and in its own layout.

    A state does not know its hyperparameters, so they come from `config` or from an earlier file of the run.  What only
    the warm-up needs must be there until `warmup_steps` steps are over, and is left out afterwards.

    Args:
        path: ends in ``.safetensors``; an existing file is replaced as a whole.
        opt_state: holds one state of ``automagic_8bit``.
        params: the parameters.
        config: the hyperparameters.  For a schedule as `lr` its value at the next step is written.
        like: instead of `config`, or with it: a state file whose parameter names, order and other entries are kept.
            PyTorch loads parameters by position, so a run that goes back to PyTorch needs its order.
        group: which of several groups of `like` this is; the others are copied.
        names: the names of the parameters in `like` or, without it, in the new file: a function or a tree of names.
            None keeps dotted paths.
        layout, lora, embedding: as for ``automagic_8bit``.

    Raises:
        ValueError: neither `config` nor `like`; a state that does not fit them, or is of several members
            (``jax.vmap``); the message says where.
        ImportError: safetensors is missing; the message says how to get it.
    """
    groups = read_groups(like) if like is not None else []
    earlier = one_group(groups, group, str(like)) if like is not None else None
    if earlier is None and group is not None:
        raise ValueError(f"group = {group!r} is one of the groups of an earlier file: give like=")
    if config is not None:
        fields: Mapping[str, Any] = {name: plain(value) for name, value in config.__dict__.items()}
    elif earlier is not None:
        fields = earlier.fields
    else:
        raise ValueError("the state does not know its hyperparameters: give config= or like=")
    fields = {**fields, **blocks_of(opt_state)}  # `progressive_quantization` may have been given others
    ours = group_of(opt_state, params, fields, layout, lora=lora, embedding=embedding)
    if callable(fields["lr"]):
        ours = dataclasses.replace(ours, fields={**fields, "lr": float(fields["lr"](ours.step))})
    if earlier is None:
        groups = [_named(ours, params, names)]
    else:
        groups[group or 0] = _as_in(ours, earlier, params, names)
    write_groups(path, groups)


def _compare_marks(
    group: NeutralGroup, params: Any, names: Names, layout: Layout, lora: Mark, embedding: Mark, notes: Notes
) -> None:
    """Raises a ValueError if both sides disagree on an embedding; notes where they disagree on an adapter.

    In Flax's layout the mark of an embedding decides which axis its rows are.  In PyTorch's layout it does not, and a
    checkpoint has no marks, so there `params` may have a mark that the file lacks.
    """
    positions = torch_indices(params, [array.name for array in group.arrays], group.named, names)
    embeddings, adapters = resolve_mark(embedding, params, "embedding"), resolve_mark(lora, params, "lora")
    for position, here_embedding, adapter, leaf in zip(positions, embeddings, adapters, leaves_of(params), strict=True):
        array = group.arrays[position]
        if array.embedding != here_embedding and len(leaf.shape) > 1 and (array.embedding or group.layout == "flax"):
            there, here = ("no", "an") if here_embedding else ("an", "no")
            raise ValueError(
                f"{array.name} is {there} embedding in the file and {here} embedding in params: embedding= says which "
                "of params are"
            )
        if array.lora != adapter and len(leaf.shape) == 2:
            notes.changed(f"{'an' if adapter else 'no'} adapter here, other than in the file", array.name)


def _named(group: NeutralGroup, params: Any, names: Names) -> NeutralGroup:
    """The group with its arrays under the names that the caller gives."""
    if names is None:
        return group
    pairs = zip(group.arrays, given_names(params, names), strict=True)
    arrays = [dataclasses.replace(array, name=str(name)) for array, name in pairs]
    return dataclasses.replace(group, arrays=tuple(arrays))


def _as_in(group: NeutralGroup, earlier: NeutralGroup, params: Any, names: Names) -> NeutralGroup:
    """The group with the names, the order and the other entries of an earlier one."""
    positions = torch_indices(params, [array.name for array in earlier.arrays], earlier.named, names)
    arrays = dict(zip(positions, group.arrays, strict=True))
    ordered = [dataclasses.replace(arrays[k], name=old.name) for k, old in enumerate(earlier.arrays)]
    return dataclasses.replace(group, arrays=tuple(ordered), named=earlier.named, others=earlier.others)
