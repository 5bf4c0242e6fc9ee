"""The hyperparameters: their defaults, valid ranges and profiles, and the fixed numbers beside them (section 7)."""

from automagic_core.config.config import Config

__all__ = ["Config"]
