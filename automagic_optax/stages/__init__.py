"""The gradient stages, one optax transformation each (section 4)."""
