"""8-bit tensors in PyTorch: writing, reading and rounding (docs/algorithm.md, sections 3 and 6)."""
