"""The 8-bit codec without a framework: codebooks, blocks and random bits (docs/algorithm.md, section 3)."""
