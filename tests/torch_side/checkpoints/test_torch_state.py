"""Section 6 in PyTorch: what is held, saved and loaded."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automagic_core import absmax_shape
from automagic_torch import AutomagicCameAMP8bit
from tests.torch_side.torch_helpers import FIRST, SMALL, parameters, run, same, set_gradients, snapshot, through_a_file

FACTORED = ("none", "second_moment", "all")


@pytest.mark.parametrize("factored", FACTORED)
@pytest.mark.parametrize("bits", [8, 32])
def test_names_shapes_and_dtypes(factored, bits):
    params = parameters([(8, 256), (5,), (65, 80), (300, 8)])
    optimizer = AutomagicCameAMP8bit(params, optim_bits=bits, factored=factored, torque_decay=0.5, **SMALL)
    run(optimizer, range(1, 2))

    def coded(name, state, shape):
        assert state[name].shape == shape
        assert state[name].dtype == (torch.uint8 if bits == 8 else torch.float32)
        assert (name + "_absmax" in state) == (bits == 8)
        if bits == 8:
            assert state[name + "_absmax"].shape == absmax_shape(shape, 256)

    def plain(name, state, shape):
        assert (state[name].shape, state[name].dtype) == (shape, torch.float32)
        assert name + "_absmax" not in state

    for p in (params[0], params[2], params[3]):
        state, shape, narrow = optimizer.state[p], tuple(p.shape), min(p.shape) <= 64
        element_wise = ["exp_avg", "s"] + ["exp_avg_sq"] * (factored == "none")
        element_wise += ["exp_avg_res"] * (factored == "none" or (factored == "second_moment" and not narrow))
        for name in element_wise:
            coded(name, state, shape)
        of = {"_row": (shape[0], 1), "_col": (1, shape[1])}
        long, short = sorted(of, key=lambda part: -max(of[part]))
        for name in {"exp_avg_sq", "exp_avg_res"} - set(element_wise):
            plain(name + short, state, of[short])
            if name == "exp_avg_res" and narrow:
                assert name + long not in state
            else:
                (coded if narrow else plain)(name + long, state, of[long])
        assert ("spatial_variance" in state) == (shape[1] > 64)
        assert ("background_scale" in state) == (factored == "none")
    state = optimizer.state[params[0]]
    assert state["lr_mask"].shape == state["spatial_variance"].shape == state["walk"].shape == (8, 1)
    assert state["age"].dtype == state["skipped_steps"].dtype == torch.int32
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert "lr_mask" not in optimizer.state[params[1]]
    assert optimizer.state[params[1]]["walk"].shape == (1,)
    run(optimizer, range(2, 5))
    kept = set(optimizer.state[params[0]])
    assert kept == set(state) - {"s", "s_absmax", "walk"}


def test_an_array_without_gradient_at_the_end_of_the_warm_up_drops_its_walk_too():
    params = parameters([(8, 6), (4, 4)])
    optimizer = AutomagicCameAMP8bit(params, torque_decay=0.5, **SMALL)
    run(optimizer, range(1, 3))
    for step in range(3, 6):
        set_gradients(params, step)
        params[1].grad = None
        optimizer.step()
    assert "walk" not in optimizer.state[params[1]]
    run(optimizer, range(6, 7))
    assert optimizer.state[params[1]]["age"].item() == 3


def test_the_report_counts_the_tensors_that_are_held():
    params = parameters([(16, 256), (8, 6), (0, 4)])
    optimizer = AutomagicCameAMP8bit(params, percentile_clipping=90, **SMALL | {"min_8bit_size": 1000})
    run(optimizer, range(1, 6))
    report = optimizer.get_memory_efficiency_report()
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    held = sum(t.numel() * t.element_size() for t in tensors) + 6 * 4 + 101 * 4  # the search; the norms, their position
    assert report["state_bytes"] == held
    assert report["total_parameters"] == 16 * 256 + 48
    assert report["8bit_parameters"] == 16 * 256
    assert report["32bit_parameters"] == 48
    assert report["adam_state_bytes"] == 8 * (16 * 256 + 48)
    assert report["bitsandbytes_available"] is True
    assert report["memory_saved_mb"] == (report["adam_state_bytes"] - held) / 1e6


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_saved_run_goes_on_bit_for_bit(data):
    shapes = data.draw(st.lists(st.lists(st.integers(0, 9), max_size=5).map(tuple), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    fields = data.draw(
        st.fixed_dictionaries(
            {
                "factored": st.sampled_from(FACTORED),
                "optim_bits": st.sampled_from([8, 32]),
                "block_wise": st.booleans(),
                "block_size": st.sampled_from([64, 256]),
                "torque_decay": st.sampled_from([0.0, 0.9]),
                "lr_mask_gain": st.sampled_from([0.0, 0.2]),
                "search_gain": st.sampled_from([0.0, 0.1]),
                "agreement_floor": st.sampled_from([-1.0, -0.05]),
                "spatial_awareness": st.booleans(),
                "background_regularization": st.booleans(),
                "stochastic_rounding": st.booleans(),
                "warmup_steps": st.integers(0, 5),
            }
        )
    )
    saved_at = data.draw(st.integers(0, 6))
    params = parameters(shapes, dtype)
    optimizer = AutomagicCameAMP8bit(params, **SMALL | fields)
    run(optimizer, range(1, 1 + saved_at))
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    restored = AutomagicCameAMP8bit(copies)  # the saved hyperparameters replace the defaults
    restored.load_state_dict(through_a_file(optimizer.state_dict()))
    run(optimizer, range(1 + saved_at, 4 + saved_at))
    run(restored, range(1 + saved_at, 4 + saved_at))
    assert same(snapshot(restored), snapshot(optimizer))


def make(**changes):
    params = parameters([(8, 6), (5,)])
    return AutomagicCameAMP8bit(params, torque_decay=0.5, **SMALL | changes)


def saved(steps=2, **changes):
    optimizer = make(**changes)
    run(optimizer, range(1, 1 + steps))
    return copy.deepcopy(optimizer.state_dict())


def without(key):
    def change(state_dict):
        del state_dict["state"][0][key]

    return change


def replaced(key, value):
    def change(state_dict):
        state_dict["state"][0][key] = value

    return change


def group_value(key, value):
    def change(state_dict):
        state_dict["param_groups"][0][key] = value

    return change


REFUSED = {
    "missing state": (without("exp_avg"), "exp_avg .missing"),
    "missing walk in the warm-up": (without("walk"), "within its warm-up and lacks walk"),
    "state of other fields": (replaced("exp_avg_res_row", torch.zeros(8, 1)), "exp_avg_res_row .unknown"),
    "shape": (replaced("exp_avg", torch.zeros(6, 8, dtype=torch.uint8)), "exp_avg of shape"),
    "dtype": (replaced("lr_mask", torch.zeros(8, 1, dtype=torch.bfloat16)), "lr_mask of shape .* torch.bfloat16"),
    "no tensor": (replaced("age", 3), "age = 3"),
    "32 bits by its own config": (group_value("automagic_optim_bits", 32), "holds 8 bits"),
    "32 bits outside CUDA": (group_value("automagic_force_8bit", False), "force_8bit=True"),
    "other factors": (group_value("automagic_factored", "none"), "exp_avg_sq"),
    "layout": (group_value("automagic_layout", "flax"), "layout 'flax'"),
    "bad field": (group_value("automagic_betas", (2, 0, 0)), "betas"),
    "bad step": (group_value("automagic_step", -1), "step = -1"),
    "bad log_rate_scale": (group_value("automagic_log_rate_scale", 0.0), "log_rate_scale = 0.0"),
    "no log_rate_scale": (lambda d: d["param_groups"][0].pop("automagic_log_rate_scale"), "lacks log_rate_scale"),
    "no walk_energy": (lambda d: d["param_groups"][0].pop("automagic_walk_energy"), "walk_energy = None"),
    "unknown parameter": (lambda d: d["state"].update({7: d["state"][0]}), "unknown parameters: .7"),
    "fewer parameters": (lambda d: d["param_groups"][0]["params"].pop(), "1 parameters in the saved state"),
    "more groups": (lambda d: d["param_groups"].append(d["param_groups"][0]), "2 parameter groups"),
    "no state": (lambda d: d.pop("state"), "no 'state'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(case):
    change, message = REFUSED[case]
    state_dict = saved()
    change(state_dict)
    optimizer = make()
    run(optimizer, range(1, 2))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert same(snapshot(optimizer), before)


def test_an_8bit_state_is_refused_without_bitsandbytes(monkeypatch):
    state_dict = saved()
    monkeypatch.setattr("automagic_torch.codec.quantized_tensor.BITSANDBYTES_AVAILABLE", False)
    with pytest.raises(ValueError, match="bitsandbytes, which is not installed"):
        make().load_state_dict(state_dict)


@pytest.mark.parametrize(("steps", "present"), [(2, 0), (6, 0), (2, 6), (6, 2), (0, 2), (0, 6)])
def test_states_from_warm_up_and_after_it_load_into_optimizers_at_any_time(steps, present):
    state_dict = saved(steps)
    optimizer = make()
    run(optimizer, range(1, 1 + present))
    optimizer.load_state_dict(state_dict)
    assert same(optimizer.state_dict(), state_dict)
    run(optimizer, range(1, 3))


def test_leftovers_of_the_warm_up_are_dropped_after_it():
    state_dict = saved(6)
    state_dict["state"][0] |= {"last_polarity": torch.zeros(8, 1, dtype=torch.uint8), "walk": torch.zeros(8, 1)}
    optimizer = make()
    optimizer.load_state_dict(state_dict)
    assert not {"last_polarity", "walk"} & optimizer.state_dict()["state"][0].keys()


def test_a_loaded_state_shares_nothing_with_what_it_was_loaded_from():
    optimizer, other = make(), make()
    run(optimizer, range(1, 3))
    state_dict = optimizer.state_dict()
    before = copy.deepcopy(state_dict)
    other.load_state_dict(state_dict)
    run(other, range(3, 5))
    assert same(state_dict, before)
    assert same(optimizer.state_dict(), before)


def test_hooks_of_saving_and_loading_run():
    calls = []
    state_dict = saved()
    optimizer = make()
    optimizer.register_state_dict_post_hook(lambda o, d: calls.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(o.param_groups[0]["automagic_step"]))

    def other_state(optimizer, loaded):
        calls.append("before")
        loaded["param_groups"] = copy.deepcopy(loaded["param_groups"])
        loaded["param_groups"][0]["automagic_step"] = 3
        return loaded

    optimizer.register_load_state_dict_pre_hook(other_state)
    optimizer.load_state_dict(state_dict)
    optimizer.state_dict()
    assert calls == ["before", 3, "saved"]
    assert state_dict["param_groups"][0]["automagic_step"] == 2


@pytest.mark.parametrize("prepend", [False, True])
def test_a_hook_may_save_another_form(prepend):
    optimizer, other = make(), make()
    run(optimizer, range(1, 3))
    optimizer.param_groups[0]["lr"] = np.float64(2e-3)
    plain = optimizer.state_dict()
    optimizer.register_state_dict_post_hook(lambda o, saved: {"inner": saved}, prepend=prepend)
    other.register_load_state_dict_pre_hook(lambda o, loaded: loaded["inner"])
    for _ in range(2):  # the second has no more hooks than the first
        wrapped = optimizer.state_dict()
        assert same(wrapped, {"inner": plain})
    assert type(wrapped["inner"]["param_groups"][0]["lr"]) is float
    other.load_state_dict(wrapped)
    assert same(other.state_dict(), plain)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_of_the_optimizer_go_on_alike(way):
    params = parameters([(16, 32), (8, 6)])
    params[0]._is_embedding = True
    optimizer = AutomagicCameAMP8bit(params, stable_emb=True, **SMALL)
    run(optimizer, range(1, 3))
    assert optimizer.param_groups[0]["automagic_log_rate_scale"] > FIRST
    other = way(optimizer)
    assert other.param_groups[0]["params"][0] is not params[0]
    run(optimizer, range(3, 7))
    run(other, range(3, 7))
    assert same(snapshot(other), snapshot(optimizer))


def test_going_back_into_the_warm_up_by_the_flat_form_is_explained():
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict as put

    model = torch.nn.Linear(32, 16)
    optimizer = AutomagicCameAMP8bit(model.parameters(), **SMALL)
    run(optimizer, range(1, 3))
    flat, plain = StateDictOptions(flatten_optimizer_state_dict=True), StateDictOptions()
    in_flat = get_optimizer_state_dict(model, optimizer, options=flat)
    in_groups = get_optimizer_state_dict(model, optimizer, options=plain)
    before = copy.deepcopy(optimizer.state_dict())
    run(optimizer, range(3, 7))
    with pytest.raises(ValueError, match=r"within its warm-up and lacks walk: .* give it a new optimizer"):
        put(model, optimizer, in_flat, options=flat)
    put(model, optimizer, in_groups, options=plain)
    assert same(optimizer.state_dict(), before)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_codes_that_a_distributed_checkpoint_casts_are_no_momentum(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = torch.nn.Linear(32, 16)
    optimizer, other = (AutomagicCameAMP8bit(model.parameters(), **SMALL | {"optim_bits": bits}) for bits in (8, 32))
    set_gradients(list(model.parameters()), 1)
    optimizer.step()
    optimizer.zero_grad()
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
    state = {"optimizer": get_optimizer_state_dict(model, other)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    for bits in (8, 32):  # 8 as saved, 32 as an error might tempt one to set
        state["optimizer"]["param_groups"][0]["automagic_optim_bits"] = bits
        with pytest.raises(ValueError, match="codes of 8 bits in place of its momentum"):
            set_optimizer_state_dict(model, other, state["optimizer"])


def test_the_distributed_checkpoint_api(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    def model_and_optimizer():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 4)).bfloat16()
        return model, AutomagicCameAMP8bit(
            model.parameters(), **SMALL | {"warmup_steps": 10, "percentile_clipping": 90}
        )

    def steps(model, optimizer, numbers):
        for number in numbers:
            set_gradients(list(model.parameters()), number)
            optimizer.step()
        optimizer.zero_grad()

    # The first step of the fresh optimizer makes what only a warm-up needs; a later checkpoint has it no more.
    partial = dcp.DefaultLoadPlanner(allow_partial_load=True)
    for flat, saved_at, planner in ((False, 3, None), (True, 3, None), (False, 12, partial), (True, 12, partial)):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model, optimizer = model_and_optimizer()
        steps(model, optimizer, range(1, 1 + saved_at))
        weights, state = get_state_dict(model, optimizer, options=options)
        assert optimizer.param_groups[0]["automagic_log_rate_scale"] > FIRST
        path = tmp_path / f"{flat}{saved_at}"
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path, no_dist=True)

        fresh, fresh_optimizer = model_and_optimizer()
        before = [p.detach().clone() for p in fresh.parameters()]
        weights, state = get_state_dict(fresh, fresh_optimizer, options=options)
        assert same(before, [p.detach() for p in fresh.parameters()])
        both = {"model": weights, "optimizer": state}
        dcp.load(both, checkpoint_id=path, planner=planner, no_dist=True)
        set_state_dict(fresh, fresh_optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
        later = range(1 + saved_at, 4 + saved_at)
        steps(model, optimizer, later)
        steps(fresh, fresh_optimizer, later)
        assert same(snapshot(fresh_optimizer), snapshot(optimizer))
