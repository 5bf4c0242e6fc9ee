"""Carries an optimizer state from PyTorch to JAX and back (`docs/algorithm.md`, sections 11.1 and 11.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from automagic_core import Layout
from automagic_core.arrays.axes import check_axes, inverse_axes
from automagic_core.arrays.group_keys import EFFECTIVE_LR, STEP, group_key, with_own_keys
from automagic_core.arrays.state_forms import SEARCH_SCALARS
from automagic_core.moving.neutral import Axes, check_group, in_layout, one_group
from automagic_core.moving.notes import Notes
from automagic_core.moving.torch_dict import neutral_groups
from automagic_optax.arrays.leaves import leaf_name, leaves_of
from automagic_optax.arrays.marks import Mark
from automagic_optax.cameamp.verbose import LOGGER
from automagic_optax.moving.neutral_state import RINGS, continued, group_of
from automagic_optax.moving.torch_names import Names, torch_indices


def from_torch_state(
    state_dict: Mapping[str, Any],
    params: Any,
    *,
    group: int | None = None,
    names: Names = None,
    layout: Layout | None = None,
    axes: Axes | None = None,
    lora: Mark = None,
    embedding: Mark = None,
    told: list[str] | None = None,
) -> Any:
    """The state of ``automagic_8bit`` that continues a PyTorch run.

    In the same layout every bit of every state is kept.  With another `layout` dense and convolution kernels are
    transposed; embeddings and arrays with fewer than two axes stay.  All states move exactly, except that 8-bit states
    are rounded again, with the random bits of the run's last step.

    Args:
        state_dict: ``optimizer.state_dict()`` of an `AutomagicCameAMP8bit`.
        params: the parameters in JAX, of one parameter group.
        group: which parameter group, where there are several; `names` and positions are those inside it.  In JAX each
            group is a transformation of its own; ``optax.partition`` puts them together.
        names: a tree like `params` of PyTorch names or positions, or a function from a leaf's dotted path to them, such
            as `peft_name`.  Without it dotted paths are matched with the names of an optimizer that was built from
            named parameters, and a list of arrays is taken by position.
        layout: of `params`; None for the layout of the state dict.
        axes: for leaves that are no dense or convolution kernels, by dotted path: axis k of the leaf is axis
            ``axes[path][k]`` of the PyTorch array.
        lora, embedding: as for ``automagic_8bit``.
        told: a list to which is added what was lost, one sentence each, such as the relative error of every state that
            was rounded again.  It is also logged by ``automagic_optax``.

    Returns:
        The state of ``automagic_8bit(lr, layout=..., **fields)`` with the run's own hyperparameters.

    Raises:
        ValueError: the state does not fit; the message names the parameter, the state and what differs.

    Example:
        >>> opt_state = from_torch_state(torch.load("optimizer.pt"), params, names=peft_name, layout="flax")
    """
    theirs, notes = one_group(neutral_groups(state_dict), group, "the state dict"), Notes()
    opt_state = continued(
        theirs,
        params,
        names,
        theirs.layout if layout is None else layout,
        axes,
        lora=lora,
        embedding=embedding,
        label="the state dict",
        notes=notes,
    )
    _tell(notes, told)
    return opt_state


def to_torch_state(
    opt_state: Any,
    params: Any,
    like: Mapping[str, Any],
    *,
    group: int | None = None,
    names: Names = None,
    layout: Layout | None = None,
    axes: Axes | None = None,
    embedding: Mark = None,
    told: list[str] | None = None,
) -> dict[str, Any]:
    """A state dict for an `AutomagicCameAMP8bit` that continues a JAX run.  Needs PyTorch.

    Args:
        opt_state: state of ``automagic_8bit``.
        params: the parameters in JAX.
        like: ``optimizer.state_dict()`` of the PyTorch optimizer that is to go on.  Its group keeps its hyperparameters
            and layout, and takes over step, search and the ring of stage 1.
        group: which of several parameter groups.  The others stay as they are in `like`, so the result for one group is
            `like` for the next.
        layout: of `params`; None for the layout of the PyTorch optimizer.
        names, axes, embedding, told: as for `from_torch_state`; `axes` also go from PyTorch to JAX.

    Returns:
        A state dict for ``optimizer.load_state_dict``, which checks it before it takes anything over.

    Raises:
        ValueError: leaves and parameters do not correspond, there is not exactly one state of this optimizer, it is
            of several members (``jax.vmap``), or it does not fit the hyperparameters; the message says what.
    """
    import torch

    theirs, notes = one_group(neutral_groups(like), group, "the state dict"), Notes()
    ours = group_of(
        opt_state, params, theirs.fields, theirs.layout if layout is None else layout, lora=None, embedding=embedding
    )
    positions = torch_indices(params, [array.name for array in theirs.arrays], theirs.named, names)
    if ours.layout != theirs.layout or axes:
        check_group(ours, "the JAX state")
        ours, _ = in_layout(ours, theirs.layout, _back(axes, params), notes)
    _tell(notes, told)
    # `torch.tensor` copies: torch must not share memory with an immutable JAX array.
    groups = list(like["param_groups"])
    new = groups[group or 0] = with_own_keys(groups[group or 0])
    new[STEP] = ours.step
    new.pop(EFFECTIVE_LR, None)
    for name in (*SEARCH_SCALARS, *RINGS):
        if name in ours.shared:
            new[group_key(name)] = torch.tensor(ours.shared[name])
    states = {key: state for key, state in like["state"].items() if key not in new["params"]}
    for position, array in zip(positions, ours.arrays, strict=True):
        states[new["params"][position]] = {name: torch.tensor(value) for name, value in array.states.items()}
    return {"state": states, "param_groups": groups}


def _back(axes: Axes | None, params: Any) -> Axes:
    """The permutations from the leaves to PyTorch's arrays."""
    ndims = {leaf_name(leaf.path): len(leaf.shape) for leaf in leaves_of(params)}
    return {
        name: inverse_axes(check_axes(order, ndims[name], name)) if name in ndims else order
        for name, order in (axes or {}).items()
    }


def _tell(notes: Notes, told: list[str] | None) -> None:
    """Logs the notes, and adds them to the caller's list."""
    sentences = notes.tell(LOGGER)
    if told is not None:
        told += sentences
