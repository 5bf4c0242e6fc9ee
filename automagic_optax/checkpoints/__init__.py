"""Saving states and reading them back: Orbax, flax.serialization, and the forms to restore into."""
