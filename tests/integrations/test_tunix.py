"""`PeftTrainer` over LoRA parameters, with gradient accumulation; its own checkpoint and resume; the rate in its log"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import optax
import pytest
from flax import nnx

from automagic_optax import automagic_8bit
from tests.integrations.jax_runs import FIELDS, assert_same_bits, batch, has_codes, loss

peft_trainer = pytest.importorskip("tunix.sft.peft_trainer")
ocp = pytest.importorskip("orbax.checkpoint")

DISTRIBUTIONS = ("google-tunix",)
STEPS = 6


class Adapted(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = nnx.LoRALinear(16, 32, lora_rank=4, rngs=rngs)
        self.outer = nnx.LoRALinear(32, 16, lora_rank=4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outer(nnx.tanh(self.inner(x)))


def train(folder: Path | None, steps: int, seed: int = 0, accumulate: int | None = None) -> Any:
    # Without the gradient stages: Tunix compiles each run anew, twice.
    tx = optax.inject_hyperparams(automagic_8bit)(1e-3, profile="memory_optimized", **FIELDS)
    every_step = ocp.CheckpointManagerOptions(save_interval_steps=1)
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=1000,
        max_steps=steps,
        gradient_accumulation_steps=accumulate,
        checkpoint_root_directory=folder and str(folder),
        checkpointing_options=every_step,
    )
    model = Adapted(nnx.Rngs(0))
    if seed:  # what is trained must come from the checkpoint; the rest of a model never does
        state = nnx.state(model, nnx.LoRAParam)
        nnx.update(model, jax.tree.map(lambda x: x + seed, state))
    trainer = peft_trainer.PeftTrainer(model, tx, config)
    trainer = trainer.with_loss_fn(lambda model, x: loss(model(x), x))
    trainer = trainer.with_gen_model_input_fn(lambda x: {"x": x})
    rates: list[float] = []
    log = trainer._log_metrics

    def note(*args: Any, **kwargs: Any) -> Any:
        rates.append(trainer._try_get_learning_rate())
        return log(*args, **kwargs)

    trainer._log_metrics = note
    trainer.train([batch(number) for number in range(STEPS * (accumulate or 1))])
    return trainer, rates


@pytest.mark.parametrize(("saved_at", "accumulate"), [(5, None), (2, 2)])
def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path, saved_at: int, accumulate: int | None) -> None:
    undisturbed, _ = train(None, STEPS, accumulate=accumulate)
    assert has_codes(nnx.state(undisturbed.optimizer))
    train(tmp_path, saved_at, accumulate=accumulate)
    resumed, _ = train(tmp_path, STEPS, seed=1, accumulate=accumulate)
    for ours, theirs in ((resumed.model, undisturbed.model), (resumed.optimizer, undisturbed.optimizer)):
        assert_same_bits(nnx.state(ours), nnx.state(theirs))


def test_the_log_shows_the_callers_rate() -> None:
    """`inject_hyperparams` keeps what the caller gave; the rate in force is in `metrics`."""
    _, rates = train(None, 3)
    assert [float(rate) for rate in rates] == pytest.approx([1e-3] * len(rates))
    assert rates
