"""The import line of the original `Automagic_CameAMP_Improved_8Bit`, with the optimizer of `automagic_torch`.

docs/original.md says what each name of the original is here.
"""

from automagic_torch import (
    BITSANDBYTES_AVAILABLE,
    AdaptiveTrainingMonitor,
    Automagic_CameAMP_Improved_8Bit,
    OptimizationProfiles,
    ProgressiveQuantization,
    analyze_memory_usage,
    benchmark_optimizer,
    check_training_health,
    create_improved_8bit_optimizer,
    get_adaptive_config,
    get_hardware_optimized_config,
)
from automagic_torch import Config as Improved8BitOptimizerConfig

__all__ = [
    "BITSANDBYTES_AVAILABLE",
    "AdaptiveTrainingMonitor",
    "Automagic_CameAMP_Improved_8Bit",
    "Improved8BitOptimizerConfig",
    "OptimizationProfiles",
    "ProgressiveQuantization",
    "analyze_memory_usage",
    "benchmark_optimizer",
    "check_training_health",
    "create_improved_8bit_optimizer",
    "get_adaptive_config",
    "get_hardware_optimized_config",
]
