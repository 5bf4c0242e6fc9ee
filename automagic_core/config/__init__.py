"""The hyperparameters and the fixed numbers of the algorithm (docs/algorithm.md, section 7)."""

from automagic_core.config.config import Config

__all__ = ["Config"]
