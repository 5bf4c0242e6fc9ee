"""What `verbose=True` says from inside jit, and how often."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from automagic_core import Config
from automagic_optax import automagic_8bit
from automagic_optax.cameamp.verbose import start_line, tell_step
from tests.optax_side.small import find_state, params

LOUD, QUIET = Config(verbose=True, profile="balanced"), Config()
SKIPPED = {"kernel": jnp.asarray(2, jnp.int32), "bias": jnp.asarray(1, jnp.int32)}


def run(config: Config, steps: range, transform: Any = jax.jit, **arguments: Any) -> None:
    @transform
    def step(t: jax.Array) -> jax.Array:
        tell_step(config, t, jnp.log(t.astype(jnp.float32)), SKIPPED, **arguments)
        return t + 1

    for t in steps:
        step(jnp.asarray(t, jnp.int32))
    jax.effects_barrier()


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "no jit"])
def test_one_line_at_the_start_and_one_every_hundred_steps(transform: Any, caplog: pytest.LogCaptureFixture) -> None:
    run(LOUD, range(1, 202), transform, rate=jnp.asarray(3e-4), start=lambda: "here we go")
    assert [record.name for record in caplog.records] == ["automagic_optax"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "here we go",
        "step 100: rate 0.0003, 100 times the given one; 3 steps of single arrays skipped",
        "step 200: rate 0.0003, 200 times the given one; 3 steps of single arrays skipped",
    ]


def test_the_end_of_a_search_is_told(caplog: pytest.LogCaptureFixture) -> None:
    config = Config(verbose=True, warmup_steps=30)
    run(config, range(2, 100), rate=jnp.asarray(1e-3), peak_agreement=jnp.asarray(-0.5))
    assert [record.getMessage() for record in caplog.records] == [
        "step 30: the search has ended at the rate 0.001, which is max_lr; with a higher max_lr it may go on"
    ]
    caplog.clear()
    run(Config(verbose=True, warmup_steps=30, search_gain=0), range(2, 100), rate=jnp.asarray(1e-3))
    assert not caplog.records


def test_many_runs_at_once_do_not_speak_at_every_step(caplog: pytest.LogCaptureFixture) -> None:
    run(LOUD, range(2, 101), lambda f: jax.jit(lambda t: jax.vmap(f)(t + jnp.zeros(2, jnp.int32))))
    said = [record.getMessage() for record in caplog.records]
    assert said == ["step 100: 100 times the given one; 3 steps of single arrays skipped"] * 2


def test_nothing_is_compiled_unless_asked(caplog: pytest.LogCaptureFixture) -> None:
    jaxpr = str(jax.make_jaxpr(lambda t: tell_step(QUIET, t, t * 1.0, SKIPPED))(jnp.asarray(1, jnp.int32)))
    assert "callback" not in jaxpr
    assert "cond" not in jaxpr
    run(QUIET, range(1, 102))
    assert not caplog.records
    loud = str(jax.make_jaxpr(lambda t: tell_step(LOUD, t, t * 1.0, SKIPPED))(jnp.asarray(1, jnp.int32)))
    assert "callback" in loud


def test_the_start_line_can_be_made_while_tracing() -> None:
    state = automagic_8bit(1e-3, profile="balanced").init(params())
    lines = []

    @jax.jit
    def step(state: Any) -> jax.Array:
        lines.append(start_line(LOUD, state, 3, 1))
        return find_state(state).step

    step(state)
    assert lines == [start_line(LOUD, state, 3, 1)]
    for words in (
        "profile balanced",
        "on cpu",
        "4,149 parameters, 4,096 of them",
        "found 3 LoRA and 1 embedding",
    ):
        assert words in lines[0]


def test_the_level_of_the_logger_is_obeyed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="automagic_optax")
    run(LOUD, range(99, 101))
    assert not caplog.records
