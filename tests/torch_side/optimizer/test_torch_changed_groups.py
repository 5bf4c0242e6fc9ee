"""Parameters that leave or change their group, entries beside the parameters', and keys written into groups."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from automagic_torch import AutomagicCameAMP8bit, check_training_health, load_requantized, mark_lora
from tests.torch_side.torch_helpers import SMALL, parameters, run, same, snapshot


def test_what_is_taken_out_is_let_go():
    optimizer = AutomagicCameAMP8bit(parameters([(4, 5)]), **SMALL)
    gone = []
    for step in range(1, 4):
        (p,) = parameters([(6, 7)])
        optimizer.add_param_group({"params": [p]})
        run(optimizer, range(step, step + 1))
        gone += [weakref.ref(p), *map(weakref.ref, optimizer.state[p].values())]
        del optimizer.state[p]
        optimizer.param_groups.pop()
        del p
    run(optimizer, range(4, 5))
    gc.collect()
    assert not any(reference() is not None for reference in gone)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_parameter_in_another_group_goes_on_with_its_moments(compiled, decay):
    fields = SMALL | {"torque_decay": decay, "compiled": compiled}
    first, second = parameters([(8, 6), (8, 6)])
    optimizer = AutomagicCameAMP8bit([first, second], **fields)
    run(optimizer, range(1, 7))  # past the warm-up of four
    before = {key: value.clone() for key, value in optimizer.state[second].items()}
    optimizer.param_groups[0]["params"] = [first]
    optimizer.add_param_group({"params": [second]})
    assert same(dict(optimizer.state[second]), before)
    run(optimizer, range(7, 8))
    searching = optimizer.state[second]
    assert int(searching["age"]) == int(before["age"]) + 1
    assert searching["walk"].abs().sum() > 0  # this group searches anew, from where it is
    assert "walk" not in optimizer.state[first]
    optimizer.param_groups.pop()
    optimizer.param_groups[0]["params"] = [first, second]  # and back into one whose search is over
    run(optimizer, range(8, 9))
    assert optimizer.state[second].keys() == optimizer.state[first].keys()


def test_a_shallow_copy_is_the_same_run():
    one, shared = (AutomagicCameAMP8bit(parameters([(8, 6), (5,)]), **SMALL) for _ in range(2))
    run(one, range(1, 9))
    for step in range(1, 9):
        run(shared, range(step, step + 1))
        shared = copy.copy(shared) if step % 3 else shared
    assert same(snapshot(one), snapshot(shared))
    twin = copy.copy(shared)
    assert twin.param_groups[0] is shared.param_groups[0]
    for optimizer in (shared, twin):  # in turn
        run(optimizer, range(9, 10))
    run(one, range(9, 10))
    run(one, range(9, 10))
    assert same(snapshot(one), snapshot(twin))


def test_an_empty_group_begins_with_its_first_array():
    first, second, third = parameters([(8, 6), (8, 6), (8, 6)])
    optimizer = AutomagicCameAMP8bit([{"params": [first]}, {"params": []}], **SMALL)
    run(optimizer, range(1, 7))
    optimizer.param_groups[1]["lr"] = 0.0  # as a schedule does
    other = AutomagicCameAMP8bit([{"params": [first]}, {"params": []}], **SMALL)
    other.load_state_dict(optimizer.state_dict())
    assert same(other.param_groups[1], optimizer.param_groups[1])
    optimizer.param_groups[1]["lr"] = SMALL["lr"]
    optimizer.param_groups[1]["params"].append(second)
    run(optimizer, range(7, 9))  # in the midst of its search
    assert [group["automagic_step"] for group in optimizer.param_groups] == [8, 2]
    optimizer.add_param_group({"params": [third]})
    run(optimizer, range(9, 10))
    # An array whose search is over goes into a group that searches, and walks from where it is.
    optimizer.param_groups[2]["params"].append(optimizer.param_groups[0]["params"].pop())
    run(optimizer, range(10, 11))
    assert optimizer.state[first].keys() == optimizer.state[third].keys() > {"walk"}
    assert int(optimizer.state[first]["age"]) == 10


@pytest.mark.parametrize("gradient", [True, False])
def test_a_new_group_does_not_count_the_way_of_an_earlier_one(gradient):
    """Without the climb too, which forgets every walk."""
    moved, other = parameters([(8, 6), (8, 6)])
    optimizer = AutomagicCameAMP8bit([moved, other], **SMALL | {"agreement_floor": -1.0, "warmup_steps": 50})
    run(optimizer, range(1, 20))
    travelled = optimizer.state[moved]["walk"].abs().sum()
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": [moved, other]})
    for p in (moved, other):
        p.grad = torch.ones_like(p)
    if not gradient:
        moved.grad = None
    optimizer.step()
    assert optimizer.state[moved]["walk"].abs().sum() < travelled / 5
    assert gradient or not optimizer.state[moved]["walk"].any()


def test_other_states_than_those_of_the_search_do_not_fit_another_group():
    (p,) = parameters([(8, 6)])
    optimizer = AutomagicCameAMP8bit([p], **SMALL)
    run(optimizer, range(1, 7))
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": [p], "factored": "none"})
    with pytest.raises(RuntimeError, match="does not fit its group's fields"):
        run(optimizer, range(7, 8))
    assert "walk" not in optimizer.state[p]


@pytest.mark.parametrize(
    ("fields", "key", "value"),
    [
        ({}, "block_size", 512),
        ({}, "block_size", 64),
        ({}, "block_wise", False),
        ({"block_wise": False}, "block_wise", True),
        ({"optim_bits": 32}, "layout", "flax"),
    ],
)
def test_fields_that_give_states_other_shapes_cannot_change(fields, key, value):
    # Blocks of another size read scales from behind the end of their memory.
    params = parameters([(128, 128), (128, 128)])
    optimizer = AutomagicCameAMP8bit(params, **SMALL | {"force_8bit": True, "block_size": 256} | fields)
    run(optimizer, range(1, 3))
    optimizer.param_groups[0]["automagic_" + key] = value
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"has shape .* fields ask for \("):
        run(optimizer, range(3, 4))
    assert same(before, [p.detach() for p in params])
    assert optimizer.param_groups[0]["automagic_step"] == 2


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("exp_avg", lambda x: x.float()),
        ("exp_avg_absmax", lambda x: x.bfloat16()),
        ("exp_avg_absmax", lambda x: x[:2].clone()),
        ("exp_avg_sq_col", lambda x: x[:, :1].clone()),  # it broadcasts
        ("age", lambda x: x.float()),
    ],
)
def test_a_replaced_state_of_another_form_is_told_before_anything_moves(name, change, compiled):
    params = parameters([(8, 6), (64, 64), (64, 64)])
    optimizer = AutomagicCameAMP8bit(params, **SMALL | {"force_8bit": True, "compiled": compiled})
    run(optimizer, range(1, 4))
    optimizer.state[params[2]][name] = change(optimizer.state[params[2]][name])
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=f"the state '{name}' of parameter 2 .* fields ask for"):
        run(optimizer, range(4, 5))
    assert same(before, [p.detach() for p in params])
    assert optimizer.param_groups[0]["automagic_step"] == 3


@pytest.mark.parametrize("shapes", [((8, 16), (16, 8)), ((64, 64), (64, 1)), ((40, 40), (20, 20)), ((30, 4), (31, 4))])
def test_a_resized_parameter_is_told_of_its_shape(shapes):
    (p,) = parameters([shapes[0]])
    optimizer = AutomagicCameAMP8bit([p], **SMALL)
    run(optimizer, range(1, 3))
    p.grad = None
    p.data = torch.randn(shapes[1])
    with pytest.raises(RuntimeError, match="was resized after its first step"):
        run(optimizer, range(3, 4))


def test_entries_that_are_no_parameter_are_carried():
    optimizer = AutomagicCameAMP8bit(parameters([(8, 6)]), **SMALL | {"verbose": True})
    entries: dict[str, Any] = {"global": {"calls": 3}, "calls": 7, "mean": torch.ones(2)}
    optimizer.state |= entries
    run(optimizer, range(1, 3))
    check_training_health(optimizer, [1.0] * 20)
    for load in (AutomagicCameAMP8bit.load_state_dict, load_requantized):
        other = AutomagicCameAMP8bit(parameters([(8, 6)]), **SMALL)
        load(other, optimizer.state_dict())
        assert same({key: value for key, value in other.state.items() if not isinstance(key, Tensor)}, entries)
    damaged = optimizer.state_dict()
    damaged["state"][5] = {}
    with pytest.raises(ValueError, match="unknown parameters"):
        other.load_state_dict(damaged)


def test_a_rate_of_numpy_is_saved_as_a_number():
    optimizer = AutomagicCameAMP8bit(parameters([(8, 6)]), **SMALL)
    optimizer.param_groups[0]["lr"] = np.float32(1e-3)
    run(optimizer, range(1, 3))
    optimizer.param_groups[0]["automagic_max_lr"] = np.array(1e-2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert [type(optimizer.param_groups[0][key]) for key in ("lr", "automagic_max_lr")] == [float, float]


def test_lists_of_a_distributed_checkpoint_are_the_tuples_that_they_were():
    params = parameters([(8, 6)])
    optimizer = AutomagicCameAMP8bit(params, **SMALL)
    run(optimizer, range(1, 3))
    saved = optimizer.state_dict()
    for key in ("betas", "automagic_betas"):
        saved["param_groups"][0][key] = list(saved["param_groups"][0][key])
    assert not [told for told in load_requantized(AutomagicCameAMP8bit(params, **SMALL), saved) if "betas" in told]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["automagic_betas"] == optimizer.defaults["automagic_betas"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("automagic_maxlr", 1e-2, "did you mean 'automagic_max_lr'"),
        ("automagic_zzzzzzzz", 1e-2, "is no field$"),
        ("maximize", True, "negate the loss"),
    ],
)
def test_keys_that_only_look_like_the_optimizers_are_told(key, value, message):
    optimizer = AutomagicCameAMP8bit(parameters([(8, 6)]), **SMALL)
    optimizer.param_groups[0][key] = value
    with pytest.warns(UserWarning, match=message):
        run(optimizer, range(1, 2))


@pytest.mark.parametrize("key", ["compiled", "state_device"])
def test_arguments_of_the_optimizer_in_a_group_are_told(key):
    with pytest.warns(UserWarning, match="is an argument of the optimizer"):
        AutomagicCameAMP8bit([{"params": parameters([(8, 6)]), key: None}])


def test_nothing_is_made_on_the_default_device():
    (p,) = parameters([(8, 6)])
    optimizer = AutomagicCameAMP8bit([p], **SMALL)
    p.grad = torch.ones_like(p)
    with torch.device("meta"):
        optimizer.step()
        assert optimizer.metrics()["learning_rate"] > 0


def test_metrics_know_an_adapter_that_somebody_put_into_a_group():
    model = torch.nn.Module()
    model.lora_A = torch.nn.Linear(8, 4, bias=False)
    model.lora_B = torch.nn.Linear(4, 8, bias=False)
    mark_lora(model)
    optimizer = AutomagicCameAMP8bit([("lora_A.weight", model.lora_A.weight)], **SMALL)
    optimizer.param_groups[0]["params"].append(model.lora_B.weight)
    run(optimizer, range(1, 3))
    assert any(name.startswith("effective_rank") for name in optimizer.metrics())


@pytest.mark.filterwarnings("error")
def test_a_group_whose_warning_is_an_error_is_not_added():
    (p, q) = parameters([(5,), (5,)])
    optimizer = AutomagicCameAMP8bit([p], lr=1e-4)
    with pytest.raises(UserWarning, match="too short for the rate search"):
        optimizer.add_param_group({"params": [q], "warmup_steps": 5})
    assert len(optimizer.param_groups) == 1
    run(optimizer, range(1, 3))


def test_an_array_that_waits_in_a_new_group_is_saved_and_loaded():
    first, moved = parameters([(8, 8), (8, 8)])
    optimizer = AutomagicCameAMP8bit([first, moved], **SMALL | {"warmup_steps": 3})
    run(optimizer, range(1, 6))
    optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [moved]})
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, range(6, 8))
    assert optimizer.state[moved]["age"] == 7
    assert optimizer.state[moved]["walk"].any()
