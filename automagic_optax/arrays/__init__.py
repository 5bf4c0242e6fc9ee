"""Trees of parameters: which arrays there are, what they are marked as, and which go together."""
