"""Checks of saved states, and zeros for distributed checkpoints (docs/algorithm.md, sections 6.3 and 6.4)."""
