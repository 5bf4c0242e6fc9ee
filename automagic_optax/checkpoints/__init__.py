"""Saves and restores optimizer states, with Orbax or flax.serialization."""
