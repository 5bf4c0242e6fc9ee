"""Which leaves are adapters and which are embeddings where nobody says so: their types and their names tell."""

from __future__ import annotations

import re
from typing import Any

from automagic_core import is_lora_name
from automagic_optax.leaves import Leaf, leaves_of, nnx_class

# Few names, and of those only such as mean (num, features) wherever they are usual: an embedding that is missed can be
# named with `embedding=`, one that is none gets its rows on the wrong axis in Flax's layout and nobody is told.
_EMBEDDING_ARRAYS = frozenset(
    {
        "embedding",  # nnx.Embed, linen.Embed
        "input_embedding",  # Gemma
        *("embed", "embed_tokens", "wte", "wpe"),  # trees without modules
    }
)
_EMBEDDING_MODULES = _EMBEDDING_ARRAYS | {
    # Modules born in PyTorch, whose array is called `weight`
    *("tok_embeddings", "embed_in", "embed_positions"),  # Llama, GPT-NeoX, OPT and Whisper; GPT-2 has wte and wpe
    *("word_embeddings", "position_embeddings", "token_type_embeddings"),  # BERT
    *("token_embedding", "position_embedding"),  # CLIP
    "shared",  # T5, BART
}
_WRAPPERS = re.compile(r"\.(modules_to_save\.[^.]+|base_layer|original_module|token_adapter)(?=\.)")
"""What PEFT puts between a module's name and `weight`."""
_TRAINED_ROWS = "trainable_tokens_delta"
"""PEFT's copy of the rows of an embedding that are trained: (tokens, features)."""


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
        found = [_is_embedding_name(leaf.names) for leaf in leaves]
    return [mark and len(leaf.shape) == 2 for leaf, mark in zip(leaves, found, strict=True)]


def _is_lora_param(leaf: Leaf) -> bool:
    lora_param = nnx_class("LoRAParam")
    return lora_param is not None and issubclass(leaf.variable or object, lora_param)


def _is_embedding_name(names: list[str]) -> bool:
    if _TRAINED_ROWS in names[-2:]:
        return True
    bare = _WRAPPERS.sub("", "." + ".".join(names)).split(".")
    return bare[-1] in _EMBEDDING_ARRAYS or (bare[-1] == "weight" and bare[-2] in _EMBEDDING_MODULES)
