"""`scale_by_cameamp` and its states (sections 5 and 6)."""
