"""`scale_by_cameamp` and its states (`docs/algorithm.md`, sections 5 and 6)."""
