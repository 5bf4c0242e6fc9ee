"""Recognizes embeddings by their names (docs/algorithm.md, section 1.4)."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Only names that always mean (num, features).  A missed embedding can be named with `embedding=`.  An array that is
# wrongly taken for one silently gets the wrong row axis in Flax's layout.
_EMBEDDING_ARRAYS = frozenset(
    {
        "embedding",  # nnx.Embed, linen.Embed
        "input_embedding",  # Gemma
        *("embed", "embed_tokens", "wte", "wpe"),  # trees without modules
    }
)
_EMBEDDING_MODULES = _EMBEDDING_ARRAYS | {
    # Modules of PyTorch models, whose array is called `weight`
    *("tok_embeddings", "embed_in", "embed_positions"),  # Llama, GPT-NeoX, OPT and Whisper; GPT-2 has wte and wpe
    *("word_embeddings", "position_embeddings", "token_type_embeddings"),  # BERT
    *("token_embedding", "position_embedding"),  # CLIP
    "shared",  # T5, BART
}
_WRAPPERS = re.compile(r"\.(modules_to_save\.[^.]+|base_layer|original_module|token_adapter)(?=\.)")
"""Names that PEFT inserts between a module's name and `weight`."""
_TRAINED_ROWS = "trainable_tokens_delta"
"""PEFT's copy of the rows of an embedding that are trained: (tokens, features)."""


def is_embedding_name(names: Sequence[str]) -> bool:
    """Whether these names, from the outermost module to the array itself, are those of an embedding.

    The array must have two axes.  An adapter of an embedding is no embedding.
    """
    if _TRAINED_ROWS in names[-2:]:
        return True
    bare = _WRAPPERS.sub("", "." + ".".join(names)).split(".")
    return bare[-1] in _EMBEDDING_ARRAYS or (bare[-1] == "weight" and bare[-2] in _EMBEDDING_MODULES)
