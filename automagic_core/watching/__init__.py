"""What people look at: memory, metrics, verdicts on a run, plots (docs/algorithm.md, section 13)."""
