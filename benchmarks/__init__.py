"""What the optimizer does on a small transformer, and what it costs: run as ``python -m benchmarks.<name>``."""
