"""The 8-bit codec without a framework: codebooks, blocks and random bits (section 3)."""
