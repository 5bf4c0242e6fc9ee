"""Runs that come from, or go to, another optimizer or precision."""
