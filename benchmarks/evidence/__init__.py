"""Training runs on real jobs that need no download, and the report on them: ``python -m benchmarks.evidence``.

All but one job run in PyTorch: that JAX takes the same steps is what the parity suites show.
"""
