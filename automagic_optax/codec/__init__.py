"""8-bit arrays in JAX: how they are written, read and rounded (`docs/algorithm.md`, section 3)."""

from automagic_optax.codec.quantized_array import QuantizedArray

__all__ = ["QuantizedArray"]
