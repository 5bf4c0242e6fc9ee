"""`compiled=True`: the compiled step beside the eager one (docs/algorithm.md, section 8.1)."""

from __future__ import annotations

import copy
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from automagic_torch import AutomagicCameAMP8bit
from automagic_torch.codec.nearest import prepare_tables
from automagic_torch.steps import compiled as programs
from automagic_torch.steps.held_stacks import HeldStacks
from automagic_torch.steps.new_values import new_values
from tests.torch_side.torch_helpers import (
    SMALL,
    TOO_OLD_TO_COMPILE,
    parameters,
    run,
    same,
    set_gradients,
    snapshot,
)

FIELDS: dict[str, Any] = SMALL | {"warmup_steps": 3, "optim_bits": 32}
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_CUDA)]


def both(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, device: str = "cpu", **fields: Any
) -> list[AutomagicCameAMP8bit]:
    if TOO_OLD_TO_COMPILE:
        pytest.skip("the step is eager before torch 2.9")
    made = []
    for compiled in (False, True):
        params = [torch.nn.Parameter(p.detach().to(device)) for p in parameters(shapes, dtype)]
        made.append(AutomagicCameAMP8bit(params, compiled=compiled, **(FIELDS | fields)))
    return made


def params_of(optimizer: AutomagicCameAMP8bit) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_close(eager: AutomagicCameAMP8bit, compiled: AutomagicCameAMP8bit, codes_apart: float = 0.0) -> None:
    """Parity's bounds: 2e-6 of an array; the eager codec on a CPU rounds by bitsandbytes' grid."""
    pairs = list(zip(params_of(eager), params_of(compiled), strict=True))
    if pairs[0][0].dtype != torch.float32:
        # Where a last bit of the update differs, a chance turns out otherwise, and the weight stays apart.
        apart = torch.cat([(p != q).flatten() for p, q in pairs])
        assert apart.float().mean() < 1e-3
    for p, q in pairs:
        unit = torch.finfo(p.dtype).eps if p.dtype != torch.float32 else 2e-6
        torch.testing.assert_close(p.float(), q.float(), rtol=unit, atol=2e-6 * p.abs().max().item())
        assert eager.state[p].keys() == compiled.state[q].keys()
        for name, a in eager.state[p].items():
            b = compiled.state[q][name]
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            if a.dtype == torch.uint8:
                assert ((a.int() - b.int()).abs() > 0).float().mean() <= codes_apart, name
            elif codes_apart:  # what codes that are one apart lead to
                assert (a.double() - b.double()).norm() <= 0.02 * a.double().norm(), name
            else:
                # Of `s`: x / (|x| + 0.01) passes differences of a small x on a hundredfold.
                least = 5e-6 if name == "s" else 2e-6 * max(1e-3, a.abs().max().item())
                torch.testing.assert_close(a, b, rtol=1e-5, atol=least)


def compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.filterwarnings("error:Dynamo")  # it tells users of caches that it does not use
def test_a_compiled_step_is_the_eager_one_and_compiles_once() -> None:
    torch._dynamo.utils.counters.clear()
    # Small states in 8 bits, so that the grid of bitsandbytes is not in the way: values of one size.
    eager, compiled = both([(4, 16)] * 3, torque=False, warmup_steps=0, spatial_awareness=False)
    for optimizer in (eager, compiled):
        run(optimizer, range(1, 3))
        # Another rate, another weight decay, fewer arrays: nothing is compiled again.
        optimizer.param_groups[0]["lr"] = 3e-4
        optimizer.param_groups[0]["weight_decay"] = 0.1
        set_gradients(params_of(optimizer), 3)
        params_of(optimizer)[1].grad = None
        optimizer.step()
        set_gradients(params_of(optimizer), 4)
        params_of(optimizer)[0].grad[0, 0] = torch.nan
        optimizer.step()
    assert_close(eager, compiled)
    assert compiled.state[params_of(compiled)[0]]["skipped_steps"] == 1
    assert compilations() == 1


def test_sizes_are_constants_and_batches_of_far_other_sizes_get_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[Any] = []
    create = ShapeEnv.create_symbol

    def recorded(*args: Any, **more: Any) -> Any:
        sizes.append(create(*args, **more))
        return sizes[-1]

    monkeypatch.setattr(ShapeEnv, "create_symbol", recorded)
    far = programs.APART["cpu"]
    # With a weight decay of 0 another function is made than with one.
    for number, decay in ((2, 0.1), (2 * far, 0.1), (far + 1, 0.0), (1, 0.0), (far, 0.0)):
        _, compiled = both([(6, 16)] * number, torque=False, warmup_steps=0, weight_decay=decay)
        run(compiled, range(1, 2))
    windows = [[w for _, w in known] for key, known in programs._programs.items() if key[0].shape == (6, 16)]
    assert sorted(windows) == [[2], [far + 1, 1]]
    assert sizes
    assert all(size.is_number for size in sizes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clips", [pytest.param(100, id="raw gradients"), pytest.param(90, id="after the stages")])
def test_one_function_serves_other_numbers_of_arrays(clips: int, device: str) -> None:
    torch._dynamo.utils.counters.clear()
    fields: dict[str, Any] = {"percentile_clipping": clips, "warmup_steps": 20}
    eager, compiled = both([(4, 16)] * 7, device=device, torque=False, spatial_awareness=False, **fields)
    # The function is made for two arrays.  Then there are more, an even number of them, one alone, and an odd number.
    for number, present in enumerate([2, 2, 7, 6, 1, 5], start=1):
        for optimizer in (eager, compiled):
            set_gradients(params_of(optimizer), number)
            for p in params_of(optimizer)[present:]:
                p.grad = None
            if number == 4:
                params_of(optimizer)[5].grad[0, 0] = torch.inf
            optimizer.step()
    assert_close(eager, compiled)
    assert compiled.state[params_of(compiled)[5]]["skipped_steps"] == 1
    one, other = eager.param_groups[0], compiled.param_groups[0]
    for name in ("automagic_log_rate_scale", "automagic_agreement"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
    assert compilations() == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_by_chance_as_in_eager_steps(dtype: torch.dtype, device: str) -> None:
    """An update is a fraction of the gap between two values, so that a rounding to nearest would lose most of them."""
    fields: dict[str, Any] = {"torque": False, "warmup_steps": 0, "spatial_awareness": False, "lr": 3e-4}
    eager, compiled = both([(64, 64)] * 2, dtype, device, **fields)
    start = [p.detach().clone() for p in params_of(eager)]
    for optimizer in (eager, compiled):
        run(optimizer, range(1, 4))
    for before, p, q in zip(start, params_of(eager), params_of(compiled), strict=True):
        assert (p != before).float().mean() > 0.1
        # Where a last bit of the update differs, a chance can turn out otherwise.
        assert (p != q).float().mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factored", "more"),
    [
        ("second_moment", {"percentile_clipping": 90, "torque_decay": 0.9}),
        ("all", {"stochastic_rounding": False}),
        ("none", {"block_wise": False, "search_gain": 0.0}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_of_state(factored: str, more: dict[str, Any], dtype: torch.dtype) -> None:
    shapes = [(16, 128), (16, 128), (4, 3, 5, 5), (70, 66), (40,), ()]
    eager, compiled = both(shapes, dtype, optim_bits=32, factored=factored, spatial_scope="all", **more)
    for number in range(1, 6):  # through the end of the warm-up
        for optimizer in (eager, compiled):
            run(optimizer, range(number, number + 1))
        assert_close(eager, compiled)


@pytest.mark.slow
@pytest.mark.parametrize("factored", ["second_moment", "none", "all"])
def test_states_in_8_bits(factored: str) -> None:
    eager, compiled = both([(70, 128), (70, 128)], optim_bits=8, min_8bit_size=16, factored=factored)
    for optimizer in (eager, compiled):
        run(optimizer, range(1, 3))
    # bitsandbytes' grid on a CPU shifts codes of small values by one in a hundred elements (section 3.8).
    assert_close(eager, compiled, codes_apart=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(12, 384), (384, 12), (1030,)])
@pytest.mark.parametrize("torque", [True, False])
def test_one_array_whose_states_are_no_whole_blocks(shape: tuple[int, ...], torque: bool) -> None:
    """Inductor left the elements of the last, shorter block out: parameters became what lay in memory."""
    eager, compiled = both([shape], profile="balanced", optim_bits=8, warmup_steps=0, torque=torque)
    (p,), (q,) = params_of(eager), params_of(compiled)
    start = p.detach().clone()
    for optimizer in (eager, compiled):
        run(optimizer, range(1, 4))
    # Codes that are one apart, as above, change an update a little.
    assert (p - q).norm() <= 0.01 * (p - start).norm()


def test_an_earlier_state_dict_keeps_its_values() -> None:
    _, optimizer = both([(4, 16)] * 3, torque=False, warmup_steps=0, spatial_awareness=False)
    run(optimizer, range(1, 3))
    held = optimizer.state_dict()
    values = copy.deepcopy(held)
    run(optimizer, range(3, 5))
    assert same(held["state"], values["state"])
    _, other = both([(4, 16)] * 3, torque=False, warmup_steps=0, spatial_awareness=False)
    other.load_state_dict(held)
    run(other, range(3, 4))
    assert same(held["state"], values["state"])
    # In place from the second step on.
    tensor = optimizer.state[params_of(optimizer)[0]]["exp_avg"]
    run(optimizer, range(5, 6))
    assert optimizer.state[params_of(optimizer)[0]]["exp_avg"] is tensor


def test_stacks_that_stay_are_those_of_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"torque": False, "warmup_steps": 0, "spatial_awareness": False}
    found = []
    for stays in (True, False):
        with monkeypatch.context() as patch:
            if not stays:
                patch.setattr(HeldStacks, "of", lambda self, batch: None)
            _, optimizer = both([(4, 16)] * 3, **fields)
            params = params_of(optimizer)
            run(optimizer, range(1, 4))
            set_gradients(params, 4)
            params[1].grad = None  # another batch
            optimizer.step()
            rest = optimizer.state[params[1]]
            assert all(x.untyped_storage().nbytes() == x.nbytes for x in rest.values())
            run(optimizer, range(5, 7))
            optimizer.state[params[2]]["exp_avg"] = torch.ones(4, 16)  # somebody else's
            run(optimizer, range(7, 9))
            optimizer.state[params[0]]["exp_avg"].data = torch.ones(4, 16)  # as who moves states to a device and back
            run(optimizer, range(9, 11))
            assert same(optimizer.state[params[0]]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
            found.append((snapshot(optimizer), optimizer.state[params[0]]))
    (left, states), (right, _) = found
    assert same(left[0], right[0])
    assert same(left[1]["state"], right[1]["state"])
    # What is saved has memory of its own: one array's states do not save those of the others.
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in states.values())


def test_a_missing_compiler_is_named_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    programs.missing_compiler.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    eager, optimizer = both([(4, 16)])
    before = snapshot(optimizer)
    set_gradients(params_of(optimizer), 1)
    try:
        # monkeypatch would not put this back, but delete it.
        with (
            torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
            pytest.raises(RuntimeError, match="C\\+\\+ compiler"),
        ):
            optimizer.step()
    finally:
        programs.missing_compiler.cache_clear()
    assert same(snapshot(optimizer)[0], before[0])
    run(eager, range(1, 2))


def test_an_early_torch_computes_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    programs.missing_compiler.cache_clear()
    monkeypatch.setattr(torch, "__version__", "2.8.0+cu128")
    by_default, asked = (AutomagicCameAMP8bit(parameters([(4, 16)]), compiled=compiled) for compiled in (None, True))
    try:
        with pytest.warns(UserWarning, match=r"not compiled .* torch 2\.8\.0\+cu128 cannot compile the step; 2\.9"):
            assert not by_default._compiles(torch.device("cuda"))
        set_gradients(params_of(asked), 1)
        with pytest.raises(RuntimeError, match="2\\.9 and later can; compiled=False"):
            asked.step()
        monkeypatch.setattr(torch, "__version__", "2.10.0")
        programs.missing_compiler.cache_clear()
        assert "torch" not in (programs.missing_compiler("cpu") or "")
    finally:
        programs.missing_compiler.cache_clear()


def test_a_triton_that_cannot_compile_its_driver_is_told_before_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    if TOO_OLD_TO_COMPILE:
        pytest.skip("torch is named as the reason before 2.9")
    driver = mock.Mock()
    driver.active.get_current_target.side_effect = RuntimeError("Failed to find C compiler")
    monkeypatch.setitem(sys.modules, "triton", mock.Mock())
    monkeypatch.setitem(sys.modules, "triton.runtime", mock.Mock(driver=driver))
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    programs.missing_compiler.cache_clear()
    try:
        with pytest.warns(UserWarning, match="not compiled .* Failed to find C compiler"):
            assert not AutomagicCameAMP8bit(parameters([(4, 16)]))._compiles(torch.device("cuda"))
        driver.active.get_current_target.side_effect = None
        programs.missing_compiler.cache_clear()
        assert programs.missing_compiler("cuda") is None
    finally:
        programs.missing_compiler.cache_clear()


@pytest.mark.parametrize("value", ["yes", 1, 0.0])
def test_compiled_is_checked(value: Any) -> None:
    with pytest.raises(ValueError, match="compiled"):
        AutomagicCameAMP8bit(parameters([(4,)]), compiled=value)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have no -mavx to refuse")
def test_a_compiler_without_vector_instructions_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "old_compiler"
    script.write_text('#!/bin/sh\ncase "$*" in *-mavx*) echo "unknown option" >&2; exit 1;; esac\nexec g++ "$@"\n')
    script.chmod(0o755)
    code = """if True:
        import torch
        from tests.torch_side.steps.test_torch_compiled import both, programs, run

        run(both([(4, 16)])[1], range(1, 3))
        assert len(programs._failures) == 1
        torch.compile(lambda x: x.sin() + 1)(torch.ones(100))  # what the user compiles is not spoilt
    """
    for name in ("CXX", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(script if name == "CXX" else tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_VEC_ISA_OK", raising=False)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_weight_decay_that_is_a_tensor_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def uncompiled(way: Any, device: torch.device) -> Any:
        made.append(way)
        prepare_tables(device)
        return lambda given: tuple(new_values(way, given))

    monkeypatch.setattr(programs, "_new_program", uncompiled)
    found = []
    for weight_decay in (torch.tensor(0.1), 0.1):
        _, optimizer = both([(5, 7)], weight_decay=weight_decay, warmup_steps=0)
        run(optimizer, range(1, 4))
        found.append(snapshot(optimizer)[0])
    assert len(made) == 1
    assert same(*found)
