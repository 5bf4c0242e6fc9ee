"""The gradient stages, one optax transformation each (`docs/algorithm.md`, section 4)."""
