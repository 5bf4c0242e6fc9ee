"""Trees of parameters: their arrays, the marks of arrays, and batches."""
