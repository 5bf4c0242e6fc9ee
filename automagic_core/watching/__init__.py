"""What people look at, without a framework: memory, metrics, verdicts on a run, plots."""
