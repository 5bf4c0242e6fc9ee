"""The 8-bit moments of other transformations, for `quantize_state` (`docs/algorithm.md`, section 12)."""
