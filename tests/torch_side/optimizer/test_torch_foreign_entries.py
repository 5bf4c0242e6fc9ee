"""Keys of others in groups and in states: carried along, saved, restored, and never read."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from automagic_core.moving.state_file import read_groups, write_groups
from automagic_core.moving.torch_dict import neutral_groups, state_dict_of
from automagic_torch import AutomagicCameAMP8bit, ProgressiveQuantization, load_requantized
from tests.torch_side.torch_helpers import same

FIELDS: dict[str, Any] = {"lr": 1e-3, "max_lr": 0.1, "warmup_steps": 6, "force_8bit": True, "min_8bit_size": 16}
FOREIGN: dict[str, Any] = {
    **{"lr_scale": 0.75, "group_name": "layer_0", "lr_mult": 2.0, "step": 7, "swa_lr": 0.1, "initial_lr": 0.5},
    **{"max_momentum": 0.95, "layers": ["a", "b"], "norm_history": None, "verbose_name": {"nested": [1, 2]}},
}
LATER: dict[str, Any] = {"max_lr": 5.0, "min_lr": 4.0, "layout": "??", "profile": "fast", "warmup_steps": -1}


def run(steps: int = 8, given: dict[str, Any] | None = None, later: dict[str, Any] | None = None, slow: bool = False):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))]
    optimizer = AutomagicCameAMP8bit([{"params": params, **(given or {})}], **FIELDS)
    optimizer.param_groups[0].update(later or {})
    if slow:  # what timm's Lookahead does, before and after the first step
        optimizer.state[params[0]]["lookahead_slow_buff"] = params[0].detach().clone()
    train(optimizer, range(steps))
    if slow:
        optimizer.state[params[1]]["lookahead_slow_buff"] = params[1].detach().clone()
    return optimizer


def train(optimizer: AutomagicCameAMP8bit, steps: range) -> list[torch.Tensor]:
    params = optimizer.param_groups[0]["params"]
    for step in steps:
        for index, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + index))
        optimizer.step()
    return [p.detach() for p in params]


def test_foreign_keys_change_no_bit_of_training() -> None:
    plain, with_keys = run(), run(given=FOREIGN, later=LATER)
    assert same([p.detach() for p in plain.param_groups[0]["params"]], with_keys.param_groups[0]["params"])
    group = with_keys.param_groups[0]
    assert {name: group[name] for name in (*FOREIGN, *LATER)} == FOREIGN | LATER


@pytest.mark.parametrize("slow", [False, True])
def test_foreign_entries_are_saved_and_restored(slow: bool) -> None:
    whole, first = run(8, FOREIGN, LATER, slow), run(4, FOREIGN, LATER, slow)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = AutomagicCameAMP8bit([nn.Parameter(p.detach().clone()) for p in first.param_groups[0]["params"]], **FIELDS)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    again = pickle.loads(pickle.dumps(first))
    copied = copy.deepcopy(first)
    for other in (second, again, copied):
        group = other.param_groups[0]
        assert {name: group[name] for name in (*FOREIGN, *LATER)} == FOREIGN | LATER
        for p, q in zip(first.param_groups[0]["params"], group["params"], strict=True):
            assert same(first.state[p].get("lookahead_slow_buff"), other.state[q].get("lookahead_slow_buff"))
        other.metrics()
        other.get_memory_efficiency_report()
        assert same(train(other, range(4, 8)), [p.detach() for p in whole.param_groups[0]["params"]])


def test_foreign_entries_of_states_outlive_other_bits() -> None:
    source = run(4, slow=True)
    other = AutomagicCameAMP8bit(
        [nn.Parameter(p.detach().clone()) for p in source.param_groups[0]["params"]], **FIELDS | {"optim_bits": 32}
    )
    load_requantized(other, source.state_dict())
    for group in other.param_groups:
        group["automagic_optim_bits"] = 8
    ProgressiveQuantization(other, total_steps=1).step()
    for p, q in zip(source.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert same(source.state[p]["lookahead_slow_buff"], other.state[q]["lookahead_slow_buff"])
    train(other, range(4, 5))


def test_foreign_keys_of_groups_move_through_the_neutral_form(tmp_path: Any) -> None:
    saved = run(4, FOREIGN, LATER, slow=True).state_dict()
    write_groups(tmp_path / "state.safetensors", neutral_groups(saved))
    for groups in (neutral_groups(saved), read_groups(tmp_path / "state.safetensors")):
        back = state_dict_of(groups, lambda array: torch.tensor(array))
        group = back["param_groups"][0]
        assert {name: group[name] for name in (*FOREIGN, *LATER)} == FOREIGN | LATER
        fresh = run(0)
        fresh.load_state_dict(back)
        assert fresh.param_groups[0]["betas"] == (0.9, 0.99, 0.999)


def test_groups_of_another_optimizer_make_one_with_the_same_fields() -> None:
    source = run(3, {"max_lr": 0.05, "lr_scale": 0.5})
    other = AutomagicCameAMP8bit(source.param_groups)
    group = other.param_groups[0]
    assert (group["automagic_max_lr"], group["automagic_warmup_steps"], group["lr_scale"]) == (0.05, 6, 0.5)
    assert (group["automagic_step"], float(group["automagic_log_rate_scale"])) == (0, 0.0)


@pytest.mark.parametrize(("key", "near"), [("warmup_step", 1), ("edge_penality", 1), ("weight_decay_mult", 0)])
def test_a_misspelt_field_of_a_group_makes_a_warning(key: str, near: int, recwarn: Any) -> None:
    AutomagicCameAMP8bit([{"params": [nn.Parameter(torch.ones(2))], key: 1}])
    assert len([w for w in recwarn if "did you mean" in str(w.message)]) == near


def test_a_misspelt_field_of_the_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown field warmup_step = 1; did you mean 'warmup_steps'"):
        AutomagicCameAMP8bit([nn.Parameter(torch.ones(2))], warmup_step=1)


@pytest.mark.parametrize("name", ["foreach", "fused", "capturable", "differentiable", "maximize"])
def test_keywords_of_torch_get_an_answer(name: str) -> None:
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=f"{name} = True is not an option of this optimizer: "):
        AutomagicCameAMP8bit(params, **{name: True})
    with pytest.raises(ValueError, match=f"group 0: {name} = True is not an option"):
        AutomagicCameAMP8bit([{"params": params, name: True}])
    AutomagicCameAMP8bit(params, **{name: False})  # holds anyway
