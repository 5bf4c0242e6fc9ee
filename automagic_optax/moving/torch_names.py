"""Matches JAX leaves with PyTorch parameters by name."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

from automagic_optax.arrays.containers import flatten_like
from automagic_optax.arrays.leaves import leaf_name, leaves_of

Names = Callable[[str], str | int] | Any | None
"""A function from a leaf's dotted path to a PyTorch name or position, a tree of those, or None."""

_TORCH_ARRAYS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_LORA_ARRAYS = {
    "lora_a": "lora_A.{}.weight",
    "lora_b": "lora_B.{}.weight",
    "lora_embedding_a": "lora_embedding_A.{}",
    "lora_embedding_b": "lora_embedding_B.{}",
}


def torch_indices(params: Any, torch_names: Sequence[str], named: bool, names: Names) -> list[int]:
    """The position in PyTorch of every leaf of `params`, in order.

    Args:
        params: tree of arrays.
        torch_names: of all parameters in PyTorch, in its order.
        named: whether these are real names, or only as many strings as there are parameters.
        names: PyTorch names or positions of the leaves.  None matches dotted paths with `torch_names`; if they differ,
            the leaves of a list or tuple are taken by position.

    Raises:
        ValueError: leaves and parameters do not correspond one to one.
    """
    paths = [leaf_name(leaf.path) for leaf in leaves_of(params)]
    if names is not None:
        wanted = given_names(params, names)
    elif named and set(torch_names) == set(paths):
        wanted = list(paths)
    elif isinstance(params, (list, tuple)):
        wanted = list(range(len(paths)))
    else:
        raise ValueError(
            "cannot tell which leaf is which parameter: give names=, a tree like params of PyTorch names or positions, "
            "or a function from a leaf's path to them "
            f"(leaves: {', '.join(paths)}; PyTorch: {', '.join(torch_names) if named else len(torch_names)})"
        )
    by_name = {name: position for position, name in enumerate(torch_names)} if named else {}
    positions = [_position(name, by_name, len(torch_names), path) for name, path in zip(wanted, paths, strict=True)]
    if sorted(positions) != list(range(len(torch_names))):
        missing = sorted(set(range(len(torch_names))) - set(positions))
        raise ValueError(
            f"the tree's {len(paths)} leaves are not the state's {len(torch_names)} parameters one to one; "
            f"unmatched in PyTorch: {', '.join(torch_names[position] for position in missing) or 'none'}"
        )
    return positions


def given_names(params: Any, names: Names) -> list[Any]:
    """What `names`, which is not None, says of every leaf.  Raises a ValueError if a tree is not like `params`."""
    if callable(names):
        return [names(leaf_name(leaf.path)) for leaf in leaves_of(params)]
    try:
        return flatten_like(params, names)
    except ValueError as error:
        raise ValueError(f"names= is no tree like params: {error}") from error


def peft_name(path: str, *, adapter: str = "default", prefix: str = "base_model.model.") -> str:
    """The PEFT name of a leaf of a Flax tree.

    ``h.0.attn.lora_a`` is ``base_model.model.h.0.attn.lora_A.default.weight``.  A `kernel`, a norm's `scale` and an
    `embedding` are a `weight`, and any other name stays.  The module `lora` of ``nnx.LoRALinear`` is left out.

    Args:
        path: dotted, as `from_torch_state` passes it to ``names=``.
        adapter: the name under which the adapter was added.
        prefix: in front of the module's own names.

    Example:
        >>> peft_name("h.0.attn.c_attn.lora_a")
        'base_model.model.h.0.attn.c_attn.lora_A.default.weight'
    """
    *modules, array = path.split(".")
    if array in _LORA_ARRAYS:
        array = _LORA_ARRAYS[array].format(adapter)
        modules = modules[:-1] if modules[-1:] == ["lora"] else modules
    else:
        array = _TORCH_ARRAYS.get(array, array)
    return prefix + ".".join([*modules, array])


def _position(name: Any, by_name: dict[str, int], count: int, path: str) -> int:
    position = -1
    if isinstance(name, str):
        position = by_name.get(name, -1)
    elif not isinstance(name, bool):
        with contextlib.suppress(TypeError):
            position = operator.index(name)  # also numpy's and JAX's integers
    if 0 <= position < count:
        return position
    known = ", ".join(by_name) if by_name else f"positions 0 to {count - 1}"
    raise ValueError(f"{path} is named {name!r}, which the PyTorch state does not have; it has {known}")
