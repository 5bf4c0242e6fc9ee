"""Fixed numbers of sections 4 and 5 that are no hyperparameters."""

SQUARE_FLOOR = 1e-30
"""Added to g² and the least value of v̂: keeps the division by √v̂ finite."""
GRADIENT_LIMIT = 1e15
"""A gradient element above this in magnitude counts as not finite: its square leaves float32 (section 6)."""
TORQUE_SOFTNESS = 0.01
"""a = x / (|x| + 0.01), a sign without a jump."""
TORQUE_MEAN_FLOOR = 0.05
ROW_SHRINKAGE = 256
"""n / (n + 256): rows of few columns follow their array."""
ROW_LIMIT = 1.0986122886681098
"""log 3: a row's rate stays within three times its array's."""
SPATIAL_DECAY = 0.99
SPATIAL_FLOOR = 1e-30
SPATIAL_LIMITS = (0.5, 2.0)
BACKGROUND_SLOPE = 4.0
MIN_ABSMAX = 2.0**-120
"""A block whose largest magnitude is below this counts as a block of zeros: its reciprocal would leave float32."""
NORM_HISTORY = 100
"""How many values of n² the ring of `clip_by_percentile` holds."""
EDGE_DECAY = 0.9
LOW_RANK_FLOOR = 1e-2
"""δ² relative to the largest eigenvalue: a float32 Gram matrix is exact to about 10⁻⁷ of it."""


MAX_STEP = 2**31 - 1
"""Step counters saturate here instead of wrapping round (section 1)."""
