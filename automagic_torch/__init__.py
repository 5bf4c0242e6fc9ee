"""Automagic CameAMP 8-bit for PyTorch.  Without bitsandbytes it works with 32-bit states."""

from automagic_core import Config, OptimizationProfiles
from automagic_torch.arrays.marks import found_marks, mark_embeddings, mark_lora
from automagic_torch.codec.quantized_tensor import BITSANDBYTES_AVAILABLE
from automagic_torch.gradient_release import release_gradients
from automagic_torch.moving.migration import load_adam_state
from automagic_torch.moving.progressive import ProgressiveQuantization
from automagic_torch.moving.requantized import load_requantized
from automagic_torch.optimizer import AutomagicCameAMP8bit
from automagic_torch.original_names import Automagic_CameAMP_Improved_8Bit, create_improved_8bit_optimizer
from automagic_torch.stages import (
    clip_by_percentile,
    encourage_low_rank,
    suppress_edges,
    suppress_high_frequencies,
)
from automagic_torch.watching.benchmark import benchmark_optimizer
from automagic_torch.watching.hardware import get_adaptive_config, get_hardware_optimized_config
from automagic_torch.watching.health import check_training_health
from automagic_torch.watching.memory_table import analyze_memory_usage
from automagic_torch.watching.metrics import metrics
from automagic_torch.watching.monitor import AdaptiveTrainingMonitor
from automagic_torch.watching.tensorboard import MetricsLogger

__all__ = [
    "BITSANDBYTES_AVAILABLE",
    "AdaptiveTrainingMonitor",
    "AutomagicCameAMP8bit",
    "Automagic_CameAMP_Improved_8Bit",
    "Config",
    "MetricsLogger",
    "OptimizationProfiles",
    "ProgressiveQuantization",
    "analyze_memory_usage",
    "benchmark_optimizer",
    "check_training_health",
    "clip_by_percentile",
    "create_improved_8bit_optimizer",
    "encourage_low_rank",
    "found_marks",
    "get_adaptive_config",
    "get_hardware_optimized_config",
    "load_adam_state",
    "load_requantized",
    "mark_embeddings",
    "mark_lora",
    "metrics",
    "release_gradients",
    "suppress_edges",
    "suppress_high_frequencies",
]
