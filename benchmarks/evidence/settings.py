"""Numbers that all runs share."""

WEIGHT_DECAY = 0.01
"""The same for all whose authors do not advise against it: torch's default for AdamW."""
MAX_LR = 1.0
"""Far above any good rate, so that the search's questions and not the limit stop it."""
WARM_UP_SHARE = 0.4
"""Part of the steps in which this optimizer searches."""
RAMP_SHARE = 0.1
"""Part of the steps in which the rate of those rises that have a ramp and no search."""
