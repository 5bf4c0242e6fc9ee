"""Finds adapters and embeddings by type and name (`docs/algorithm.md`, section 1.4)."""

from __future__ import annotations

from typing import Any

from automagic_core import is_embedding_name, is_lora_name
from automagic_optax.arrays.containers import known_class
from automagic_optax.arrays.leaves import Leaf, leaves_of


def default_marks(params: Any, what: str) -> list[bool]:
    """One boolean for each leaf of `params`, in order.  Only arrays with two axes are marked.

    An adapter is an ``nnx.LoRAParam`` or has one of the names `automagic_core.LORA_NAMES`.  An embedding has the name
    that ``nnx.Embed``, ``linen.Embed`` or usual PyTorch models give it.  An adapter of an embedding is no embedding.

    ``nnx.Optimizer`` shows the types to `init` only, so a LoRAParam with an unusual name is not found in `update`.
    For this reason `encourage_low_rank` keeps in its state which arrays it found.

    Args:
        params: tree of arrays, nested or with dotted or slashed names; arrays may be in containers.
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
    lora_param = known_class("flax.nnx", "LoRAParam")
    return lora_param is not None and issubclass(leaf.container or object, lora_param)
