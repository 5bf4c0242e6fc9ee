"""Fields, profiles and groups of the optimizer, and where it keeps 8 bits."""

import subprocess
import sys
import warnings

import pytest
import torch

from automagic_core import PROFILES
from automagic_torch import (
    Automagic_CameAMP_Improved_8Bit,
    AutomagicCameAMP8bit,
    create_improved_8bit_optimizer,
)
from tests.torch_side.torch_helpers import SMALL, parameters, run, same, set_gradients, snapshot


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"betas": (0.9, 0.99)}, "betas = .0.9, 0.99."),
        ({"lr": 1.0}, r"lr = 1.0 is outside \[min_lr, max_lr\]"),
        ({"lr": 1e-9}, "lr = 1e-09"),
        ({"lr": lambda step: 1e-4}, "torch.optim.lr_scheduler"),
        ({"profile": "fast"}, "profile = 'fast'"),
        ({"layout": "keras"}, "layout = 'keras'"),
    ],
)
def test_wrong_fields_are_refused_everywhere(fields, message):
    with pytest.raises(ValueError, match=message):
        AutomagicCameAMP8bit(parameters(), **fields)
    with pytest.raises(ValueError, match=message):
        AutomagicCameAMP8bit([{"params": parameters(), **fields}])
    optimizer = AutomagicCameAMP8bit(parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(), **fields})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_trained_parameters_of_other_dtypes_are_refused_by_name(dtype):
    bad = torch.zeros(3, dtype=dtype, requires_grad=True)
    with pytest.raises(ValueError, match=r"parameter 'table' has dtype " + str(dtype)[6:]):
        AutomagicCameAMP8bit([("weight", parameters()[1]), ("table", bad)])
    optimizer = AutomagicCameAMP8bit(parameters())
    with pytest.raises(ValueError, match="parameter 0 of group 1"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1


def test_groups_profiles_and_defaults_in_this_order():
    groups = [{"params": [p]} for p in parameters([(4, 4)] * 4)]
    groups[1] |= {"profile": "memory_optimized"}
    groups[2] |= {"profile": "memory_optimized", "factored": "none", "lr": 1e-4}
    groups[3] |= {"min_8bit_size": 7}
    optimizer = create_improved_8bit_optimizer(groups, "quality_optimized", edge_penalty=0.05, weight_decay=0.25)
    first, second, third, fourth = optimizer.param_groups
    assert (first["automagic_factored"], first["automagic_edge_penalty"], first["weight_decay"]) == ("none", 0.05, 0.25)
    assert {name: second["automagic_" + name] for name in PROFILES["memory_optimized"]} == PROFILES["memory_optimized"]
    assert (second["automagic_edge_penalty"], second["weight_decay"]) == (0.05, 0.25)
    assert (third["automagic_factored"], third["lr"], third["automagic_min_8bit_size"]) == ("none", 1e-4, 1024)
    assert (fourth["automagic_factored"], fourth["automagic_min_8bit_size"]) == ("none", 7)
    assert isinstance(optimizer, Automagic_CameAMP_Improved_8Bit)


def test_every_group_counts_its_own_calls():
    first, second = parameters([(4, 4), (4, 4)])
    optimizer = AutomagicCameAMP8bit([first], **SMALL)
    run(optimizer, range(1, 4))
    optimizer.add_param_group({"params": [second], "warmup_steps": 2})
    run(optimizer, range(4, 6))
    assert [group["automagic_step"] for group in optimizer.param_groups] == [5, 2]
    assert [optimizer.state[p]["age"].item() for p in (first, second)] == [5, 2]
    assert (
        optimizer.param_groups[0]["automagic_log_rate_scale"]
        is not optimizer.param_groups[1]["automagic_log_rate_scale"]
    )


def test_groups_do_not_influence_each_other():
    alone = parameters([(8, 6), (5,)])
    together = parameters([(8, 6), (5,)])
    other = parameters([(6, 6)], seed=3)
    single = AutomagicCameAMP8bit(alone, **SMALL)
    double = AutomagicCameAMP8bit([{"params": together}, {"params": other, "lr": 1e-2}], **SMALL)
    for step in range(1, 7):
        set_gradients(alone, step)
        set_gradients(together, step)
        set_gradients(other, step)
        single.step()
        double.step()
    assert same([p.detach() for p in alone], [p.detach() for p in together])


def test_named_parameters_keep_their_names():
    model = torch.nn.Linear(4, 3)
    optimizer = AutomagicCameAMP8bit(model.named_parameters(), **SMALL)
    run(optimizer, range(1, 3))
    state_dict = optimizer.state_dict()
    assert state_dict["param_groups"][0]["param_names"] == ["weight", "bias"]
    other = AutomagicCameAMP8bit(torch.nn.Linear(4, 3).parameters(), **SMALL)
    other.load_state_dict(state_dict)
    assert other.param_groups[0]["param_names"] == ["weight", "bias"]


def test_names_in_another_order_are_told_and_stay():
    saved = AutomagicCameAMP8bit(torch.nn.Linear(4, 4).named_parameters(), **SMALL).state_dict()
    other = AutomagicCameAMP8bit([*torch.nn.Linear(4, 4).named_parameters()][::-1], **SMALL)
    with pytest.warns(UserWarning, match="saved in another order: .* 'weight' goes to 'bias'"):
        other.load_state_dict(saved)
    assert other.param_groups[0]["param_names"] == ["bias", "weight"]


def test_fields_can_change_between_steps_but_not_what_decides_the_states():
    params = parameters([(8, 6)])
    optimizer = AutomagicCameAMP8bit(params, **SMALL)
    run(optimizer, range(1, 3))
    optimizer.param_groups[0]["weight_decay"] = 0.1
    run(optimizer, range(3, 4))
    optimizer.param_groups[0]["automagic_factored"] = "none"
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="does not fit its group's fields"):
        run(optimizer, range(4, 5))
    assert same(snapshot(optimizer), before)
    optimizer.param_groups[0]["automagic_factored"] = "some"
    with pytest.raises(ValueError, match="factored = 'some'"):
        run(optimizer, range(4, 5))


def test_step_saturates():
    params = parameters([(3, 4)])
    optimizer = AutomagicCameAMP8bit(params, **SMALL)
    run(optimizer, range(1, 6))
    optimizer.param_groups[0]["automagic_step"] = 2**31 - 2
    for counter in ("age", "skipped_steps"):
        optimizer.state[params[0]][counter].fill_(2**31 - 1)
    run(optimizer, range(1, 4))
    assert optimizer.param_groups[0]["automagic_step"] == 2**31 - 1
    assert optimizer.state[params[0]]["age"].item() == 2**31 - 1
    params[0].grad.fill_(torch.nan)
    optimizer.step()
    assert optimizer.state[params[0]]["skipped_steps"].item() == 2**31 - 1


def test_embeddings_stay_in_32_bits_when_asked():
    table, dense = parameters([(64, 8), (64, 8)])
    table._is_embedding = True
    optimizer = AutomagicCameAMP8bit([table, dense], stable_emb=True, **SMALL)
    run(optimizer, range(1, 2))
    assert optimizer.state[table]["exp_avg"].dtype == torch.float32
    assert optimizer.state[dense]["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize("layout", ["torch", "flax"])
def test_rows_follow_the_layout_and_embeddings_have_them_first(layout):
    table, dense = parameters([(6, 4), (6, 4)])
    table._is_embedding = True
    optimizer = AutomagicCameAMP8bit([table, dense], layout=layout, **SMALL)
    run(optimizer, range(1, 2))
    assert optimizer.state[table]["lr_mask"].shape == (6, 1)
    assert optimizer.state[dense]["lr_mask"].shape == ((6, 1) if layout == "torch" else (1, 4))


def test_the_fallback_to_32_bits_is_said_once(monkeypatch):
    fields = SMALL | {"force_8bit": False, "warmup_steps": 20}
    optimizer = AutomagicCameAMP8bit(parameters([(8, 6), (8, 6)]), **fields)
    with pytest.warns(UserWarning, match="force_8bit=True") as told:
        run(optimizer, range(1, 3))
    assert len(told) == 1
    assert optimizer.get_memory_efficiency_report()["8bit_parameters"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(AutomagicCameAMP8bit(parameters([(8, 6)]), **fields | {"optim_bits": 32}), range(1, 2))
        run(AutomagicCameAMP8bit(parameters([(3,)]), **fields), range(1, 2))
    monkeypatch.setattr("automagic_torch.codec.quantized_tensor.BITSANDBYTES_AVAILABLE", False)
    with pytest.warns(UserWarning, match="bitsandbytes is not installed"):
        run(AutomagicCameAMP8bit(parameters([(8, 6)]), **SMALL), range(1, 3))


def test_it_imports_without_bitsandbytes_transformers_and_lightning_and_never_imports_jax_or_peft():
    program = """
import sys
sys.modules["bitsandbytes"] = None
import torch, automagic_torch
assert not automagic_torch.BITSANDBYTES_AVAILABLE
p = torch.nn.Parameter(torch.ones(128, 64))
p.grad = torch.ones_like(p)
optimizer = automagic_torch.AutomagicCameAMP8bit([p], force_8bit=True)
optimizer.step()
assert optimizer.state[p]["exp_avg"].dtype == torch.float32
assert not {"jax", "peft", "transformers"} & sys.modules.keys()
sys.modules["transformers"] = sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None
import automagic_torch.integrations
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("bitsandbytes is not installed") == 1
