"""Which leaf of a JAX tree is which parameter of a PyTorch optimizer's state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from automagic_optax.flax_variables import flatten_like
from automagic_optax.leaves import leaf_name


def torch_indices(params: Any, group: Mapping[str, Any], names: Any) -> list[int]:
    """The key in ``state_dict["state"]`` of every leaf of `params`, in order.

    Args:
        params: tree of arrays.
        group: the state dict's parameter group: ``params`` (keys) and, where the optimizer was built from named
            parameters, ``param_names``.
        names: a tree like `params` of PyTorch names or positions; None matches dotted paths with ``param_names``, and
            otherwise takes the leaves of a list or tuple by position.

    Raises:
        ValueError: leaves and parameters do not correspond one to one.
    """
    keys, torch_names = list(group["params"]), group.get("param_names")
    paths = [leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    if names is not None:
        wanted = flatten_like(params, names)
    elif torch_names is not None and set(torch_names) == set(paths):
        wanted = list(paths)
    elif isinstance(params, (list, tuple)):
        wanted = list(range(len(paths)))
    else:
        raise ValueError(
            "cannot tell which leaf is which parameter: give names=, a tree like params of PyTorch names or positions "
            f"(leaves: {', '.join(paths)}; PyTorch: {torch_names if torch_names is not None else len(keys)})"
        )
    positions = [_position(name, torch_names, len(keys), path) for name, path in zip(wanted, paths, strict=True)]
    if sorted(positions) != list(range(len(keys))):
        missing = sorted(set(range(len(keys))) - set(positions))
        raise ValueError(
            f"the tree's {len(paths)} leaves are not the state's {len(keys)} parameters one to one; "
            f"unmatched PyTorch positions: {missing}"
        )
    return [keys[position] for position in positions]


def _position(name: Any, torch_names: Any, count: int, path: str) -> int:
    if isinstance(name, int) and 0 <= name < count:
        return name
    if torch_names is not None and name in torch_names:
        return list(torch_names).index(name)
    known = ", ".join(torch_names) if torch_names is not None else f"positions 0 to {count - 1}"
    raise ValueError(f"{path} is named {name!r}, which the PyTorch state does not have; it has {known}")
