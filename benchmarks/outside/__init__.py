"""Jobs that decided nothing about the optimizer, and the page on them: ``python -m benchmarks.outside``.

How a run goes, where it is kept and how a rate is tuned is that of `benchmarks.evidence`.
"""
