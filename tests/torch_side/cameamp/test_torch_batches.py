"""Arrays of one kind are computed with as one: same results, each with its own state, and no work for each array."""

import copy
import io
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from automagic_core.arrays.group_keys import FIRST_NORM, GRADIENT_NORM
from automagic_torch import AutomagicCameAMP8bit
from automagic_torch import optimizer as optimizer_module
from automagic_torch.cameamp import batches
from tests.torch_side.stages.test_torch_stage_chain import ON, stages
from tests.torch_side.torch_helpers import SMALL, run, same, set_gradients, snapshot

ALONE = {"cpu": 0, "other": 0}
ADAPTERS = ((16, 128), (128, 16), (32, 64), (64, 32))
MIXED = ((), (), (5,), (5,), (8, 6), (8, 6), (8, 6), (6, 8), (4, 3, 3, 3), (4, 3, 3, 3), (3, 4, 7), (3, 4, 7))


def arrays(shapes, dtype=torch.float32, lora=True):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for p in params:
        p._is_lora_layer = lora
    return params


def relative(a, b):
    return (torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(b.double())).item()


@pytest.mark.parametrize("layout", ["torch", "flax"])
@pytest.mark.parametrize("factored", ["none", "second_moment", "all"])
def test_batches_give_what_arrays_give_alone(monkeypatch, factored, layout):
    fields = SMALL | stages(*ON) | {"optim_bits": 32, "factored": factored, "layout": layout, "torque_decay": 0.5}
    together, alone = (AutomagicCameAMP8bit(arrays(MIXED), **fields) for _ in range(2))
    updates = {}
    together._on_update = alone._on_update = updates.__setitem__
    for step in range(1, 9):
        for optimizer in (together, alone):
            params = optimizer.param_groups[0]["params"]
            set_gradients(params, step)
            params[5].grad = None if step == 3 else params[5].grad
            if step in (2, 5):
                params[6].grad[0, 0] = torch.nan
            with monkeypatch.context() as patch:
                if optimizer is alone:
                    patch.setattr(batches, "ARRAY_LIMIT", ALONE)
                optimizer.step()
    pairs = list(zip(*(optimizer.param_groups[0]["params"] for optimizer in (together, alone)), strict=True))
    assert sum(together.state[p]["skipped_steps"].item() for p, _ in pairs) == 2
    for p, q in pairs:
        assert relative(p, q) < 1e-6  # the order of float32 sums
        assert p not in updates or relative(updates[p], updates[q]) < 1e-5 or p.numel() == 1
        for name, value in alone.state[q].items():
            if value.dtype == torch.float32 and value.any():
                assert relative(together.state[p][name], value) < 1e-5, name
            else:
                assert same(together.state[p][name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("block_wise", [True, False])
def test_8bit_states_of_a_batch_are_those_of_arrays_alone(monkeypatch, block_wise, dtype):
    fields = SMALL | stages() | {"block_wise": block_wise, "block_size": 64, "factored": "none", "min_8bit_size": 1}
    together, alone = (AutomagicCameAMP8bit(arrays(MIXED, dtype), **fields) for _ in range(2))
    run(together, range(1, 2))
    monkeypatch.setattr(batches, "ARRAY_LIMIT", ALONE)
    run(alone, range(1, 2))
    # Before anything is pooled over an array in another order, one step is the same bit for bit.
    for key in (FIRST_NORM, GRADIENT_NORM):
        norm, other = (optimizer.param_groups[0].pop(key) for optimizer in (together, alone))
        assert relative(norm, other) < 1e-6
    assert same(snapshot(together), snapshot(alone))


def test_every_array_owns_its_state():
    params = arrays([(8, 64)] * 5 + [(3, 5)] * 4 + [()] * 3)
    optimizer = AutomagicCameAMP8bit(params, **SMALL | stages(*ON))
    run(optimizer, range(1, 4))
    storages = set()
    for p in params:
        for name, tensor in optimizer.state[p].items():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
            assert tensor.is_contiguous()
            storages.add(tensor.untyped_storage().data_ptr())
    assert len(storages) == sum(len(optimizer.state[p]) for p in params)
    buffer = io.BytesIO()
    torch.save(optimizer.state[params[0]], buffer)
    assert buffer.tell() < 3000 + 600 * len(optimizer.state[params[0]])  # the format's overhead for each tensor


def test_an_earlier_state_dict_keeps_its_values():
    optimizer = AutomagicCameAMP8bit(arrays(MIXED), **SMALL | stages(*ON))
    run(optimizer, range(1, 3))
    state_dict = optimizer.state_dict()
    before = copy.deepcopy(state_dict["state"])
    ring = state_dict["param_groups"][0]["automagic_norm_history"].clone()
    run(optimizer, range(3, 6))
    assert same(state_dict["state"], before)
    assert same(state_dict["param_groups"][0]["automagic_norm_history"], ring)


def test_gradients_are_never_written_to():
    for shapes in ([(8, 6)], [(8, 6)] * 3):
        optimizer = AutomagicCameAMP8bit(arrays(shapes), **SMALL | stages(*ON))
        params = optimizer.param_groups[0]["params"]
        set_gradients(params, 1)
        params[0].grad[0, 0] = torch.inf
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert same([p.grad for p in params], before)


def test_large_arrays_go_alone_and_batches_are_bounded(monkeypatch):
    monkeypatch.setattr(batches, "ARRAY_LIMIT", {"cpu": 50, "other": 0})
    monkeypatch.setattr(batches, "BATCH_LIMIT", {"cpu": 120, "other": 0})
    cpu = torch.device("cpu")
    assert [batches.arrays_in_batch(size, cpu) for size in (1, 40, 50, 51, 1000)] == [120, 3, 2, 1, 1]
    monkeypatch.setattr(batches, "BATCH_LIMIT", {"cpu": 30, "other": 0})
    assert batches.arrays_in_batch(50, cpu) == 1


class Counted(TorchDispatchMode):
    """Counts operations by their kind."""

    KINDS = (
        ("fft", ("_fft_",)),
        ("cholesky", ("linalg_cholesky_ex",)),
        ("reduction", ("aten::sum", "mean", "amax", "vector_norm", "aten::all", "aten::sort", "aten::var")),
        ("copy", ("stack", "unbind", "_foreach_copy_")),
        ("host", ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")),
    )

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.counts[next((kind for kind, parts in self.KINDS if any(part in name for part in parts)), "other")] += 1
        return func(*args, **(kwargs or {}))


def operations(count, bits):
    """Of one step in the warm-up, with `count` adapters of four shapes and every stage on."""
    params = arrays([shape for shape in ADAPTERS for _ in range(count // 4)])
    fields = SMALL | stages(*ON) | {"optim_bits": bits, "percentile_clipping": 95, "warmup_steps": 10}
    optimizer = AutomagicCameAMP8bit(params, **fields)
    generator = torch.Generator().manual_seed(1)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    with Counted() as counted:
        optimizer.step()
    assert all(optimizer.state[p]["age"].item() == 2 for p in params)
    return counted.counts


def test_the_number_of_operations_does_not_grow_with_the_arrays_of_a_batch():
    few, many = operations(40, 8), operations(240, 8)
    shapes = len(ADAPTERS)
    assert few["fft"] == many["fft"] <= 4 * shapes
    assert few["cholesky"] == many["cholesky"] == shapes
    assert few["reduction"] == many["reduction"] <= 60 * shapes
    assert few["copy"] == many["copy"] <= 60 * shapes
    assert few["other"] == many["other"]
    assert many["host"] == 0


SHARED = {"all": (0, 0, 20, [2, 1]), "a part": (6, 0, 20, [2, 1]), "none": (0, 8, 16, [3])}
"""First rows of three arrays of 8 rows, and the sizes of their batches."""


@pytest.mark.parametrize("case", SHARED)
def test_arrays_that_share_memory_take_a_step_each(monkeypatch, case):
    *rows, sizes = SHARED[case]
    ran, step_of = [], optimizer_module.update_batch
    bases = [torch.ones(28, 6), torch.ones(28, 6)]
    made = [
        AutomagicCameAMP8bit([torch.nn.Parameter(base[row : row + 8]) for row in rows], **SMALL | stages())
        for base in bases
    ]

    def counted(batch, *given, **fields):
        ran.append(len(batch.params))
        step_of(batch, *given, **fields)

    monkeypatch.setattr(optimizer_module, "update_batch", counted)
    for step in (1, 2, 3):
        for optimizer in made:
            ran.clear()
            set_gradients(optimizer.param_groups[0]["params"], step)
            with monkeypatch.context() as patch:
                if optimizer is made[1]:
                    patch.setattr(batches, "ARRAY_LIMIT", ALONE)
                optimizer.step()
            assert sorted(ran, reverse=True) == (sizes if optimizer is made[0] else [1, 1, 1])
        assert relative(bases[0] - 1, bases[1] - 1) < 1e-4  # where both arrays of one memory have moved it


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_makes_no_difference(dtype):
    fields = SMALL | stages(*ON) | {"factored": "all", "spatial_scope": "all", "frequency_penalty": 0.3}
    before = torch.get_default_dtype()
    shapes = (*MIXED, (300, 300))  # one on which stage 3 works in strips
    plain, other = arrays(shapes), arrays(shapes)
    expected = AutomagicCameAMP8bit(plain, **fields)
    try:
        torch.set_default_dtype(dtype)
        optimizer = AutomagicCameAMP8bit(other, **fields)
        for step in range(1, 7):
            torch.set_default_dtype(torch.float32)
            set_gradients(plain, step)
            expected.step()
            torch.set_default_dtype(dtype)
            for p, q in zip(plain, other, strict=True):
                q.grad = p.grad.clone()
            optimizer.step()
    finally:
        torch.set_default_dtype(before)
    assert same(snapshot(optimizer), snapshot(expected))
    assert {t.dtype for state in optimizer.state.values() for t in state.values()} == {
        torch.float32,
        torch.uint8,
        torch.int32,
    }
