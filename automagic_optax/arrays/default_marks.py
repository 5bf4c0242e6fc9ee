"""Which leaves are adapters and which are embeddings where nobody says so: their types and their names tell."""

from __future__ import annotations

from typing import Any

from automagic_core import is_embedding_name, is_lora_name
from automagic_optax.arrays.leaves import Leaf, leaves_of, nnx_class


def default_marks(params: Any, what: str) -> list[bool]:
    """One boolean for each leaf of `params`, in order.

    Only arrays of two axes are marked.  For ``"lora"`` those in an ``nnx.LoRAParam`` and those with a name of
    `automagic_core.LORA_NAMES`; for ``"embedding"`` those called as ``nnx.Embed`` and ``linen.Embed`` call theirs and
    under the usual names of models born in PyTorch.  An adapter of an embedding is no embedding.

    ``nnx.Optimizer`` shows the types to `init` only: a LoRAParam of an unusual name is found there and not in `update`.
    `encourage_low_rank` therefore keeps in its state which arrays it found.

    Args:
        params: tree of arrays, nested or with dotted or slashed names; an ``nnx.State`` with or without its Variables.
        what: ``"lora"`` or ``"embedding"``.

    Raises:
        ValueError: another `what`.
    """
    if what not in ("lora", "embedding"):
        raise ValueError(f"what = {what!r} has no default rule; valid: 'lora', 'embedding'")
    leaves = leaves_of(params)
    if what == "lora":
        found = [_is_lora_param(leaf) or is_lora_name(leaf.names) for leaf in leaves]
    else:
        found = [is_embedding_name(leaf.names) for leaf in leaves]
    return [mark and len(leaf.shape) == 2 for leaf, mark in zip(leaves, found, strict=True)]


def _is_lora_param(leaf: Leaf) -> bool:
    lora_param = nnx_class("LoRAParam")
    return lora_param is not None and issubclass(leaf.variable or object, lora_param)
