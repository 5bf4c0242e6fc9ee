"""What version 0.1.0 saved still loads, and its runs go on as they would have gone on then."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import numpy as np
import optax
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import automagic_optax
from automagic_torch.integrations import OldNamesLoadPlanner
from tests.saved_files.runs import FIELDS, SHAPES, gradients, jax_params, torch_model

pytestmark = pytest.mark.compiled_quickly
FILES = Path(__file__).parent
TRANSFORMATIONS = {
    "whole": automagic_optax.automagic_8bit(1e-3, **FIELDS),
    "moments": automagic_optax.quantize_state(optax.adamw(1e-3), min_8bit_size=256),
}

UPDATES = {run: jax.jit(tx.update) for run, tx in TRANSFORMATIONS.items()}


def expected(run: str) -> dict[str, np.ndarray]:
    """The parameters after the fourth step."""
    with np.load(FILES / "after.npz") as after:
        return {key: after[f"{run}.{key}"] for key in SHAPES}


def assert_goes_on(run: str, w: Any, state: Any) -> None:
    updates, _ = UPDATES[run](gradients(w, 4), state, w)
    for key, value in optax.apply_updates(w, updates).items():
        # Other versions of XLA may round a last bit otherwise.
        np.testing.assert_allclose(value, expected(run)[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("run", TRANSFORMATIONS)
def test_a_pickled_state(run: str) -> None:
    assert_goes_on(run, *pickle.loads((FILES / f"{run}.pickle").read_bytes()))


@pytest.mark.parametrize("run", TRANSFORMATIONS)
def test_a_state_of_flax_serialization(run: str) -> None:
    params = jax_params()
    fresh = (params, TRANSFORMATIONS[run].init(params))
    assert_goes_on(run, *flax.serialization.from_bytes(fresh, (FILES / f"{run}.msgpack").read_bytes()))


def test_a_state_of_orbax() -> None:
    w, pickled = pickle.loads((FILES / "whole.pickle").read_bytes())
    state = automagic_optax.restore(FILES / "whole.orbax", TRANSFORMATIONS["whole"], w)
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(pickled), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert_goes_on("whole", w, state)


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
    with pytest.raises(dcp.api.CheckpointException, match=r"Missing key in checkpoint state_dict: .*\.automagic_"):
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
    params = dict(zip(SHAPES, optimizer.param_groups[0]["params"], strict=True))
    for key, gradient in gradients(jax_params(), 4).items():
        params[key].grad = torch.from_numpy(gradient)
    optimizer.step()
    for key, value in params.items():
        np.testing.assert_allclose(value.detach(), expected("torch")[key], rtol=1e-6, atol=1e-7)
