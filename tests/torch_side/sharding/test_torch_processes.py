"""Several processes: DDP, `fully_shard`, and checkpoints that go from one number of processes to another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import training_workers as train
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from automagic_torch.arrays.dtensors import whole
from automagic_torch.cameamp import presence
from tests.torch_side.processes import run_processes
from tests.torch_side.sharded_workers import (
    damaged_in_one_process,
    gathered_on_demand,
    gradient_in_one_process,
    kept_of_pinned,
    refusals,
    steps_from_one_state,
)
from tests.torch_side.torch_helpers import same

SUMS = 1e-6
"""‖a − b‖ / ‖b‖ where float32 sums are taken in another order; the largest seen is 4e-7."""
SIGN = 5e-6
"""Of `s`: x / (|x| + 0.01) passes differences of a small x on a hundredfold; the largest seen is 1.2e-6."""


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def hold_states(sharded: list[dict[str, Tensor]], whole: list[dict[str, Tensor]]) -> None:
    """Codes equal for 99.99 % and else one apart, everything that is counted equal, float32 within `SUMS`."""
    codes = []
    for a, b in zip(sharded, whole, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype), name
            if a[name].dtype == torch.uint8:
                codes.append((a[name].int() - b[name].int()).abs().flatten())
            elif a[name].is_floating_point():
                # Of a walk's signed steps most cancel: 1.1e-6 was seen.
                bound = {"s": SIGN, "walk": 3 * SUMS}.get(name, SUMS)
                assert distance(a[name], b[name]) <= bound, name
            else:
                assert torch.equal(a[name], b[name]), name
    if codes:
        apart = torch.cat(codes)
        assert apart.max() <= 1
        # One of a few thousand codes may lie where rounding decides.
        assert apart.sum() <= max(1, 1e-4 * apart.numel())


def hold_steps(results: list[dict[str, Any]], dtype: torch.dtype) -> None:
    for step, result in enumerate(results, start=1):
        whole, sharded = result["updates"]
        assert len(whole) == len(sharded) > 0
        assert all(distance(a, b) <= SUMS for a, b in zip(sharded, whole, strict=True)), step
        hold_states(*reversed(result["states"]))
        whole, sharded = result["params"]
        # A rounded weight may move to the other neighbour, one unit away, where an update is an ulp apart.
        bound = SUMS if dtype == torch.float32 else 1e-3
        assert all(distance(a, b) <= bound for a, b in zip(sharded, whole, strict=True)), step
        assert all(distance(result["shared"][1][name], value) <= SUMS for name, value in result["shared"][0].items())
        for stage, pair in result["energy"][0].items():
            assert torch.stack(result["energy"][1][stage]).tolist() == pytest.approx(
                torch.stack(pair).tolist(), rel=1e-5
            )


def hold_run(several: dict[str, Any], one: dict[str, Any]) -> None:
    names = list(one["params"])
    assert all(distance(several["params"][name], one["params"][name]) <= SUMS for name in names)
    hold_states([several["states"][name] for name in names], [one["states"][name] for name in names])
    assert several["group"].keys() == one["group"].keys()
    assert several["group"]["automagic_step"] == one["group"]["automagic_step"]


def short(rank: int, path: str) -> dict[str, Any]:
    return {
        "steps": steps_from_one_state(rank, 2, False, torch.float32, 3, {"percentile_clipping": 50}),
        "ddp": train.trained(rank, "ddp", 1, {}),
        "fsdp": train.trained(rank, "fsdp", 1, {}),
        "saved": train.saved(rank, "fsdp", path, 2, 3),
        "loaded": train.loaded(rank, "fsdp", path, 2, 3),
        # A fresh optimizer has what only a warm-up needs, and the checkpoint's is over.
        "saved after the warm-up": train.saved(rank, "fsdp", path + "_after", 2, 3, warmup_steps=2),
        "loaded after the warm-up": train.loaded(rank, "fsdp", path + "_after", 2, 3, warmup_steps=2),
        "asked": train.asked_for_states(rank, "fsdp"),
        "refusals": refusals(rank),
        "a gradient in one process only": gradient_in_one_process(rank),
        "pinned": kept_of_pinned(rank),
    }


def test_what_one_process_refuses_no_process_loads():
    here, there = run_processes(damaged_in_one_process, 2)
    assert here == ("another process refused the saved state; its error says why, and nothing was changed", 0)
    assert "exp_avg_absmax with values from nan to nan" in there[0]
    assert there[1] == 0


def test_two_processes(tmp_path):
    results = run_processes(short, 2, str(tmp_path / "checkpoint"))
    assert same(results[0], results[1])
    result = results[0]
    hold_steps(result["steps"], torch.float32)
    one = train.trained(0, "plain", 1, {})
    for way in ("ddp", "fsdp"):
        hold_run(result[way], one)
    assert same(result["loaded"], result["saved"])
    assert same(train.loaded(0, "plain", str(tmp_path / "checkpoint"), 2, 2)[0], result["saved"][0])
    assert same(result["loaded after the warm-up"], result["saved after the warm-up"])
    plain = train.loaded(0, "plain", str(tmp_path / "checkpoint_after"), 2, 2, warmup_steps=2)[0]
    assert same(plain, result["saved after the warm-up"][0])
    assert "walk" not in plain["states"]["first.weight"]
    assert same(*result["asked"])
    placed, flat = result["refusals"][:2], result["refusals"][2:]
    assert len(placed) == len(flat) == 2
    for message in placed:
        assert "'weight'" in message
        assert "valid: Shard(0) on one mesh dimension at most" in message
    assert all("split the model by fully_shard (FSDP2)" in message for message in flat)
    message = "parameter 'b' has a gradient in 1 of the 2 processes that hold it: all of them must have one, or none"
    assert result["a gradient in one process only"] == (message, False)
    walk, kept, pinned = result["pinned"]
    assert torch.equal(kept, 0.5 * walk)
    assert pinned == ["Tensor"]


def test_what_the_host_keeps_is_gathered_where_the_mesh_is() -> None:
    class Piece:
        """A DTensor, of which this notes where it was gathered."""

        def __init__(self, device: str, mesh: str) -> None:
            self.device, self.device_mesh = torch.device(device), SimpleNamespace(device_type=mesh)

        def to(self, device: str) -> Any:
            return Piece(device, self.device_mesh.device_type)

        def full_tensor(self) -> Any:
            gathered.append(self.device.type)
            return SimpleNamespace(to=str)

    gathered: list[str] = []
    for device, mesh in (("cpu", "cuda"), ("cpu", "cpu"), ("cuda", "cuda"), ("meta", "cpu")):
        piece: Any = Piece(device, mesh)
        assert str(whole(piece)) == device
    assert gathered == ["cuda", "cpu", "cuda", "meta"]


def test_the_host_does_not_wait_for_a_gpu_that_counts_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[dict[str, Any]] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default:
                copies.append(kwargs)
            return func(*args, **(kwargs or {}))

    pinned: list[bool] = []
    make = torch.tensor

    def tensor(values: list[bool], pin_memory: bool = False, **fields: Any) -> Tensor:
        pinned.append(pin_memory)  # which needs a GPU
        return make(values, **fields)

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(presence, "summed", lambda parts, split: parts)
    split, p = SimpleNamespace(count=2), SimpleNamespace(grad=None, device=torch.device("cuda:0"))
    monkeypatch.setattr(presence, "_by_processes", lambda groups: [(split, [((0, 0), p)])])
    with FakeTensorMode(), Copies():
        presence.agree_on_presence([], {0: [False]})
    assert pinned == [True]
    assert [copy["non_blocking"] for copy in copies] == [True]
    p.device = torch.device("cpu")
    presence.agree_on_presence([], {})
    assert pinned == [True, False]


def runs(rank: int, way: str) -> list[dict[str, Any]]:
    return [train.trained(rank, way, steps, {"optim_bits": bits}) for bits in (8, 32) for steps in (1, 8)]


CASES = {
    "balanced": (2, False, torch.bfloat16, {}),
    "all factored, Flax layout": (2, False, torch.float32, {"factored": "all", "layout": "flax"}),
    "nothing factored": (4, False, torch.float32, {"factored": "none", "torque_decay": 0.5, "percentile_clipping": 50}),
    "one block": (4, False, torch.float32, {"factored": "none", "block_wise": False}),
    "32 bits": (4, False, torch.float32, {"optim_bits": 32}),
    "copies of shards": (4, True, torch.bfloat16, {"factored": "none", "block_size": 64}),
    "to nearest, no mask": (2, False, torch.bfloat16, {"stochastic_rounding": False, "lr_mask_gain": 0.0}),
    "no search": (2, False, torch.float32, {"search_gain": 0.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_sharded_step_is_the_whole_one(case):
    world, hybrid, dtype, fields = CASES[case]
    results = run_processes(steps_from_one_state, world, world, hybrid, dtype, 6, fields)
    assert all(same(result, results[0]) for result in results)
    hold_steps(results[0], dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "world"), [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("hybrid", 4)])
def test_training_in_several_processes(way, world):
    results = run_processes(runs, world, way)
    assert all(same(result, results[0]) for result in results)
    for several, one in zip(results[0], runs(0, "plain"), strict=True):
        if several["group"]["automagic_step"] == 1:
            # Later gradients differ as the weights do, and what differs is no longer only a sum's order.
            hold_run(several, one)
        far = max(distance(several["params"][name], one["params"][name]) for name in one["params"])
        assert far < 1e-4  # as far as runs drift whose codes now and then round to the other neighbour


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_goes_on_in_two_in_one_and_unsharded(tmp_path):
    path = str(tmp_path / "checkpoint")
    saved = run_processes(train.saved, 4, "fsdp", path, 3, 5)
    assert all(same(result, saved[0]) for result in saved)
    there, later = saved[0]
    for world, way in ((4, "fsdp"), (4, "hybrid"), (2, "fsdp"), (1, "fsdp")):
        came, went_on = run_processes(train.loaded, world, way, path, 3, 5)[0]
        assert same(came, there)
        assert world != 4 or way == "hybrid" or same(went_on, later)
        assert max(distance(went_on["params"][name], later["params"][name]) for name in later["params"]) < 1e-5
    assert same(train.loaded(0, "plain", path, 3, 3)[0], there)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "world"), [("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("hybrid", 4)])
def test_what_rank_0_gathered_goes_back_to_all(way, world):
    for before, after, _ in run_processes(train.passed_on, world, way, 3, 5):
        assert same(after, before)


@pytest.mark.slow
def test_what_works_on_whole_states_works_on_sharded_ones():
    for both in run_processes(gathered_on_demand, 2):
        for name in ("from Adam", "in 32 bits", "progressive", "report"):
            whole, sharded = both[name]
            assert same(sharded, whole), name
        whole, sharded = both["metrics"]
        assert sharded == pytest.approx(whole, rel=1e-6)
