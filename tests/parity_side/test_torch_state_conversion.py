"""States carried from PyTorch to JAX and back: bit for bit, and refused by name where they do not fit."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from automagic_core.arrays.group_keys import SEARCH_KEYS
from automagic_optax import QuantizedArray, ScaleByCameampState, automagic_8bit, from_torch_state, to_torch_state
from automagic_optax.arrays.containers import pure
from automagic_optax.cameamp.find_states import parts_of
from automagic_torch import AutomagicCameAMP8bit
from tests.optax_side.arrays.test_containers import CONTAINERS

pytestmark = pytest.mark.compiled_quickly
FIELDS = {"force_8bit": True, "min_8bit_size": 512, "warmup_steps": 4, "torque_decay": 0.5}
SHAPES = {"layer.kernel": (72, 80), "layer.bias": (72,), "head.kernel": (8, 40), "adapter.kernel": (8, 80)}
# A narrow array in 32 bits, and one whose long statistic has 8.


def torch_run(steps, named=True, **fields):
    torch.manual_seed(0)
    params = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    optimizer = AutomagicCameAMP8bit(params.items() if named else params.values(), lr=1e-3, **(FIELDS | fields))
    for _ in range(steps):
        for p in params.values():
            p.grad = torch.randn(p.shape)
        optimizer.step()
    tree = {"layer": {"kernel": params["layer.kernel"], "bias": params["layer.bias"]}}
    tree |= {module: {"kernel": params[f"{module}.kernel"]} for module in ("head", "adapter")}
    return optimizer, jax.tree.map(lambda p: jnp.asarray(p.detach().numpy()), tree)


def cameamp(opt_state):
    (found,) = parts_of(opt_state, ScaleByCameampState)
    return found


@pytest.mark.parametrize("steps", [2, 6])  # within the warm-up, and after it
@pytest.mark.parametrize(
    "fields", [{"percentile_clipping": 90}, {"factored": "none"}, {"factored": "all"}, {"optim_bits": 32}]
)
def test_there_and_back_keeps_every_bit(steps, fields):
    optimizer, params = torch_run(steps, **fields)
    saved = copy.deepcopy(optimizer.state_dict())
    fresh, _ = torch_run(0, **fields)
    back = to_torch_state(from_torch_state(saved, params), params, like=fresh.state_dict())
    assert back["param_groups"][0]["automagic_step"] == steps
    shared = {*SEARCH_KEYS, "automagic_norm_history", "automagic_norm_position"}
    for name in shared & saved["param_groups"][0].keys():
        assert torch.equal(back["param_groups"][0][name], saved["param_groups"][0][name])
    for index, states in saved["state"].items():
        assert back["state"][index].keys() == states.keys()
        for name, value in states.items():
            assert back["state"][index][name].dtype == value.dtype
            assert torch.equal(back["state"][index][name], value), name
    fresh.load_state_dict(back)


def test_the_state_has_the_structure_of_init():
    optimizer, params = torch_run(2)
    config = {name: value for name, value in FIELDS.items() if name != "lr"}
    state = automagic_8bit(1e-3, layout="torch", **config).init(params)
    carried = from_torch_state(optimizer.state_dict(), params)
    assert jax.tree.structure(state) == jax.tree.structure(carried)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), carried)
    assert isinstance(cameamp(carried).exp_avg["layer"]["kernel"], QuantizedArray)
    assert isinstance(cameamp(carried).exp_avg_sq["adapter"]["kernel"].column, QuantizedArray)
    assert cameamp(carried).exp_avg_res["adapter"]["kernel"].column is None


@pytest.mark.parametrize("container", CONTAINERS)
def test_parameters_in_containers(container):
    optimizer, params = torch_run(2, percentile_clipping=90)
    boxed = jax.tree.map(lambda x: CONTAINERS[container](x, tuple("ab"[: x.ndim])), params)
    saved = optimizer.state_dict()
    carried = from_torch_state(saved, boxed)
    for a, b in zip(jax.tree.leaves(carried), jax.tree.leaves(from_torch_state(saved, params)), strict=True):
        np.testing.assert_array_equal(a, b)
    fields = {**FIELDS, "percentile_clipping": 90}
    assert jax.tree.structure(carried) == jax.tree.structure(automagic_8bit(1e-3, layout="torch", **fields).init(boxed))
    back = to_torch_state(carried, boxed, like=saved)
    for index, states in saved["state"].items():
        assert all(torch.equal(back["state"][index][name], value) for name, value in states.items())
    transposed = jax.tree.map(lambda x: CONTAINERS[container](x.T, tuple("ab"[: x.ndim])), params)
    flax = from_torch_state(saved, transposed, layout="flax")
    assert pure(cameamp(flax).exp_avg["layer"]["kernel"]).shape == params["layer"]["kernel"].T.shape


def test_leaves_are_found_by_name_by_position_and_on_request():
    optimizer, params = torch_run(2)
    by_name = from_torch_state(optimizer.state_dict(), params)
    unnamed, _ = torch_run(2, named=False)
    as_list = [
        params["layer"]["kernel"],
        params["layer"]["bias"],
        params["head"]["kernel"],
        params["adapter"]["kernel"],
    ]
    by_position = from_torch_state(unnamed.state_dict(), as_list)
    np.testing.assert_array_equal(
        cameamp(by_name).exp_avg_res["layer"]["kernel"].codes, cameamp(by_position).exp_avg_res[0].codes
    )
    np.testing.assert_array_equal(cameamp(by_name).exp_avg["head"]["kernel"], cameamp(by_position).exp_avg[2])
    names = {"layer": {"kernel": 0, "bias": 1}, "head": {"kernel": 2}, "adapter": {"kernel": 3}}
    on_request = from_torch_state(unnamed.state_dict(), params, names=names)
    integers = jax.tree.map(np.int64, names) | {"head": {"kernel": jnp.int32(2)}}
    for found in (on_request, from_torch_state(unnamed.state_dict(), params, names=integers)):
        for a, b in zip(jax.tree.leaves(by_name), jax.tree.leaves(found), strict=True):
            np.testing.assert_array_equal(a, b)
    for other in (2.0, np.float32(2), True, np.True_, jnp.array(True), np.array([2]), -1, 4):
        with pytest.raises(ValueError, match=r"head\.kernel is named"):
            from_torch_state(unnamed.state_dict(), params, names=names | {"head": {"kernel": other}})
    with pytest.raises(ValueError, match=r"names= is no tree like params.*adapter"):
        from_torch_state(unnamed.state_dict(), params, names={k: v for k, v in names.items() if k != "adapter"})
    with pytest.raises(ValueError, match="cannot tell which leaf"):
        from_torch_state(unnamed.state_dict(), params)
    with pytest.raises(ValueError, match=r"head\.kernel.*'nose'"):
        from_torch_state(optimizer.state_dict(), params, names={**names, "head": {"kernel": "nose"}})
    with pytest.raises(ValueError, match="one to one"):
        from_torch_state(optimizer.state_dict(), params, names={**names, "head": {"kernel": 1}})


def _with(change):
    optimizer, params = torch_run(2)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    return saved, params


MISFITS = {
    r"layer\.kernel has exp_avg of shape \(72, 80\) and uint8; expected \(72, 80\) and float32": lambda s: s["state"][
        0
    ].pop("exp_avg_absmax"),
    r"layer\.bias lacks age": lambda s: s["state"][1].pop("age"),
    # A narrow array has one statistic of the residual, and its long one of the second moment has codes.
    r"head\.kernel has unknown entries: exp_avg_res_col": lambda s: s["state"][2].update(
        exp_avg_res_col=torch.zeros(1, 40)
    ),
    r"head\.kernel lacks exp_avg_res_row": lambda s: s["state"][2].pop("exp_avg_res_row"),
    r"adapter\.kernel lacks exp_avg_sq_col_absmax": lambda s: s["state"][3].pop("exp_avg_sq_col_absmax"),
    r"adapter\.kernel has exp_avg_sq_col of shape \(1, 80\) and float32": lambda s: s["state"][3].update(
        exp_avg_sq_col=torch.zeros(1, 80)
    ),
    r"layer\.kernel has exp_avg of shape \(72, 80\) and float32; expected \(72, 80\) and uint8": lambda s: s["state"][
        0
    ].update(exp_avg=torch.zeros(72, 80)),
    r"layer\.kernel has walk of shape \(3, 1\)": lambda s: s["state"][0].update(walk=torch.zeros(3, 1)),
    "lacks betas": lambda s: s["param_groups"][0].pop("automagic_betas"),
    "2 parameter groups": lambda s: s["param_groups"].append(s["param_groups"][0]),
    "has no 'state'": lambda s: s.pop("state"),
    r"block_size = 100": lambda s: s["param_groups"][0].update(automagic_block_size=100),
}


@pytest.mark.parametrize("message", MISFITS)
def test_a_state_that_does_not_fit_is_refused_by_name(message):
    saved, params = _with(MISFITS[message])
    with pytest.raises(ValueError, match=message):
        from_torch_state(saved, params)


def test_a_missing_optimizer_state_is_refused():
    optimizer, params = torch_run(0)
    with pytest.raises(ValueError, match="found no ScaleByCameampState"):
        to_torch_state({"nothing": jnp.zeros(3)}, params, like=optimizer.state_dict())
    several = jax.vmap(automagic_8bit(1e-3).init)(jax.tree.map(lambda x: x[None], params))
    with pytest.raises(ValueError, match="of several members"):
        to_torch_state(several, params, like=optimizer.state_dict())
