"""The gradient stages of sections 2 and 4, one module each: pure functions on float32 arrays and batches of them."""

from automagic_torch.stages.edges import suppress_edges
from automagic_torch.stages.frequencies import suppress_high_frequencies
from automagic_torch.stages.low_rank import encourage_low_rank
from automagic_torch.stages.percentile import clip_by_percentile

__all__ = ["clip_by_percentile", "encourage_low_rank", "suppress_edges", "suppress_high_frequencies"]
