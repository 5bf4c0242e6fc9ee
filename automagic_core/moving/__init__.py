"""A run outside of a framework: the neutral form of its state, and the files that hold it."""
