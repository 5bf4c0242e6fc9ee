"""One call of the optimizer: parameter groups, batches, and the equations (sections 5 and 6)."""
