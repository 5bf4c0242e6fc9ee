"""Changes the form of a run, and carries it between frameworks (`docs/algorithm.md`, sections 10 and 11)."""
