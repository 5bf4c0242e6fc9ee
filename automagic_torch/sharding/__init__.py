"""Parameters that are DTensors: every process computes with its piece (docs/algorithm.md, section 9.1).

Only `extent` and `extent_of` are imported where no parameter is a DTensor.
"""
