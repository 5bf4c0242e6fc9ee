"""What version 0.1.0 saved still loads, and its runs go on as they would have gone on then, but for their rate.

The runs were saved after step 3 of 10 of the warm-up.  Then the rate rose during the whole warm-up, and now a search
has no ramp.  So the fourth step was 0.4 times what it is now.  After it the new search goes on from the rate found.
That version did not shorten a step whose gradient has grown, either.

Narrow arrays had other forms.  A pickle brings its own.  Whatever is loaded into an optimizer of today gets today's
form, and then its step is that of the same states, which `in_todays_form` here brings into it.
"""

from __future__ import annotations

import pickle
from functools import cache
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import automagic_optax
from automagic_core.arrays.group_keys import group_key
from automagic_core.arrays.state_forms import SEARCH_SCALARS
from automagic_optax import RowColumn, quantize
from automagic_torch.integrations import OldNamesLoadPlanner
from tests.saved_files.runs import FIELDS, SHAPES, gradients, jax_params, torch_model

pytestmark = pytest.mark.compiled_quickly
FILES = Path(__file__).parent
TRANSFORMATIONS = {
    "whole": automagic_optax.automagic_8bit(1e-3, **FIELDS),
    "moments": automagic_optax.quantize_state(optax.adamw(1e-3), min_8bit_size=256),
}

STEPS_THEN = {"whole": 0.4, "moments": 1.0}
GROWTH = {"whole": 0.05, "moments": 1e-5}
UPDATES = {run: jax.jit(tx.update) for run, tx in TRANSFORMATIONS.items()}


def expected(run: str) -> dict[str, np.ndarray]:
    """The parameters after the fourth step."""
    with np.load(FILES / "after.npz") as after:
        return {key: after[f"{run}.{key}"] for key in SHAPES}


@cache
def expected_in_todays_form() -> dict[str, np.ndarray]:
    """The same, from the states in today's form, for a step of the length that it had then."""
    w, state = pickle.loads((FILES / "whole.pickle").read_bytes())
    updates, _ = UPDATES["whole"](gradients(w, 4), in_todays_form(state), w)
    return {key: np.asarray(w[key] + STEPS_THEN["whole"] * update) for key, update in updates.items()}


def in_todays_form(state: Any) -> Any:
    """What a fresh state would hold: the kernel is (16, 64), with 64 rows, and the adapter (64, 16), with 16 rows."""

    def one(part: Any) -> Any:
        if not hasattr(part, "background_scale"):
            return part
        squares, residuals = dict(part.exp_avg_sq), dict(part.exp_avg_res)
        root = {
            key: quantize(jnp.sqrt(x), signed=False)
            for key, x in (("row", squares["kernel"].row), ("col", squares["lora_a"].column))
        }
        squares["kernel"] = squares["kernel"]._replace(row=root["row"])
        squares["lora_a"] = squares["lora_a"]._replace(column=root["col"])
        values = {key: np.square(residuals[key].dequantize()) for key in ("kernel", "lora_a")}
        residuals["kernel"] = RowColumn(None, values["kernel"].mean(1, keepdims=True))
        residuals["lora_a"] = RowColumn(values["lora_a"].mean(0, keepdims=True), None)
        gone = {**dict.fromkeys(SHAPES), "bias": part.background_scale["bias"]}
        return part._replace(
            exp_avg_sq=squares,
            exp_avg_res=residuals,
            background_scale=gone,
            spatial_variance=dict.fromkeys(SHAPES),
            last_polarity=None,
        )

    return tuple(map(one, state))


def assert_goes_on(run: str, w: Any, state: Any, wanted: dict[str, np.ndarray] | None = None) -> None:
    updates, _ = UPDATES[run](gradients(w, 4), state, w)
    for key, update in updates.items():
        step = STEPS_THEN[run] * update
        if wanted is None:
            assert_steps_alike(step, expected(run)[key] - w[key], GROWTH[run])
        else:
            # Other versions of XLA may round a last bit otherwise.
            np.testing.assert_allclose(w[key] + step, wanted[key], rtol=1e-6, atol=1e-7)


def assert_steps_alike(step: Any, then: Any, growth: float) -> None:
    """These gradients, normal numbers, have grown by less than `growth`; other versions of XLA round otherwise."""
    np.testing.assert_allclose(step, then, rtol=growth, atol=max(5e-7, 0.2 * growth * abs(then).max()))


@pytest.mark.parametrize("run", TRANSFORMATIONS)
def test_a_pickled_state(run: str) -> None:
    assert_goes_on(run, *pickle.loads((FILES / f"{run}.pickle").read_bytes()))


@pytest.mark.parametrize("run", TRANSFORMATIONS)
def test_a_state_of_flax_serialization(run: str) -> None:
    params = jax_params()
    fresh = (params, TRANSFORMATIONS[run].init(params))
    wanted = expected_in_todays_form() if run == "whole" else None
    assert_goes_on(run, *flax.serialization.from_bytes(fresh, (FILES / f"{run}.msgpack").read_bytes()), wanted)


def test_a_state_of_orbax() -> None:
    w, pickled = pickle.loads((FILES / "whole.pickle").read_bytes())
    state = automagic_optax.restore(FILES / "whole.orbax", TRANSFORMATIONS["whole"], w)
    # A pickle knows neither the walk nor that the climb is over.
    without_walk = (part._replace(walk=None, peak_agreement=0.0) if hasattr(part, "walk") else part for part in state)
    for found, wanted in zip(
        jax.tree.leaves(tuple(without_walk)), jax.tree.leaves(in_todays_form(pickled)), strict=True
    ):
        # XLA forms a mean in another order.
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    # Arrays of Orbax are bound to a device, for which the program would be compiled again.
    free = jax.tree.map(np.asarray, state)
    assert_goes_on("whole", w, free, expected_in_todays_form())


def test_a_search_goes_on() -> None:
    # Whoever loads into a fresh state gets its walk, which begins here.  A pickle brings its own form, which has none.
    # JAX and PyTorch ran the same: they find the same, as far as codes and sums round alike.
    w, pickled = pickle.loads((FILES / "whole.pickle").read_bytes())
    fresh = (w, TRANSFORMATIONS["whole"].init(w))
    _, of_flax = flax.serialization.from_bytes(fresh, (FILES / "whole.msgpack").read_bytes())
    of_orbax = automagic_optax.restore(FILES / "whole.orbax", TRANSFORMATIONS["whole"], w)
    for before, after in zip(jax.tree.leaves(of_flax), jax.tree.leaves(of_orbax), strict=True):
        np.testing.assert_array_equal(before, after)
    searching, resting = searched(w, of_flax), searched(w, pickled)
    assert resting.walk is None
    assert float(resting.log_rate_scale) == float(resting.walk_energy) == 0
    # Its climb counts as over, and goes on where version 0.1.0 had got to, since the same gradients agree.
    assert 0.8 < float(searching.log_rate_scale) <= 0.8 + 6 * 0.4
    assert float(searching.peak_agreement) > 0.5

    model, optimizer = torch_model()
    weights, state = torch.load(FILES / "torch.pt", weights_only=True)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    for again in (optimizer, pickle.loads((FILES / "torch_optimizer.pickle").read_bytes())):
        for _ in range(4, 10):
            torch_step(again, 4)
        (group,) = again.param_groups
        for name in SEARCH_SCALARS:
            ours, theirs = float(getattr(searching, name)), float(group[group_key(name)])
            # A code of a statistic that is its neighbour moves a whole row or column by a per cent or two.
            assert ours == pytest.approx(theirs, rel=1e-3), name
        # A code that is its neighbour changes an element's walk by some per cent of the rate, and a sum has up to 64 of
        # them, in six steps.
        rate = float(searching.learning_rate)
        for key, p in zip(SHAPES, group["params"], strict=True):
            np.testing.assert_allclose(searching.walk[key], again.state[p]["walk"], rtol=0, atol=6 * 0.05 * rate)
            assert float(abs(searching.walk[key]).max()) > rate


def searched(w: Any, state: Any) -> Any:
    """The state after six more steps with one gradient, the last ones but one of the warm-up."""
    for _ in range(4, 10):
        updates, state = UPDATES["whole"](gradients(w, 4), state, w)
        w = optax.apply_updates(w, updates)
    (found,) = (part for part in state if hasattr(part, "log_rate_scale"))
    return found


def test_a_torch_checkpoint() -> None:
    model, optimizer = torch_model()
    weights, state = torch.load(FILES / "torch.pt", weights_only=True)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert_torch_goes_on(optimizer)


@pytest.mark.parametrize("flat", [False, True])
def test_a_directory_of_torch_distributed_checkpoint(flat: bool, tmp_path: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = torch_model()
    weights, state = get_state_dict(model, optimizer, options=options)
    both, path = {"model": weights, "optimizer": state}, FILES / "torch.dcp"
    if flat:  # the file of 0.1.0 in the other form, which is as large again
        path = tmp_path / "flat"
        write_flat(path, torch.load(FILES / "torch.pt", weights_only=True))
    with pytest.raises(dcp.api.CheckpointException, match=r"Missing key in checkpoint state_dict: "):
        dcp.load(both, checkpoint_id=path, no_dist=True)
    dcp.load(both, checkpoint_id=path, planner=OldNamesLoadPlanner(), no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    assert optimizer.param_groups[0]["automagic_step"] == 3
    other = torch_model()[1]
    other.load_state_dict(torch.load(FILES / "torch.pt", weights_only=True)[1])
    assert optimizer.get_learning_rates() == other.get_learning_rates() != torch_model()[1].get_learning_rates()
    assert_torch_goes_on(optimizer)


def write_flat(path: Path, saved: Any) -> None:
    weights, state = saved
    (group,) = state["param_groups"]
    names = group["param_names"]
    flat = {f"state.{names[number]}.{key}": x for number, of in state["state"].items() for key, x in of.items()}
    flat |= {f"param_groups.{name}.{key}": x for name in names for key, x in group.items() if key != "params"}
    dcp.save({"model": weights, "optimizer": flat}, checkpoint_id=path, no_dist=True)


def test_a_pickled_torch_optimizer() -> None:
    assert_torch_goes_on(pickle.loads((FILES / "torch_optimizer.pickle").read_bytes()))


def assert_torch_goes_on(optimizer: torch.optim.Optimizer) -> None:
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    for key, was, is_now in zip(SHAPES, before, torch_step(optimizer, 4), strict=True):
        step = STEPS_THEN["whole"] * (is_now.detach() - was).numpy()
        # The two frameworks' runs had some codes that were neighbours already when they were saved.
        np.testing.assert_allclose(was + step, expected_in_todays_form()[key], rtol=0, atol=2e-5)
        if key == "bias":
            assert_steps_alike(step, expected("torch")[key] - was.numpy(), GROWTH["whole"])


def torch_step(optimizer: torch.optim.Optimizer, number: int) -> list[torch.Tensor]:
    """One step; returns the parameters."""
    params: list[torch.Tensor] = optimizer.param_groups[0]["params"]
    for p, gradient in zip(params, gradients(jax_params(), number).values(), strict=True):
        p.grad = torch.from_numpy(gradient)
    optimizer.step()
    return params
