"""Which leaves are ``nnx.LoRAParam``, also where ``nnx.Optimizer`` has taken the types away.

Its `init` is shown Variables, its `update` bare arrays, in trees of the same paths and shapes.  Names tell both calls
the same as long as a LoRAParam has a usual name (`automagic_core.LORA_NAMES`).  One that has not can be known in
`update` only from having been seen in `init`, which every ``nnx.Optimizer`` calls when it is made: so such trees, and
no others, are remembered.
"""

from __future__ import annotations

from collections.abc import Sequence

from automagic_core import is_lora_name
from automagic_optax.leaves import Leaf, nnx_class

_Signature = tuple[tuple[tuple, tuple[int, ...]], ...]

_seen: dict[_Signature, list[bool]] = {}
"""Which leaves are LoRAParams, by the paths and shapes of all leaves of the tree."""


def lora_params(leaves: Sequence[Leaf]) -> list[bool]:
    """One boolean for each leaf of a whole tree: it is an ``nnx.LoRAParam``, or the same tree was seen where it was."""
    if _have_types(leaves):
        remember_lora_params(leaves)
        return _by_type(leaves)
    return _seen.get(_signature(leaves), [False] * len(leaves))


def remember_lora_params(leaves: Sequence[Leaf]) -> None:
    """Takes note of a tree that has LoRAParams which their names do not show; of others there is nothing to note."""
    if not _have_types(leaves):
        return
    by_type = _by_type(leaves)
    # What was seen last holds, should two models differ in their types only.
    _seen.pop(_signature(leaves), None)
    if any(one and not is_lora_name(leaf.names) for leaf, one in zip(leaves, by_type, strict=True)):
        _seen[_signature(leaves)] = by_type


def _have_types(leaves: Sequence[Leaf]) -> bool:
    return any(leaf.variable is not None for leaf in leaves)


def _by_type(leaves: Sequence[Leaf]) -> list[bool]:
    lora_param = nnx_class("LoRAParam")
    return [lora_param is not None and issubclass(leaf.variable or object, lora_param) for leaf in leaves]


def _signature(leaves: Sequence[Leaf]) -> _Signature:
    return tuple((leaf.path, leaf.shape) for leaf in leaves)
