"""An independent numpy reading of ALGORITHM.md: the exact 8-bit codec (float32), gradient stages and CameAMP (float64).

It shares no code with the packages under test, so a slip in one reading shows as a difference.
"""
