"""Training runs on three real jobs that need no download, and the report on them: ``python -m benchmarks.evidence``.

Everything runs in PyTorch: that JAX computes the same is what the parity suites show.
"""
