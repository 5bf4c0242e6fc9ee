"""Automagic CameAMP 8-bit for JAX: optax transformations with 8-bit states.  Works without PyTorch."""

from automagic_core import Config, OptimizationProfiles
from automagic_optax._nearest import nearest_code
from automagic_optax.benchmark import benchmark_optimizer
from automagic_optax.cameamp import scale_by_cameamp
from automagic_optax.cameamp_state import ScaleByCameampState
from automagic_optax.checkpoint import restore
from automagic_optax.clip_by_percentile import ClipByPercentileState, clip_by_percentile
from automagic_optax.codec import QuantizedArray, dequantize, quantize
from automagic_optax.encourage_low_rank import EncourageLowRankState, encourage_low_rank
from automagic_optax.find_states import finish_warmup
from automagic_optax.flax_serialization import register as _register_with_flax
from automagic_optax.hardware import get_adaptive_config, get_hardware_optimized_config
from automagic_optax.health import check_training_health
from automagic_optax.marks import found_marks
from automagic_optax.memory_table import analyze_memory_usage
from automagic_optax.metrics import metrics
from automagic_optax.migration import from_adam_state
from automagic_optax.monitor import AdaptiveTrainingMonitor
from automagic_optax.optimizer import automagic_8bit
from automagic_optax.progressive import progressive_quantization
from automagic_optax.quantize_state import QuantizedState, quantize_state
from automagic_optax.quantized_moment import QuantizedMoment
from automagic_optax.random_bits import mix32, random_unit
from automagic_optax.reports import memory_report
from automagic_optax.requantized import requantized
from automagic_optax.round_to_parameters import (
    RoundToParametersState,
    round_stochastically,
    round_to_parameters,
)
from automagic_optax.sharding import abstract_state, state_specs
from automagic_optax.sharding_report import sharding_report
from automagic_optax.state_file import LoadedState, load_state_file, save_state_file
from automagic_optax.stored import RowColumn
from automagic_optax.suppress_edges import SuppressEdgesState, suppress_edges
from automagic_optax.suppress_high_frequencies import SuppressHighFrequenciesState, suppress_high_frequencies
from automagic_optax.tensorboard import MetricsLogger
from automagic_optax.torch_names import peft_name
from automagic_optax.torch_state import from_torch_state, to_torch_state

__all__ = [
    "AdaptiveTrainingMonitor",
    "ClipByPercentileState",
    "Config",
    "EncourageLowRankState",
    "LoadedState",
    "MetricsLogger",
    "OptimizationProfiles",
    "QuantizedArray",
    "QuantizedMoment",
    "QuantizedState",
    "RoundToParametersState",
    "RowColumn",
    "ScaleByCameampState",
    "SuppressEdgesState",
    "SuppressHighFrequenciesState",
    "abstract_state",
    "analyze_memory_usage",
    "automagic_8bit",
    "benchmark_optimizer",
    "check_training_health",
    "clip_by_percentile",
    "dequantize",
    "encourage_low_rank",
    "finish_warmup",
    "found_marks",
    "from_adam_state",
    "from_torch_state",
    "get_adaptive_config",
    "get_hardware_optimized_config",
    "load_state_file",
    "memory_report",
    "metrics",
    "mix32",
    "nearest_code",
    "peft_name",
    "progressive_quantization",
    "quantize",
    "quantize_state",
    "random_unit",
    "requantized",
    "restore",
    "round_stochastically",
    "round_to_parameters",
    "save_state_file",
    "scale_by_cameamp",
    "sharding_report",
    "state_specs",
    "suppress_edges",
    "suppress_high_frequencies",
    "to_torch_state",
]

_register_with_flax()
