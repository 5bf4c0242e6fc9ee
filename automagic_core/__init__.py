"""What the PyTorch and the JAX optimizer share.  It needs only numpy."""

from automagic_core.arrays.adapter_names import LORA_NAMES, is_lora_name
from automagic_core.arrays.axes import axes_between
from automagic_core.arrays.decay import Decay, decay
from automagic_core.arrays.embedding_names import is_embedding_name
from automagic_core.arrays.frequencies import last_kept_frequency
from automagic_core.arrays.layout import (
    Layout,
    check_layout,
    column_axes,
    column_shape,
    picture_axes,
    row_axis,
    row_shape,
    spatial_axes,
)
from automagic_core.arrays.state_plan import StatePlan, state_plan
from automagic_core.codec.blocks import absmax_shape
from automagic_core.codec.codebook import codebook_midpoints, dynamic_codebook
from automagic_core.codec.random_bits import Slot, mix32, random_unit, rounding_key, walk_signs
from automagic_core.config.config import FIELD_NAMES, PROFILES, Config, check_field, check_names
from automagic_core.config.constants import MAX_STEP
from automagic_core.config.hardware import adaptive_config, hardware_optimized_config
from automagic_core.config.profiles import OptimizationProfiles
from automagic_core.watching.health import OptimizerFacts, TrainingHealth, training_health
from automagic_core.watching.loss_trend import Trend, loss_trend
from automagic_core.watching.memory import ArrayMemory, memory_report
from automagic_core.watching.memory_table import HeldStates, memory_table
from automagic_core.watching.monitor import TrainingMonitor
from automagic_core.watching.suggestions import ISSUES, RunRates, suggestion

__all__ = [
    "FIELD_NAMES",
    "ISSUES",
    "LORA_NAMES",
    "MAX_STEP",
    "PROFILES",
    "ArrayMemory",
    "Config",
    "Decay",
    "HeldStates",
    "Layout",
    "OptimizationProfiles",
    "OptimizerFacts",
    "RunRates",
    "Slot",
    "StatePlan",
    "TrainingHealth",
    "TrainingMonitor",
    "Trend",
    "absmax_shape",
    "adaptive_config",
    "axes_between",
    "check_field",
    "check_layout",
    "check_names",
    "codebook_midpoints",
    "column_axes",
    "column_shape",
    "decay",
    "dynamic_codebook",
    "hardware_optimized_config",
    "is_embedding_name",
    "is_lora_name",
    "last_kept_frequency",
    "loss_trend",
    "memory_report",
    "memory_table",
    "mix32",
    "picture_axes",
    "random_unit",
    "rounding_key",
    "row_axis",
    "row_shape",
    "spatial_axes",
    "state_plan",
    "suggestion",
    "training_health",
    "walk_signs",
]
