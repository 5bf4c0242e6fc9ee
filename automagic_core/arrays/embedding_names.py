"""Which names embeddings go by, in Flax and in models born in PyTorch."""

from __future__ import annotations

import re
from collections.abc import Sequence

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


def is_embedding_name(names: Sequence[str]) -> bool:
    """Whether an array of two axes with these names, from the outermost module to its own, is an embedding by its name.

    An adapter of an embedding is none.
    """
    if _TRAINED_ROWS in names[-2:]:
        return True
    bare = _WRAPPERS.sub("", "." + ".".join(names)).split(".")
    return bare[-1] in _EMBEDDING_ARRAYS or (bare[-1] == "weight" and bare[-2] in _EMBEDDING_MODULES)
