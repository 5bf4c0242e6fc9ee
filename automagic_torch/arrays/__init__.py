"""Stacked arrays: what they are marked as, their means and averages, their gradients."""
