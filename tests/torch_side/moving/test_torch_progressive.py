"""Progressive quantization in PyTorch: when arrays move, what they hold then, and that runs and checkpoints go on."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from automagic_core import rounding_key
from automagic_core.arrays.state_forms import COMPANDED, SLOTS
from automagic_torch import AutomagicCameAMP8bit, ProgressiveQuantization
from automagic_torch.codec import quantized_tensor as codec
from automagic_torch.codec.quantized_tensor import QuantizedTensor
from tests.torch_side.torch_helpers import parameters, run, same, set_gradients, snapshot, through_a_file

pytestmark = pytest.mark.skipif(not codec.BITSANDBYTES_AVAILABLE, reason="8 bits need bitsandbytes")

SIZES = ((128, 80), (64, 80), (50, 50), (40, 40), (7,))  # 10240, 5120, 2500, 1600 and 7 elements
MOVES_AFTER = {10240: 4, 5120: 9, 2500: 15, 1600: 16, 7: 16}
"""Of 20 steps: 10240 at the end of the first phase, 5120 where 8192 · 4^(−(t − 4) / 12) falls below it, …"""
FIELDS: dict[str, Any] = {
    "lr": 1e-3,
    "warmup_steps": 10,
    "straightness": 0.7,
    "torque_decay": 0.5,
    "factored": "none",
    "force_8bit": True,
}


def eight_bit_sizes(optimizer: AutomagicCameAMP8bit) -> set[int]:
    return {p.numel() for p, state in optimizer.state.items() if "exp_avg_absmax" in state}


def test_arrays_move_once_at_their_time_by_quantizing_the_state_as_it_stands() -> None:
    optimizer = AutomagicCameAMP8bit(parameters(SIZES), **FIELDS)
    quantization = ProgressiveQuantization(optimizer, 20)
    for t in range(1, 21):
        run(optimizer, range(t, t + 1))
        before = {p: dict(state) for p, state in optimizer.state.items()}
        quantization.step()
        assert eight_bit_sizes(optimizer) == {size for size, after in MOVES_AFTER.items() if t >= after}
        for p, old in before.items():
            new = optimizer.state[p]
            if "exp_avg_absmax" in old or "exp_avg_absmax" not in new:
                assert new.keys() == old.keys()
                assert all(new[name] is old[name] for name in old)
                continue
            moving = [name for name in SLOTS if name in old]
            assert ("s" in moving) == (t < 10)
            for name in moving:
                key = rounding_key(t, SLOTS[name], p.numel())
                expected = QuantizedTensor.write(old[name][None], name in COMPANDED, 256, key)
                assert same([new[name], new[name + "_absmax"]], [expected.codes[0], expected.absmax[0]])
            rest = set(old) - set(moving)
            assert rest == {name for name in new if name.removesuffix("_absmax") not in moving}
            assert all(new[name] is old[name] for name in rest)
        state = snapshot(optimizer)
        quantization.step()
        assert same(snapshot(optimizer), state)
    report = optimizer.get_memory_efficiency_report()
    assert report["8bit_parameters"] == report["total_parameters"] == sum(MOVES_AFTER)


def test_rounding_to_nearest_where_the_fields_say_so() -> None:
    (p,) = parameters(((128, 80),))
    optimizer = AutomagicCameAMP8bit([p], **FIELDS, stochastic_rounding=False)
    quantization = ProgressiveQuantization(optimizer, 5)
    run(optimizer, range(1))
    exp_avg = optimizer.state[p]["exp_avg"]
    quantization.step()
    expected = QuantizedTensor.write(exp_avg[None], False, 256, None)
    assert torch.equal(optimizer.state[p]["exp_avg"], expected.codes[0])


@pytest.mark.parametrize("saved_after", [2, 10, 17])
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_a_run_resumes_bit_for_bit_in_every_phase(saved_after: int, optimizer_first: bool) -> None:
    def start() -> tuple[AutomagicCameAMP8bit, ProgressiveQuantization]:
        optimizer = AutomagicCameAMP8bit(parameters(SIZES), **FIELDS)
        return optimizer, ProgressiveQuantization(optimizer, 20)

    def go_on(optimizer: AutomagicCameAMP8bit, quantization: ProgressiveQuantization, steps: range) -> None:
        for t in steps:
            run(optimizer, range(t, t + 1))
            quantization.step()

    whole = start()
    go_on(*whole, range(saved_after))
    saved = through_a_file({"optimizer": whole[0].state_dict(), "quantization": whole[1].state_dict()})
    weights = [p.detach().clone() for p in whole[0].param_groups[0]["params"]]
    kept = copy.deepcopy(saved)
    go_on(*whole, range(saved_after, 20))
    assert same(saved, kept)

    optimizer = AutomagicCameAMP8bit(parameters(SIZES, seed=1), **FIELDS)
    if optimizer_first:  # before there is any ProgressiveQuantization
        optimizer.load_state_dict(saved["optimizer"])
    quantization = ProgressiveQuantization(optimizer, 999)
    quantization.load_state_dict(saved["quantization"])
    if not optimizer_first:
        optimizer.load_state_dict(saved["optimizer"])
    for p, weight in zip(optimizer.param_groups[0]["params"], weights, strict=True):
        p.data.copy_(weight)
    go_on(optimizer, quantization, range(saved_after, 20))
    assert same(snapshot(optimizer), snapshot(whole[0]))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("saved_after", [3, 12, 18])
def test_a_run_resumes_through_a_distributed_checkpoint(saved_after: int, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = torch.nn.ModuleList([torch.nn.Linear(80, 128), torch.nn.Linear(50, 50)])

    def made() -> tuple[AutomagicCameAMP8bit, ProgressiveQuantization]:
        optimizer = AutomagicCameAMP8bit(model.parameters(), **FIELDS)
        return optimizer, ProgressiveQuantization(optimizer, 20)

    optimizer, quantization = made()
    for t in range(1, 1 + saved_after):
        run(optimizer, range(t, t + 1))
        quantization.step()
    optimizer.zero_grad()
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
    saved = quantization.state_dict()

    other, resumed = made()
    resumed.load_state_dict(saved)
    state = {"optimizer": get_optimizer_state_dict(model, other)}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)  # after the warm-up without a process group
    dcp.load(state, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    set_optimizer_state_dict(model, other, state["optimizer"])
    assert same(other.state_dict(), optimizer.state_dict())
    resumed.step()
    assert same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("sizes", [3, [1024, 1024], [0], ["a"]])
def test_saved_sizes_are_looked_at_where_they_count(sizes: Any) -> None:
    optimizer = AutomagicCameAMP8bit(parameters(SIZES), **FIELDS)
    quantization = ProgressiveQuantization(optimizer, 20)
    saved = quantization.state_dict() | {"min_8bit_sizes": sizes}
    before = optimizer.param_groups[0]["automagic_min_8bit_size"]
    with pytest.raises(ValueError, match=r"has min_8bit_sizes = .* valid: 1 integers ≥ 1, one for each group"):
        quantization.load_state_dict(saved)
    assert optimizer.param_groups[0]["automagic_min_8bit_size"] == before
    run(optimizer, range(1, 2))
    quantization.load_state_dict(saved)  # the groups have their sizes by now


def test_what_stays_out() -> None:
    table, dense, asked, late = parameters(((100, 100), (100, 100), (100, 100), (100, 100)))
    table._is_embedding = True  # type: ignore[attr-defined]
    groups = [{"params": [table, dense, late]}, {"params": [asked], "optim_bits": 32}]
    optimizer = AutomagicCameAMP8bit(groups, **FIELDS, stable_emb=True)
    quantization = ProgressiveQuantization(optimizer, 5)
    for t in range(5):
        set_gradients([table, dense, asked], t)
        late.grad = torch.ones_like(late) if t == 4 else None
        optimizer.step()
        quantization.step()
    # `late` took its first step in the last phase.
    held = ["exp_avg_absmax" in optimizer.state[p] for p in (table, dense, asked, late)]
    assert held == [False, True, False, True]


def test_states_in_8_bits_already_stay_so() -> None:
    optimizer = AutomagicCameAMP8bit(parameters(SIZES), **FIELDS, min_8bit_size=4096)
    run(optimizer, range(3))
    quantization = ProgressiveQuantization(optimizer, 10)
    assert eight_bit_sizes(optimizer) == {10240, 5120}
    run(optimizer, range(3, 6))  # the state still fits the group's fields
    quantization.step()
    assert eight_bit_sizes(optimizer) == {10240, 5120}
    run(optimizer, range(6, 13))
    quantization.step()
    assert eight_bit_sizes(optimizer) == set(MOVES_AFTER)


def test_errors_and_the_warning_name_what_is_wrong() -> None:
    with pytest.warns(UserWarning, match="no state will move to 8 bits"):
        ProgressiveQuantization(AutomagicCameAMP8bit(parameters(), lr=1e-3), 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantization = ProgressiveQuantization(AutomagicCameAMP8bit(parameters(), **FIELDS | {"warmup_steps": 20}), 10)
    with pytest.raises(TypeError, match="AdamW"):
        ProgressiveQuantization(torch.optim.AdamW(parameters()), 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="total_steps = 0"):
        ProgressiveQuantization(quantization.optimizer, 0)
    with pytest.raises(ValueError, match="started_at = None"):
        quantization.load_state_dict({"total_steps": 3})
    assert quantization.total_steps == 10


def test_a_group_that_is_added_in_the_midst_of_the_run_moves_with_the_others() -> None:
    first, second, third = parameters([(64, 64), (64, 64), (128, 128)])
    optimizer = AutomagicCameAMP8bit([first], **FIELDS)
    quantization = ProgressiveQuantization(optimizer, 100)
    for step in range(3):
        if step == 1:
            optimizer.add_param_group({"params": [second, third]})
        run(optimizer, range(step, step + 1))
        quantization.step()
    assert {optimizer.state[p]["exp_avg"].dtype for p in (first, second, third)} == {torch.float32}
    sizes = {group["automagic_min_8bit_size"] for group in optimizer.param_groups}
    assert sizes == {quantization.min_8bit_size}
