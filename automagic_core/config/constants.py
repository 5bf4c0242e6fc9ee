"""Fixed numbers of the algorithm that nobody can set (docs/algorithm.md, sections 3 to 6)."""

SQUARE_FLOOR = 1e-30
"""Added to g², and the least value of v̂; it keeps the division by √v̂ finite."""
GRADIENT_LIMIT = 1e15
"""An array with a gradient element above this is skipped: its square would leave float32 (section 6.2)."""
TORQUE_SOFTNESS = 0.01
"""s = x / (|x| + 0.01), a sign without a jump (section 5.4)."""
TORQUE_MEAN_FLOOR = 0.05
SEARCH_START = 1e-5
"""The search begins at the lower of this rate and η₀ (section 5.8)."""
CLIMB = 0.4
"""What one step of the climb adds to ℓ at most, or as much as lifts the rate to `SEARCH_START`."""
AGREES = 0.5
"""The climb ends where A is below this share of its peak; from the peak to there its steps fade to 0.  After it the
rate rests where A is below minus this share."""
AGREES_AGAIN = 0.1
"""A climb that noise ended goes on where A is not, and is at least this."""
STEP_BACK = (2 * CLIMB, 2)
"""ℓ loses so much where the climb ends, but at most this much of the peak of A; where the climb goes on it comes back.
A is an average and tells some steps late that the rate is too high.  Where it was always low noise may have ended the
climb."""
LEAST_PEAK = 1e-3
"""The peak of A counts as at least this, so that its minus tells that the climb is over."""
CLIMB_STEPS = 5
"""From this step on the climb may end; the first votes are of few arrays.  The steps before it give the first norm."""
AGREEMENT_DECAY = 0.5
"""Of the average of the pooled votes."""
SHORT_STEP = 4
"""A step with less than a quarter of the mean energy of all steps so far is no evidence for a higher rate."""
LARGEST_GROWTH = 2
"""At this much of the gradients' first norm the rise rests: steps that make gradients grow are long enough.  From one
less on it slows down."""
LEAST_GROWTH = 0.5
"""Where gradients have become shorter than at first, `straightness` counts as so much less, down to this share."""
LARGEST_RISE = 0.5
"""log(ρ / straightness) counts as at most this much in one step of the search."""
RISE_BY_VOTES = (0.75, 0.15)
"""After the climb ℓ rises in one step by at most so much of A above its least value, and by at most so much."""
DOUBT = 2
"""An A below 0 counts so many times where the path is less straight than `straightness`."""
SHORT_SEARCH = 20
"""A warm-up of fewer steps ends before the climb does."""
ROW_SHRINKAGE = 256
"""In n / (n + 256): rows of few columns follow their array (section 5.8)."""
ROW_LIMIT = 1.0986122886681098
"""log 3: a row's rate lies between a third of its array's and three times it."""
SPATIAL_DECAY = 0.99
SPATIAL_FLOOR = 1e-30
SPATIAL_NOISE = 1e-12
"""A mean of `spatial_variance` up to this is rounding, for d is of order 1: κ is then 1."""
SPATIAL_LIMITS = (0.5, 2.0)
BACKGROUND_SLOPE = 4.0
NARROW = 64
"""An array whose shorter side, rows or columns, is at most this is narrow (section 1.2)."""
MIN_ABSMAX = 2.0**-120
"""A block whose largest magnitude is below this counts as a block of zeros: its reciprocal would leave float32."""
NORM_HISTORY = 100
"""How many values of n² the ring of `clip_by_percentile` holds."""
EDGE_DECAY = 0.9
SQUARES_OF_LAPLACIAN = 20
"""The sum of the squared weights of the Laplacian: 4² for the element and 1 for each of four neighbours."""
LOW_RANK_FLOOR = 1e-2
"""δ² relative to the largest eigenvalue (section 4.4)."""
LARGEST_SQUARINGS = 14
"""So often is a matrix squared to find its largest eigenvalue (section 4.4)."""
INVERSE_ROOT_STEPS = (
    (5.621366, -13.946874, 9.779183),
    (2.135141, -1.515973, 0.402441),
    (1.879361, -1.254837, 0.375485),
    (1.875, -1.25, 0.375),
)
"""(a, b, c) of the polynomials a + b M + c M² whose product approaches M^(-1/2) for eigenvalues in [1/101, 1]."""
MAX_STEP = 2**31 - 1
"""Counters stay here instead of wrapping round (section 1.5)."""
