"""Which names the low-rank matrices of an adapter go by, in the libraries that make them."""

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
        # LoKr; w1 and w2 are the factors of the Kronecker product that were small enough to stay whole
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    }
)
"""DoRA's `lora_magnitude_vector`, AdaLoRA's `lora_E`, and the cores `hada_t1`, `hada_t2`, `lokr_t2` of a convolution
are parts of an adapter too, but no low-rank matrices."""

LORA_ENDINGS = ("_lora_a", "_lora_b", "_lora_A", "_lora_B")
"""Where an adapter's name is put behind the kernel's: `kernel_lora_a` of Qwix, `q_proj.w_lora_A` elsewhere."""

_DEPTH = 3
"""An adapter's own name may be followed by the name under which it was added and by that of the array:
``lora_A.default.weight``."""


def is_lora_name(names: Sequence[str]) -> bool:
    """Whether an array of these names, from the outermost module to the array's own, is a low-rank matrix by its name.

    Such a name alone is not enough: only an array of two axes is one (section 2 of the page, stage 4).
    """
    return any(name in LORA_NAMES or name.endswith(LORA_ENDINGS) for name in names[-_DEPTH:])
