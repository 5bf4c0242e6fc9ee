"""Large arrays in slabs of rows beside the same arrays computed whole."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from automagic_core.arrays.group_keys import PREFIX
from automagic_core.arrays.state_forms import SEARCH_SCALARS
from automagic_torch import AutomagicCameAMP8bit
from automagic_torch.steps import array_step, compiled, slabs
from automagic_torch.steps.new_values import Given, New, Way

EVERYTHING: dict[str, Any] = {"profile": "quality_optimized", "spatial_scope": "all", "background_regularization": True}

WARM_UP: dict[str, Any] = {"warmup_steps": 100, "max_lr": 1.0}


def uncompiled(way: Way, given: Given) -> New:
    new = array_step._written_back(way, given)
    return new if way.share < 1 else new._replace(stored=given.stored)


def stepped(
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    shape: tuple[int, ...],
    raw: bool,
    fields: dict[str, Any],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    bad: float = torch.nan,
) -> Any:
    monkeypatch.setattr(slabs, "SLAB", dict.fromkeys(slabs.SLAB, limit))
    if raw and device == "cpu":  # what would be compiled, without compiling
        monkeypatch.setattr(compiled, "missing_compiler", lambda _: None)
        monkeypatch.setattr(compiled, "run_compiled", uncompiled)
    p = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype))
    other = torch.nn.Parameter(torch.zeros(300, device=device))
    chosen = {"lr": 1e-4, "warmup_steps": 0} | fields
    optimizer = AutomagicCameAMP8bit([p, other], force_8bit=True, compiled=raw, **chosen)
    assert (slabs.rows_of_slab(optimizer_plan(optimizer, p), limit, equal=raw) is not None) == (limit < 2**20)
    for number in range(1, 5):
        other.grad = torch.randn(300, generator=torch.Generator().manual_seed(number)).to(device)
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(device, dtype)
        if number == 3:
            p.grad.view(-1)[5] = bad
        optimizer.step()
    (group,) = optimizer.param_groups
    search = {name: group[f"{PREFIX}{name}"] for name in SEARCH_SCALARS}
    return p, optimizer.state[p], optimizer._stage_energy, search


def optimizer_plan(optimizer: AutomagicCameAMP8bit, p: torch.Tensor) -> Any:
    from automagic_torch.cameamp.groups import group_config, plan_of

    return plan_of(p, group_config(optimizer.param_groups[0]), "torch", eight_bit=True)


@pytest.mark.parametrize(
    ("shape", "raw"), [((128, 512), False), ((96, 64, 4, 4), False), ((211, 320), False), ((128, 512), True)]
)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"profile": "memory_optimized"},
        {"factored": "none"},
        {"optim_bits": 32},
        EVERYTHING,
        WARM_UP,
        WARM_UP | {"lr_mask_gain": 0.1},
        EVERYTHING | WARM_UP,
    ],
)
def test_slabs_change_nothing_but_the_order_of_sums(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], raw: bool, fields: dict[str, Any]
) -> None:
    compare(stepped(monkeypatch, 2**30, shape, raw, fields), stepped(monkeypatch, 2**13, shape, raw, fields), fields)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
def test_slabs_of_other_dtypes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, raw: bool, bad: float) -> None:
    fields = {"lr": 1e-3, "factored": "none"}
    whole, cut = (
        stepped(monkeypatch, limit, (128, 512), raw, fields, dtype=dtype, bad=bad) for limit in (2**30, 2**13)
    )
    start = torch.randn((128, 512), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert (whole[0] != start).float().mean() > 0.1  # as many numbers moved as tell of wrong random bits
    compare(whole, cut, fields)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fields", [{"factored": "none"}, WARM_UP])
def test_compiled_slabs_on_cuda(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]) -> None:
    # Kernels of other sizes may round a product and a sum at once or one by one.
    whole, cut = (stepped(monkeypatch, limit, (128, 512), True, fields, "cuda") for limit in (2**30, 2**13))
    compare(whole, cut, fields, times=10)


def compare(expected: Any, found: Any, fields: dict[str, Any], times: float = 1) -> None:
    """Two results of `stepped`; bounds may be so many times as large."""
    whole, states, energy, search = expected
    cut, cut_states, cut_energy, cut_search = found
    # A rate of 1e-4 and steps of up to 3.  Where the last bit of a sum flips a code, an update is a gap of codes off.
    assert ((cut - whole).abs() > 1e-6).float().mean() <= times * 1e-4
    for name, value in states.items():
        here = cut_states[name]
        assert here.dtype == value.dtype
        if here.dtype == torch.uint8:
            assert (here != value).float().mean() <= times * 1e-4, name
        else:
            apart = 1e-3 if name == "walk" else 1e-5  # the walk adds up updates, of which some are a gap of codes off
            assert (here.double() - value.double()).norm() <= times * apart * value.double().norm(), name
    assert states["skipped_steps"] == cut_states["skipped_steps"] == 1
    assert search["log_rate_scale"] != 0 or "warmup_steps" not in fields
    # The search sees sums over all elements in another order, and E and ℓ the few updates that are a gap of codes off.
    for name, value in search.items():
        here = torch.as_tensor(cut_search[name])
        torch.testing.assert_close(here, torch.as_tensor(value), rtol=times * 1e-4, atol=1e-7)
    assert energy.keys() == cut_energy.keys()
    for stage, norms in energy.items():
        torch.testing.assert_close(cut_energy[stage], norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("dtype", "first"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_a_parameter_may_begin_anywhere_in_memory(dtype: torch.dtype, first: int) -> None:
    p = torch.nn.Parameter(torch.zeros(4096 + first, dtype=dtype)[first:])
    p.grad = torch.ones_like(p)
    AutomagicCameAMP8bit([p]).step()
    assert (p < 0).all()


def test_a_state_that_is_not_contiguous_is_written_too() -> None:
    found = []
    for transposed in (False, True):
        p = torch.nn.Parameter(torch.zeros(1024, 1024))
        optimizer = AutomagicCameAMP8bit([p], warmup_steps=0, optim_bits=32)
        for number in range(3):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
            optimizer.step()
            if transposed:
                optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].t().contiguous().t()
        found.append((p.detach(), optimizer.state[p]["exp_avg"]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_the_last_slab_may_begin_at_an_odd_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB", dict.fromkeys(slabs.SLAB, 2049 * 256))
    p = torch.nn.Parameter(torch.zeros(5 * 2049 + 2048, 256))
    p.grad = torch.ones_like(p)
    AutomagicCameAMP8bit([p], warmup_steps=0, compiled=False).step()
    assert (p < 0).all()


@pytest.mark.parametrize("fields", [{}, EVERYTHING, EVERYTHING | {"force_8bit": True}])
def test_a_step_of_tensors_without_values_and_then_one_with_values(fields: dict[str, Any]) -> None:
    for mode in (FakeTensorMode(), nullcontext()):
        with mode:
            p, small = torch.nn.Parameter(torch.zeros(1024, 640)), torch.nn.Parameter(torch.zeros(40, 24))
            optimizer = AutomagicCameAMP8bit([p, small], compiled=False, **fields)
            for _ in range(2):
                p.grad, small.grad = torch.ones_like(p), torch.ones_like(small)
                optimizer.step()
            assert optimizer.state[p]["age"].shape == ()
    assert ((p < 0).all() and (small < 0).all()).item()
