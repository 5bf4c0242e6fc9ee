"""Automagic CameAMP 8-bit for JAX: optax transformations with 8-bit states.  Works without PyTorch."""

import sys

from automagic_core import Config, OptimizationProfiles
from automagic_optax.arrays.marks import found_marks
from automagic_optax.cameamp.find_states import finish_warmup
from automagic_optax.cameamp.memory_report import memory_report
from automagic_optax.cameamp.round_to_parameters import (
    RoundToParametersState,
    round_stochastically,
    round_to_parameters,
)
from automagic_optax.cameamp.states import ScaleByCameampState
from automagic_optax.cameamp.transformation import scale_by_cameamp
from automagic_optax.checkpoints.abstract_state import abstract_state, state_specs
from automagic_optax.checkpoints.either_form import load_either_form
from automagic_optax.checkpoints.flax_serialization import register as _register_with_flax
from automagic_optax.checkpoints.restore import restore
from automagic_optax.codec.nearest import nearest_code
from automagic_optax.codec.quantized_array import QuantizedArray, dequantize, quantize
from automagic_optax.codec.random_bits import mix32, random_unit
from automagic_optax.codec.stored import RowColumn
from automagic_optax.moments.quantized_moment import QuantizedMoment
from automagic_optax.moving.migration import from_adam_state
from automagic_optax.moving.progressive import progressive_quantization
from automagic_optax.moving.requantized import requantized
from automagic_optax.moving.state_file import LoadedState, load_state_file, save_state_file
from automagic_optax.moving.torch_names import peft_name
from automagic_optax.moving.torch_state import from_torch_state, to_torch_state
from automagic_optax.optimizer import automagic_8bit
from automagic_optax.quantize_state import QuantizedState, quantize_state
from automagic_optax.stages.clip_by_percentile import ClipByPercentileState, clip_by_percentile
from automagic_optax.stages.encourage_low_rank import EncourageLowRankState, encourage_low_rank
from automagic_optax.stages.suppress_edges import SuppressEdgesState, suppress_edges
from automagic_optax.stages.suppress_high_frequencies import SuppressHighFrequenciesState, suppress_high_frequencies
from automagic_optax.watching.benchmark import benchmark_optimizer
from automagic_optax.watching.hardware import get_adaptive_config, get_hardware_optimized_config
from automagic_optax.watching.health import check_training_health
from automagic_optax.watching.memory_table import analyze_memory_usage
from automagic_optax.watching.metrics import metrics
from automagic_optax.watching.monitor import AdaptiveTrainingMonitor
from automagic_optax.watching.rate import learning_rate
from automagic_optax.watching.sharding_report import sharding_report
from automagic_optax.watching.tensorboard import MetricsLogger

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
    "learning_rate",
    "load_either_form",
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

# Pickles that version 0.1.0 wrote name the modules in which their classes stood then.
for _module, _class in {
    "cameamp_state": ScaleByCameampState,
    "clip_by_percentile": ClipByPercentileState,
    "encourage_low_rank": EncourageLowRankState,
    "quantized_moment": QuantizedMoment,
    "round_to_parameters": RoundToParametersState,
    "state_file": LoadedState,
    "stored": RowColumn,
    "suppress_edges": SuppressEdgesState,
    "suppress_high_frequencies": SuppressHighFrequenciesState,
}.items():
    sys.modules[f"{__name__}.{_module}"] = sys.modules[_class.__module__]
