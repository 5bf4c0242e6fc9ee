"""The gradient stages: pure functions of float32 arrays and of batches (docs/algorithm.md, sections 2 and 4)."""

from automagic_torch.stages.clip_by_percentile import clip_by_percentile
from automagic_torch.stages.encourage_low_rank import encourage_low_rank
from automagic_torch.stages.suppress_edges import suppress_edges
from automagic_torch.stages.suppress_high_frequencies import suppress_high_frequencies

__all__ = ["clip_by_percentile", "encourage_low_rank", "suppress_edges", "suppress_high_frequencies"]
