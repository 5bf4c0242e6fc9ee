"""The monitor, the health check and the memory table read real optax states; the core's tests test their rules."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from automagic_core import Config
from automagic_optax import (
    AdaptiveTrainingMonitor,
    analyze_memory_usage,
    automagic_8bit,
    check_training_health,
    memory_report,
)
from tests.optax_side.small import find_state, grads, params, train

pytestmark = pytest.mark.compiled_quickly
TX = optax.chain(optax.clip(1.0), automagic_8bit(1e-3, max_lr=1e-2, warmup_steps=4))
STEPS = np.arange(60)
NOISE = 1 + 0.02 * np.random.default_rng(0).standard_normal(60)
FALLING, FLAT, RISING = np.exp(-STEPS / 40) * NOISE, NOISE, np.exp(STEPS / 40) * NOISE


@pytest.fixture(scope="module")
def update() -> Any:
    return jax.jit(TX.update, donate_argnums=1)


@pytest.fixture(scope="module")
def opt_state() -> Any:
    return train(TX, 6)[1]


def feed(monitor: AdaptiveTrainingMonitor, losses: Any) -> tuple[bool, str | None]:
    for loss in losses:
        monitor.update(loss)
    return monitor.should_adjust_config()


@pytest.mark.parametrize(
    ("losses", "issue"),
    [
        (jnp.asarray(FALLING), None),
        (jnp.asarray(FLAT), "convergence_stall"),
        (jnp.asarray(RISING), "divergence"),
        (jnp.asarray(RISING, jnp.bfloat16)[:, None], "divergence"),
        (list(FALLING), None),
        ([*jnp.asarray(FALLING), jnp.asarray(jnp.nan)], "divergence"),
    ],
)
def test_verdicts(losses: Any, issue: str | None, opt_state: Any) -> None:
    assert feed(AdaptiveTrainingMonitor(opt_state), losses) == (issue is not None, issue)


def test_skipped_steps_of_a_state_that_is_donated(update: Any) -> None:
    state, weights = TX.init(params()), params()
    monitor = AdaptiveTrainingMonitor(state, window_size=10)
    found = []
    for t in range(20):
        gradient = grads(t)
        if t == 4:
            gradient["table"] = gradient["table"].at[0, 0].set(jnp.nan)
        old = state
        _, state = update(gradient, state, weights)
        assert find_state(old).step.is_deleted(), "the step donates its state"
        monitor.update(jnp.asarray(FALLING[t]), state)
        found.append(monitor.should_adjust_config()[1] == "skipped_steps")
    assert [t for t, skipped in enumerate(found) if skipped] == list(range(4, 14))
    health = check_training_health(state, FALLING)
    assert (health["status"], health["issues"]) == ("warning", ["skipped_steps"])
    assert health["suggestions"][0].startswith("1 of 80 steps of single arrays")


def test_an_nnx_optimizer_is_read_as_it_changes() -> None:
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    monitor = AdaptiveTrainingMonitor(optimizer, window_size=10, config=Config(lr=1e-3, max_lr=1e-2, warmup_steps=4))
    gradient = jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), nnx.state(model, nnx.Param))
    update = nnx.jit(lambda model, optimizer, gradient: optimizer.update(model, gradient))
    for loss in FALLING[:12]:
        monitor.update(loss)
    assert monitor.should_adjust_config() == (False, None)
    update(model, optimizer, gradient)
    monitor.update(FALLING[12])
    assert monitor.should_adjust_config() == (True, "skipped_steps")
    assert check_training_health(optimizer, FALLING)["status"] == "critical"
    assert "still being searched (1e-05 so far)" in monitor.get_adjustment_suggestion("convergence_stall")["text"]
    report = memory_report(optimizer.opt_state)
    assert f"{report['state_bytes']:,}" in analyze_memory_usage(optimizer)


def test_losses_are_checked() -> None:
    monitor = AdaptiveTrainingMonitor(TX.init(params()))
    with pytest.raises(ValueError, match=r"a loss of shape \(3,\) is not one number"):
        monitor.update(jnp.ones(3))
    with pytest.raises(ValueError, match="inside jit has no value yet"):
        jax.jit(lambda loss: monitor.update(loss))(jnp.ones(()))
    with pytest.raises(ValueError, match="found no ScaleByCameampState"):
        AdaptiveTrainingMonitor(optax.adam(1e-3).init(params()))


def test_memory_pressure_is_what_the_reader_says(opt_state: Any) -> None:
    monitor = AdaptiveTrainingMonitor(opt_state, memory_use=lambda: 0.95)
    assert feed(monitor, FALLING) == (True, "memory_pressure")


def test_suggestions_are_about_the_rate_in_use(opt_state: Any) -> None:
    found = 1e-3 * float(jnp.exp(find_state(opt_state).log_rate_scale))
    assert 2e-5 < found < 1e-3, "the search is on its way up from 1e-5"
    suggest = functools.partial(AdaptiveTrainingMonitor.get_adjustment_suggestion, issue="divergence")
    config = Config(lr=1e-3, max_lr=1e-2, warmup_steps=4)
    lower = suggest(AdaptiveTrainingMonitor(opt_state, config=config))
    assert lower["max_lr"] == pytest.approx(found / 3, rel=0.05)  # rounded to two digits
    scheduled = Config(lr=optax.constant_schedule(2e-3), max_lr=1e-2, warmup_steps=4)
    lower = suggest(AdaptiveTrainingMonitor(opt_state, config=scheduled))
    assert set(lower) == {"max_lr", "text"}
    assert lower["max_lr"] == pytest.approx(2 * found / 3, rel=0.05)
    assert set(suggest(AdaptiveTrainingMonitor(opt_state))) == {"text"}


@pytest.mark.parametrize(
    ("losses", "status", "issues"),
    [
        (jnp.asarray(FALLING), "healthy", []),
        (list(jnp.asarray(FLAT)), "warning", ["convergence_stall"]),
        (RISING, "critical", ["divergence"]),
    ],
)
def test_health(losses: Any, status: str, issues: list[str], opt_state: Any) -> None:
    health = check_training_health(opt_state, losses)
    assert (health["status"], health["issues"]) == (status, issues)


def test_memory_table(opt_state: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tx = optax.chain(optax.trace(0.9), automagic_8bit(1e-3, warmup_steps=4, spatial_scope="all"))
    state = tx.init(params())
    table = analyze_memory_usage(state)
    assert capsys.readouterr().out == ""
    assert analyze_memory_usage(state, show=True) + "\n" == capsys.readouterr().out
    rows = {line[:24].strip(): line[24:].split() for line in table.splitlines()}
    assert rows["all states"][0] == f"{sum(x.nbytes for x in jax.tree.leaves(state)):,}"
    # Codes and 16 scales of the kernel, and 53 numbers of the arrays that are too small.
    assert rows["exp_avg"][0] == f"{4096 + 16 * 4 + 53 * 4:,}"
    # The momentum of `trace`, the step of `round_to_parameters`, and of the stages: the energy that each of three
    # removed, and of that of edges 4 ages and the rows of the kernel and of the table.
    assert rows["other transformations"][0] == f"{4 * 4149 + 4 + 3 * 4 + 4 * 4 + (256 + 5) * 4:,}"
    assert table.splitlines()[-1] == "Very good: 98.7% of the parameters have 8-bit states."


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "All states are in 32 bits: optim_bits=32 asks for it, or every array is smaller than min_8bit_size."),
        (Config(optim_bits=32), "All states are in 32 bits: optim_bits=32 asks for it."),
        (Config(), "Warning: only 0.0% of the parameters have 8-bit states."),
    ],
)
def test_memory_table_says_why_there_are_no_8_bits(config: Config | None, said: str) -> None:
    state = automagic_8bit(1e-3, optim_bits=32).init(params())
    assert analyze_memory_usage(state, config=config).splitlines()[-1].startswith(said)
