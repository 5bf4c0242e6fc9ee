"""The optimizers that the benchmarks of speed compare, on a CPU (`make bench`) and on a GPU (`make gpu`)."""

from __future__ import annotations

from typing import Any

STAGES_ON: dict[str, Any] = {"spatial_scope": "all", "lora_rank_penalty": True}
"""Edges and frequencies of every matrix, not of convolutions alone, and the stage of adapters."""
EVERYTHING_ON: dict[str, Any] = {**STAGES_ON, "percentile_clipping": 95}

OURS: dict[str, dict[str, Any]] = {
    "memory_optimized": {"profile": "memory_optimized"},
    "balanced": {"profile": "balanced"},
    "balanced, stages on": {"profile": "balanced", **STAGES_ON},
    "balanced, everything on": {"profile": "balanced", **EVERYTHING_ON},
    "quality_optimized": {"profile": "quality_optimized"},
    "quality_optimized, stages on": {"profile": "quality_optimized", **STAGES_ON},
}
"""Fields by name.  `balanced` has stages for convolutions alone, of which there are none.  Where everything is on, the
search runs too; it has ended for all others."""
SEARCHING = ("balanced, everything on",)
ONLY_CUDA = "runs on CUDA only"
"""Why `FlashAdamW` and flashoptim-jax are not measured on a CPU."""
