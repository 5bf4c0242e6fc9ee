"""8-bit tensors in PyTorch: how they are written, read and rounded (sections 3 and 6)."""
