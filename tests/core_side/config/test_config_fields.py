"""Every field of section 7: its default, what it accepts, and an error that names field, value and range."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections import UserList
from typing import Any

import numpy as np
import pytest

from automagic_core import FIELD_NAMES, Config, check_names

DEFAULTS: dict[str, Any] = {
    "lr": 1e-6,
    "min_lr": 1e-7,
    "max_lr": 1e-3,
    "weight_decay": 5e-4,
    "warmup_steps": 500,
    "betas": (0.9, 0.99, 0.999),
    "update_clip": 3.0,
    "confidence_floor": 0.01,
    "factored": "second_moment",
    "torque": True,
    "torque_decay": 0.0,
    "search_gain": 0.5,
    "straightness": 1.2,
    "agreement_floor": -0.1,
    "lr_mask_gain": 0.0,
    "optim_bits": 8,
    "min_8bit_size": 1024,
    "percentile_clipping": 100,
    "block_size": 256,
    "block_wise": True,
    "stable_emb": False,
    "force_8bit": False,
    "stochastic_rounding": True,
    "stochastic_rounding_params": True,
    "spatial_scope": "conv",
    "edge_suppression": True,
    "edge_penalty": 0.1,
    "edge_threshold": 0.6,
    "background_regularization": True,
    "spatial_awareness": True,
    "frequency_penalty": 0.05,
    "lora_rank_penalty": True,
    "rank_penalty_strength": 0.003,
    "low_rank_emphasis": 1.0,
    "profile": None,
    "verbose": False,
}
NAN, INF = math.nan, math.inf

# field: (values that are refused, words that the error must contain as the range)
INVALID: dict[str, tuple[list[Any], str]] = {
    "lr": ([0, -1e-6, NAN, INF, "1e-6", None, True, 1e-3 * 1.001, 0.99e-7], "min_lr, max_lr"),
    "min_lr": ([0, -1e-7, 1e-60, NAN, INF, "x", None, True, 2e-3], "0 < min_lr ≤ max_lr"),
    "max_lr": ([0, -1.0, NAN, INF, None, True, 1e-8], "0 < min_lr ≤ max_lr"),
    "weight_decay": ([-1e-9, NAN, INF, np.float16(INF), "0", None, True], "≥ 0"),
    "warmup_steps": ([-1, 1.5, 500.0, 2**31 - 1, None, True, NAN], "[0, 2147483646]"),
    "betas": (
        [
            (0.9, 0.99),
            (0.9, 0.99, 1.0),
            (-0.1, 0.99, 0.999),
            (0.9, 0.99, NAN),
            0.9,
            None,
            "abc",
            (0.9,) * 4,
        ],
        "each in [0, 1)",
    ),
    "update_clip": ([0, 1e-60, -3.0, NAN, INF, 3.5e38, 10**400, None, True], "> 0"),
    "confidence_floor": ([0.0, 1e-60, -0.01, NAN, INF, None, True], "> 0"),
    "factored": (["both", "", None, True, 0], "none, second_moment, all"),
    "torque": ([0, 1, None, "yes"], "True, False"),
    "torque_decay": ([-0.1, 1.0, NAN, None, True], "[0, 1)"),
    "search_gain": ([-0.1, NAN, INF, None, True], "≥ 0"),
    "straightness": ([0, -1.5, NAN, INF, "1", True], "> 0"),
    "agreement_floor": ([-1.01, 1.01, NAN, -INF, None, True], "[-1, 1]"),
    "lr_mask_gain": ([-0.2, NAN, INF, None, True], "≥ 0"),
    "optim_bits": ([4, 16, 8.0, None, "8", True], "8 or 32"),
    "min_8bit_size": ([0, -1, 4096.0, None, True], "≥ 1"),
    "percentile_clipping": ([0, 101, 5.0, None, True], "[1, 100]"),
    "block_size": ([0, 32, 63, 65, 100, 8192, 256.0, None, True], "a power of two in [64, 4096]"),
    "block_wise": ([0, None, "no"], "True, False"),
    "stable_emb": ([1, None], "True, False"),
    "force_8bit": ([1, None], "True, False"),
    "stochastic_rounding": ([1, None], "True, False"),
    "stochastic_rounding_params": ([1, None], "True, False"),
    "spatial_scope": (["matrix", None, True], "conv, all"),
    "edge_suppression": ([1, None], "True, False"),
    "edge_penalty": ([-1e-3, 0.2001, NAN, None, True], "[0, 0.2]"),
    "edge_threshold": ([-0.1, NAN, INF, None, True], "≥ 0"),
    "background_regularization": ([1, None], "True, False"),
    "spatial_awareness": ([1, None], "True, False"),
    "frequency_penalty": ([-0.01, 1.01, NAN, None, True], "[0, 1]"),
    "lora_rank_penalty": ([1, None], "True, False"),
    "rank_penalty_strength": ([-0.01, 1.0, NAN, None, True], "[0, 1)"),
    "low_rank_emphasis": ([0.99, -1.0, NAN, INF, None, True], "≥ 1"),
    "profile": (["fast", "", 1, True], "memory_optimized, balanced, quality_optimized"),
    "verbose": ([1, None], "True, False"),
}

# field: values at the edges of its range, which are accepted
VALID: dict[str, list[Any]] = {
    "lr": [1e-7, 1e-3, 1e-5, np.float32(1e-5), lambda count: 1.0],
    "min_lr": [1e-6, 1e-12, np.float64(1e-8)],
    "max_lr": [1e-6, 1.0, 10],
    "weight_decay": [0, 0.0, 1.0],
    "warmup_steps": [0, 1, 2**31 - 2, np.int64(7)],
    "betas": [
        (0.0, 0.0, 0.0),
        [0.9, 0.99, 0.999],
        (0.999999, 0.5, 1 - 1e-16),
        UserList([0.9, 0.99, 0.999]),  # no list, as that of OmegaConf
        np.array([0.9, 0.99, 0.999]),
    ],
    "update_clip": [1e-3, 100],
    "confidence_floor": [1e-9, 5],
    "factored": ["none", "second_moment", "all"],
    "torque_decay": [0, 0.999],
    "search_gain": [0, 0.0, 10.0],
    "straightness": [1e-3, 100],
    "agreement_floor": [-1, 0, 1.0],
    "lr_mask_gain": [0, 0.0, 10.0],
    "optim_bits": [8, 32],
    "min_8bit_size": [1, 10**9],
    "percentile_clipping": [1, 100],
    "block_size": [64, 128, 256, 512, 1024, 2048, 4096],
    "spatial_scope": ["conv", "all"],
    "edge_penalty": [0, 0.2, np.float32(0.2), np.float16(0.1)],
    "edge_threshold": [0, 9.0],
    "frequency_penalty": [0, 1],
    "rank_penalty_strength": [0, 0.999],
    "low_rank_emphasis": [1, 7.0],
    "profile": [None, "memory_optimized", "balanced", "quality_optimized"],
}
INVALID_CASES = [(name, value, words) for name, (values, words) in INVALID.items() for value in values]
VALID_CASES = [(name, value) for name, values in VALID.items() for value in values]


def test_defaults_are_the_table_and_every_field_is_tested() -> None:
    config = Config()
    assert config.__dict__ == DEFAULTS
    assert tuple(DEFAULTS) == FIELD_NAMES == tuple(field.name for field in dataclasses.fields(Config))
    assert set(INVALID) == set(DEFAULTS)
    switches = {name for name, value in DEFAULTS.items() if isinstance(value, bool)}
    assert set(VALID) | switches == set(DEFAULTS)


@pytest.mark.parametrize(("name", "value", "words"), INVALID_CASES)
def test_invalid_value_is_refused_by_name_value_and_range(name: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"valid|outside|above") as error:
        Config(**{name: value})
    message = str(error.value)
    # A limit on its own is a fault of both limits or of lr between them: the message shows them all.
    assert name in message
    assert repr(value) in message
    if "lr" in name and isinstance(value, float) and value > 0 and math.isfinite(value):
        assert "min_lr" in message
        assert "max_lr" in message
        assert value > 1e-40 or "in float32" in message
    else:
        assert words in message


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "value"), VALID_CASES)
def test_valid_value_is_kept(name: str, value: Any) -> None:
    assert getattr(Config(**{name: value}), name) == (value if name != "betas" else tuple(value))


@pytest.mark.parametrize("name", [name for name, value in DEFAULTS.items() if isinstance(value, bool)])
@pytest.mark.parametrize("value", [True, False])
def test_switches(name: str, value: bool) -> None:
    assert getattr(Config(**{name: value}), name) is value


def test_limits_and_lr_are_checked_together() -> None:
    Config(lr=0.5, max_lr=1.0)
    Config(lr=1e-9, min_lr=1e-10)
    Config(lr=lambda count: 5.0)  # a schedule's values are clipped step by step, not refused
    with pytest.raises(ValueError, match=r"lr = 0\.01 is outside \[min_lr, max_lr\] = \[1e-07, 0\.001\]"):
        Config(lr=1e-2)
    with pytest.raises(ValueError, match=r"min_lr = 0\.1 is above max_lr = 0\.01"):
        Config(lr=0.05, min_lr=0.1, max_lr=0.01)


def test_unknown_names_are_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ValueError, match=r"warmup_step = 3; did you mean 'warmup_steps'\?") as error:
        Config(warmup_step=3)
    for name in FIELD_NAMES:
        assert name in str(error.value)
    with pytest.raises(ValueError, match="qqq"):
        check_names({"lr": 1, "qqq": None})
    check_names(DEFAULTS)


def test_validate_checks_again_after_changes() -> None:
    config = Config()
    config.block_size = 100
    with pytest.raises(ValueError, match="block_size = 100"):
        config.validate()


def test_positional_arguments_are_refused() -> None:
    parameters = inspect.signature(Config).parameters.values()
    assert all(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def test_values_that_are_not_known_yet_are_not_checked() -> None:
    class Traced:
        dtype, shape = np.dtype(np.float32), ()

        def __bool__(self) -> bool:
            raise AssertionError("a traced value has no truth value")

    traced = Traced()
    assert Config(lr=traced, weight_decay=traced).lr is traced
    with pytest.raises(ValueError, match="warmup_steps"):  # this one decides shapes and must be known
        Config(warmup_steps=traced)
    with pytest.raises(ValueError, match=r"torque_decay = <.*Traced.* \[0, 1\)"):  # and whose constants are in float64
        Config(torque_decay=traced)
    with pytest.raises(ValueError, match=r"betas = \(0.9, <.*Traced.*each in \[0, 1\)"):
        Config(betas=(0.9, traced, 0.999))


def test_numbers_in_arrays_become_python_numbers_but_where_arrays_change() -> None:
    single = lambda x: np.array(x, np.float32)  # noqa: E731
    config = Config(
        search_gain=single(0), betas=(single(0.9), 0.99, single(0.999)), block_size=np.uint8(128), lr=np.array(1e-4)
    )
    assert not config.searches
    assert config.betas == (0.9, 0.99, 0.999)
    config.edge_penalty, config.agreement_floor, config.min_8bit_size = single(0.2), single(-1), np.uint8(64)
    config.validate()
    assert (config.edge_penalty, config.agreement_floor, config.lr) == (0.2, -1.0, 1e-4)
    assert {type(value) for value in config.__dict__.values()} == {float, int, str, bool, tuple, type(None)}
    assert not Config(agreement_floor=single(-1)).climbs
    with pytest.raises(ValueError, match=r"torque_decay = 1\.0 is not valid"):
        Config(torque_decay=single(1))


def test_tensors_and_jax_arrays_with_values_count_as_their_values() -> None:
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    for make in (torch.tensor, jax.numpy.array, np.array, lambda x: np.array(x)[()]):
        whole = Config(warmup_steps=make(20), optim_bits=make(32), torque=make(False), percentile_clipping=make(95))
        found = (whole.warmup_steps, whole.optim_bits, whole.torque, whole.percentile_clipping)
        assert found == (20, 32, False, 95)
        assert [type(value) for value in found] == [int, int, bool, int]
        for fields in ({"warmup_steps": make(20.0)}, {"torque": make(1)}, {"block_size": make(True)}):
            with pytest.raises(ValueError, match="is not valid"):
                Config(**fields)
    for make in (torch.tensor, jax.numpy.float32):
        config = Config(search_gain=make(0.0), agreement_floor=make(-1.0), betas=[make(0.9), 0.99, 0.999])
        assert (config.searches, config.agreement_floor, config.betas) == (False, -1.0, (0.9, 0.99, 0.999))
        lr = make(1e-4)
        assert Config(lr=lr, weight_decay=lr).__dict__ == Config().__dict__ | {"lr": lr, "weight_decay": lr}
    # While a derivative is formed an array has a value, and more than that.
    assert jax.grad(lambda gain: gain * Config(search_gain=gain).searches)(0.0) == 1
    assert jax.grad(lambda rate: Config(max_lr=rate).max_lr)(0.5) == 1
    with pytest.raises(ValueError, match=r"warmup_steps = .*an integer in"):
        jax.jit(lambda steps: Config(warmup_steps=steps).ramp_steps)(20)
    with pytest.raises(ValueError, match=r"betas = \(.*each in \[0, 1\)"):
        jax.jit(lambda beta: Config(betas=(beta, 0.99, 0.999)).ramp_steps)(0.9)


def test_absmax_block_size() -> None:
    assert Config(block_size=512).absmax_block_size == 512
    assert Config(block_size=512, block_wise=False).absmax_block_size is None


def test_a_search_shorter_than_its_climb_is_told() -> None:
    for steps in (1, 19):
        ((_, sentence),) = Config(warmup_steps=steps).advice()
        assert f"warmup_steps = {steps} is too short" in sentence
    for enough in ({"warmup_steps": 20}, {"warmup_steps": 0}, {"search_gain": 0.0}, {"agreement_floor": -1.0}):
        assert not list(Config(**{"warmup_steps": 4} | enough).advice())
