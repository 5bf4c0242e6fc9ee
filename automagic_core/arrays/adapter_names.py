"""Recognizes the low-rank matrices of an adapter by their names (docs/algorithm.md, section 4.4)."""

from __future__ import annotations

from collections.abc import Sequence

LORA_NAMES = frozenset(
    {
        # PEFT, loralib; in small letters flax.nnx and torchtune
        *("lora_A", "lora_B", "lora_a", "lora_b"),
        # PEFT's adapter of an embedding: (rank, num) and (features, rank), two dense kernels in PyTorch's layout
        *("lora_embedding_A", "lora_embedding_B"),
        # kohya's scripts
        *("lora_down", "lora_up"),
        # LoHa
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        # LoKr; lokr_w1 and lokr_w2 are small factors of the Kronecker product that are not decomposed
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    }
)
"""DoRA's `lora_magnitude_vector`, AdaLoRA's `lora_E`, and the cores `hada_t1`, `hada_t2`, `lokr_t2` of a convolution
are also parts of an adapter, but no low-rank matrices."""

LORA_ENDINGS = ("_lora_a", "_lora_b", "_lora_A", "_lora_B")
"""Some libraries append the adapter's name to the kernel's: `kernel_lora_a` of Qwix, `q_proj.w_lora_A` elsewhere."""

_DEPTH = 3
"""Up to two names may follow that of the adapter, as in ``lora_A.default.weight``."""


def is_lora_name(names: Sequence[str]) -> bool:
    """Whether these names, from the outermost module to the array itself, are those of a low-rank matrix.

    The name alone is not enough: only an array with two axes can be an adapter (section 1.4).
    """
    return any(name in LORA_NAMES or name.endswith(LORA_ENDINGS) for name in names[-_DEPTH:])
