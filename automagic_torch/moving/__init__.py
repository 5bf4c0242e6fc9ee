"""Runs that begin from another optimizer or change the form of their states (docs/algorithm.md, section 10)."""
