"""Holds the PyTorch and the JAX optimizer against each other: ``python -m parity``."""
