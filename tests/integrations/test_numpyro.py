"""stochastic variational inference with `optax_to_numpyro`; the SVI state saved by pickle"""

from __future__ import annotations

import pickle
from typing import Any

import jax
import pytest

from tests.integrations.jax_runs import OPTIMIZERS, SAVED_AT, STEPS, assert_same_bits, batch, has_codes

numpyro = pytest.importorskip("numpyro")
from numpyro import distributions as dist  # noqa: E402

DISTRIBUTIONS = ("numpyro",)


def regression(x: jax.Array) -> None:
    weight = numpyro.sample("weight", dist.Normal(0, 1).expand([16, 16]).to_event(2))
    numpyro.sample("y", dist.Normal(x @ weight, 0.1).to_event(2), obs=x[:, ::-1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_inference_is_the_undisturbed_one(name: str) -> None:
    def begin() -> Any:
        guide = numpyro.infer.autoguide.AutoNormal(regression)
        optimizer = numpyro.optim.optax_to_numpyro(OPTIMIZERS[name]())
        return numpyro.infer.SVI(regression, guide, optimizer, numpyro.infer.Trace_ELBO())

    svi, saved, losses = begin(), {}, []
    state, update = svi.init(jax.random.key(0), batch(0)), jax.jit(svi.update)
    for number in range(STEPS):
        if number in SAVED_AT:
            # Neither numpyro nor JAX pickles typed keys; SVI's is of the old kind.
            saved[number] = pickle.dumps(jax.device_get(state._replace(rng_key=jax.random.key_data(state.rng_key))))
        state, value = update(state, batch(0))
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert has_codes(state.optim_state)
    for saved_at, file in saved.items():
        other = begin()
        other.init(jax.random.key(1), batch(0))
        resumed = pickle.loads(file)
        resumed = resumed._replace(rng_key=jax.random.wrap_key_data(resumed.rng_key))
        for _ in range(saved_at, STEPS):
            resumed, _ = update(resumed, batch(0))
        assert_same_bits(resumed._replace(rng_key=None), state._replace(rng_key=None))
