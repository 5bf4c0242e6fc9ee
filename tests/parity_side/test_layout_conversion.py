"""A whole model's state from torch's layout to Flax's and back: what it means, and what is refused."""

import copy
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from automagic_core import axes_between
from automagic_optax import QuantizedArray, automagic_8bit, dequantize, from_torch_state, peft_name, to_torch_state
from automagic_optax.cameamp.find_states import parts_of
from automagic_optax.moving.neutral_state import flat_states
from automagic_optax.stages.suppress_edges import SuppressEdgesState
from automagic_torch import AutomagicCameAMP8bit

pytestmark = pytest.mark.compiled_quickly
FIELDS = {"force_8bit": True, "min_8bit_size": 256, "warmup_steps": 4, "torque_decay": 0.5, "max_lr": 1e-2}
FIELDS |= {"lr_mask_gain": 0.2}
MODULE = "base_model.model.h.0."
SHAPES = {
    "wte.weight": (30, 12),
    "c_attn.lora_A.default.weight": (4, 70),
    "c_attn.lora_B.default.weight": (96, 4),
    "conv.weight": (72, 8, 3, 3),  # not narrow
    "conv1d.weight": (4, 100, 3),  # narrow, the long statistic has two blocks
    "conv3d.weight": (4, 8, 2, 3, 3),  # narrow, the long statistic has one block
    "conv.bias": (72,),
    "gain": (),
}
PATHS = {
    "wte.embedding": "wte.weight",
    "c_attn.lora_a": "c_attn.lora_A.default.weight",
    "c_attn.lora_b": "c_attn.lora_B.default.weight",
    "conv.kernel": "conv.weight",
    "conv1d.kernel": "conv1d.weight",
    "conv3d.kernel": "conv3d.weight",
    "conv.bias": "conv.bias",
    "gain": "gain",
}


def names(path):
    return peft_name(path)


def axes_of(path, ndim):
    return axes_between(ndim, "torch", "flax", embedding=path.endswith("embedding"))


def torch_run(steps, layout="torch", **fields):
    """A run whose gradients mean the same in either layout."""
    rng = np.random.default_rng(0)
    turn = {
        theirs: (axes_of(path, len(SHAPES[theirs])) if layout == "flax" else None) for path, theirs in PATHS.items()
    }
    params = {}
    for name, shape in SHAPES.items():
        p = torch.nn.Parameter(_tensor(rng.standard_normal(shape), turn[name]))
        p._is_embedding, p._is_lora_layer = name.startswith("wte"), "lora" in name
        params[MODULE + name] = p
    optimizer = AutomagicCameAMP8bit(params.items(), lr=1e-3, layout=layout, **(FIELDS | fields))
    for _ in range(steps):
        for name, shape in SHAPES.items():
            params[MODULE + name].grad = _tensor(rng.standard_normal(shape), turn[name])
        optimizer.step()
    return optimizer


def _tensor(x, axes):
    x = np.asarray(x, np.float32)
    return torch.tensor(np.array(x if axes is None else x.transpose(axes)))


def flax_tree(optimizer):
    group = optimizer.param_groups[0]
    tree = {}
    for path, theirs in PATHS.items():
        array = group["params"][group["param_names"].index(MODULE + theirs)].detach().numpy()
        *modules, leaf = path.split(".")
        module = tree.setdefault("h", {}).setdefault("0", {})
        for part in modules:
            module = module.setdefault(part, {})
        module[leaf] = jnp.array(array.transpose(axes_of(path, array.ndim)))
    return tree


@pytest.mark.parametrize("steps", [3, 6])  # within the warm-up, and after it
@pytest.mark.parametrize("factored", ["none", "second_moment", "all"])
def test_the_state_is_that_of_a_run_in_the_other_layout(steps, factored):
    # The signs of the walk follow the order in memory, so no search.
    fields = {"optim_bits": 32, "factored": factored, "percentile_clipping": 90, "search_gain": 0.0}
    optimizer = torch_run(steps, **fields)
    params = flax_tree(optimizer)
    told = []
    carried = from_torch_state(optimizer.state_dict(), params, names=names, layout="flax", told=told)
    assert told == []
    native = torch_run(steps, layout="flax", **fields).state_dict()
    same = from_torch_state(native, params, names=names, layout="flax")
    for ours, theirs in zip(flat_states(carried, params), flat_states(same, params), strict=True):
        assert ours.keys() == theirs.keys()
        for state, value in theirs.items():
            # Two runs of float32 sums in another order; states are averages of values around 1.
            np.testing.assert_allclose(ours[state], value, rtol=2e-4, atol=2e-5, err_msg=state)
    back = to_torch_state(carried, params, optimizer.state_dict(), names=names, layout="flax")
    _assert_equal(back, optimizer.state_dict())


def _assert_equal(ours, theirs):
    assert ours["state"].keys() == theirs["state"].keys()
    for index, states in theirs["state"].items():
        assert ours["state"][index].keys() == states.keys()
        for state, value in states.items():
            assert ours["state"][index][state].dtype == value.dtype
            assert torch.equal(ours["state"][index][state], value), state


@pytest.mark.parametrize("steps", [3, 6])
def test_8bit_states_are_rounded_again_and_that_is_told(steps, caplog):
    optimizer = torch_run(steps)
    params, told = flax_tree(optimizer), []
    with caplog.at_level(logging.WARNING, "automagic_optax"):
        carried = from_torch_state(optimizer.state_dict(), params, names=names, layout="flax", told=told)
    assert [record.getMessage() for record in caplog.records] == told
    listed = {sentence.split()[1]: set(re.findall(r"(\S+) \d\.\d\d %", sentence)) for sentence in told}
    # wte and the long statistics of the two factors keep their order, the long statistic of conv3d has one block.
    whole = {
        "h.0." + name for name in ("c_attn.lora_a", "c_attn.lora_b", "conv.kernel", "conv1d.kernel", "conv3d.kernel")
    }
    expected = {"exp_avg": whole, "exp_avg_sq_col": {"h.0.conv1d.kernel"}, "exp_avg_res": {"h.0.conv.kernel"}}
    assert listed == (expected | {"s": whole} if steps == 3 else expected)
    same = from_torch_state(optimizer.state_dict(), _as_in_torch(params, optimizer), names=names)
    (moved, kept) = (flat_states(carried, params), flat_states(same, params))
    wte = next(i for i, path in enumerate(_paths(params)) if path.endswith("wte.embedding"))
    assert isinstance(carried[-2].exp_avg["h"]["0"]["wte"]["embedding"], QuantizedArray)
    for state, value in kept[wte].items():
        np.testing.assert_array_equal(moved[wte][state], value)
    conv = carried[-2].exp_avg["h"]["0"]["conv"]["kernel"], same[-2].exp_avg["h"]["0"]["conv"]["kernel"]
    new, old = dequantize(conv[0]), jnp.transpose(dequantize(conv[1]), (2, 3, 1, 0))
    error = float(jnp.linalg.norm(new - old) / jnp.linalg.norm(old))
    assert f"h.0.conv.kernel {100 * error:.2f} %" in "".join(told)
    assert 0 < error < 0.03  # a stochastic step of the codebook is 1.4 to 3.6 % of a value
    for name, axes in (("conv1d", (2, 1, 0)), ("conv3d", (2, 3, 4, 1, 0))):
        ours, theirs = (run[-2].exp_avg_sq["h"]["0"][name]["kernel"].column for run in (carried, same))
        new, old = dequantize(ours), jnp.transpose(dequantize(theirs), axes)
        # Within a stochastic step, as above; one block keeps its codes.
        assert float(jnp.linalg.norm(new - old)) <= (0.03 if name == "conv1d" else 0) * float(jnp.linalg.norm(old))
    (edges,) = parts_of(carried, SuppressEdgesState)
    assert edges.edge_history["h"]["0"]["conv"]["kernel"].shape == (1, 1, 1, 72)


def _paths(params):
    return [".".join(str(k.key) for k in path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


def _as_in_torch(params, optimizer):
    def back(path, leaf):
        return jnp.transpose(leaf, np.argsort(axes_of(str(path[-1].key), leaf.ndim)))

    return jax.tree_util.tree_map_with_path(back, params)


@pytest.mark.slow  # compiles a whole step
def test_the_step_that_follows_is_the_one_that_torch_would_take():
    # 32 bits and no rounding of parameters: both sides compute the same step, up to the order of float32 sums.
    fields = {"optim_bits": 32, "warmup_steps": 10}
    optimizer = torch_run(3, **fields)
    params = flax_tree(optimizer)
    state = from_torch_state(optimizer.state_dict(), params, names=names, layout="flax")
    tx = automagic_8bit(1e-3, layout="flax", **(FIELDS | fields))
    group, rng = optimizer.param_groups[0], np.random.default_rng(9)
    before = [p.detach().clone() for p in group["params"]]
    for p in group["params"]:
        p.grad = torch.tensor(rng.standard_normal(p.shape).astype(np.float32))
    gradients = jax.tree_util.tree_unflatten(
        jax.tree.structure(params),
        [_grad(optimizer, path) for path in _paths(params)],
    )
    updates, _ = jax.jit(tx.update)(gradients, state, params)
    optimizer.step()
    for path, update in zip(_paths(params), jax.tree.leaves(updates), strict=True):
        index = group["param_names"].index(peft_name(path))
        moved = (group["params"][index] - before[index]).detach().numpy()
        expected = moved.transpose(axes_of(path, moved.ndim))
        # Updates of about 1e-3 on weights of about 1, whose float32 difference is exact to 1e-7.
        np.testing.assert_allclose(update, expected, atol=4e-7, rtol=1e-3, err_msg=path)


def _grad(optimizer, path):
    group = optimizer.param_groups[0]
    g = group["params"][group["param_names"].index(peft_name(path))].grad.numpy()
    return jnp.array(g.transpose(axes_of(path, g.ndim)))


def test_the_way_back_loads_into_torch():
    optimizer = torch_run(3)
    params = flax_tree(optimizer)
    carried = from_torch_state(optimizer.state_dict(), params, names=names, layout="flax")
    fresh, told = torch_run(0), []
    back = to_torch_state(carried, params, fresh.state_dict(), names=names, layout="flax", told=told)
    assert len(told) == 4
    fresh.load_state_dict(back)
    # Rounded twice: within two stochastic steps of the codebook.
    for array, name in (("conv", "exp_avg"), ("conv", "exp_avg_res"), ("conv1d", "exp_avg_sq_col")):
        a, b = (_decoded(o, f"{MODULE}{array}.weight", name) for o in (fresh, optimizer))
        assert 0 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.05


def _decoded(optimizer, parameter, state):
    from automagic_core.codec.numpy_codec import decode

    group = optimizer.param_groups[0]
    states = optimizer.state[group["params"][group["param_names"].index(parameter)]]
    return decode(states[state].numpy(), states[state + "_absmax"].numpy(), state == "exp_avg", 256)


def test_shapes_that_do_not_fit_are_refused_by_name():
    optimizer = torch_run(2)
    params, saved = flax_tree(optimizer), optimizer.state_dict()
    # The layout is all that differs, so the message names it.
    with pytest.raises(ValueError, match=r"h\.0\.c_attn\.lora_a of shape \(70, 4\) .*\(4, 70\): all .*layout='flax'"):
        from_torch_state(saved, params, names=names)
    with pytest.raises(ValueError, match=r"h\.0\.wte\.embedding of shape \(30, 12\).*embedding= or axes="):
        from_torch_state(saved, params, names=names, layout="flax", embedding=lambda path, leaf: False)
    with pytest.raises(ValueError, match=r"h\.0\.gain is named 'nose'"):
        from_torch_state(saved, params, names=lambda path: "nose" if "gain" in path else names(path), layout="flax")
    with pytest.raises(ValueError, match=r"axes = \(0, 1\) of h\.0\.conv\.kernel are no permutation of its 4 axes"):
        from_torch_state(saved, params, names=names, layout="flax", axes={"h.0.conv.kernel": (0, 1)})
    with pytest.raises(ValueError, match=r"layout = 'keras'"):
        from_torch_state(saved, params, names=names, layout="keras")
    broken = copy.deepcopy(saved)
    broken["state"][3]["lr_mask"] = broken["state"][3]["lr_mask"].to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"lr_mask of base_model.*conv\.weight has a dtype"):
        from_torch_state(broken, params, names=names, layout="flax")


def test_axes_given_by_hand_go_both_ways():
    # (out, in, h, w) kept as (h, w, out, in): rows are inputs in Flax's layout.
    optimizer = torch_run(3, optim_bits=32)
    params = flax_tree(optimizer)
    kernel = params["h"]["0"]["conv"]
    kernel["kernel"] = kernel["kernel"].transpose(0, 1, 3, 2)
    axes, told = {"h.0.conv.kernel": (2, 3, 0, 1)}, []
    carried = from_torch_state(optimizer.state_dict(), params, names=names, layout="flax", axes=axes, told=told)
    assert carried[-2].lr_mask["h"]["0"]["conv"]["kernel"].shape == (1, 1, 1, 8)
    assert any("walk keeps only its length" in sentence and "h.0.conv.kernel" in sentence for sentence in told)
    walk = optimizer.state_dict()["state"][3]["walk"].numpy()
    np.testing.assert_allclose(
        np.linalg.norm(carried[-2].walk["h"]["0"]["conv"]["kernel"]), np.linalg.norm(walk), rtol=1e-6
    )
    assert any("lr_mask goes on at its mean" in sentence and "h.0.conv.kernel" in sentence for sentence in told)
    back = to_torch_state(
        carried, params, torch_run(0, optim_bits=32).state_dict(), names=names, layout="flax", axes=axes
    )
    assert torch.equal(back["state"][3]["exp_avg"], optimizer.state_dict()["state"][3]["exp_avg"])
    assert back["state"][3]["lr_mask"].shape == (72, 1, 1, 1)


def test_peft_names():
    assert peft_name("h.0.attn.c_attn.lora_a") == "base_model.model.h.0.attn.c_attn.lora_A.default.weight"
    assert peft_name("c.lora.lora_b", adapter="mine", prefix="") == "c.lora_B.mine.weight"
    assert peft_name("norm.scale", prefix="") == "norm.weight"
    assert peft_name("conv.bias", prefix="m.") == "m.conv.bias"
    assert peft_name("wte.lora_embedding_a", prefix="") == "wte.lora_embedding_A.default"
