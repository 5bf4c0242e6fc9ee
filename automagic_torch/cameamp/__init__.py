"""One call of the optimizer: parameter groups, batches, and the equations (docs/algorithm.md, sections 5 to 8)."""
