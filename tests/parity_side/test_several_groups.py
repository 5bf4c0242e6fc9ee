"""A run with several parameter groups goes on in `optax.partition`, one transformation for each, and back."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from automagic_core.arrays.group_keys import SEARCH_KEYS
from automagic_core.convert import convert
from automagic_optax import automagic_8bit, from_torch_state, load_state_file, save_state_file, to_torch_state
from automagic_torch import AutomagicCameAMP8bit

pytestmark = pytest.mark.compiled_quickly
GROUPS = {
    "plain": {"lr": 1e-4, "weight_decay": 0.0, "percentile_clipping": 90, "warmup_steps": 2},
    "fast": {"lr": 5e-4, "max_lr": 1e-2, "factored": "none", "warmup_steps": 20},
}
SHAPES = {"plain": {"down": (16, 40), "bias": (16,)}, "fast": {"up": (40, 16)}}
COMMON = {"force_8bit": True, "min_8bit_size": 256, "torque_decay": 0.5}
LABELS = {"down": "plain", "bias": "plain", "up": "fast"}


def torch_side():
    rng = np.random.default_rng(0)
    params = {
        group: {name: torch.nn.Parameter(torch.tensor(rng.standard_normal(s), dtype=torch.float32)) for name, s in of}
        for group, of in ((group, shapes.items()) for group, shapes in SHAPES.items())
    }
    groups = [{"params": list(params[group].items()), **fields} for group, fields in GROUPS.items()]
    return AutomagicCameAMP8bit(groups, **COMMON), {k: p for of in params.values() for k, p in of.items()}


def gradients(step):
    rng = np.random.default_rng(step)
    return {k: rng.standard_normal(s).astype(np.float32) for of in SHAPES.values() for k, s in of.items()}


def take(optimizer, params, steps):
    for step in steps:
        for name, g in gradients(step).items():
            params[name].grad = torch.from_numpy(g)
        optimizer.step()


def numbers(params):
    return {name: jnp.asarray(p.detach().numpy().copy()) for name, p in params.items()}


def part(params, group):
    """As `optax.partition` hands them to a group's transformation."""
    return {k: w if LABELS[k] == group else optax.MaskedNode() for k, w in params.items()}


def transformation():
    each = {
        group: automagic_8bit(fields["lr"], layout="torch", **COMMON, **{k: v for k, v in fields.items() if k != "lr"})
        for group, fields in GROUPS.items()
    }
    return optax.partition(each, LABELS)


def filled(state, inner):
    """The partition's state with one state for each group."""
    return state._replace(inner_states={k: old._replace(inner_state=inner[k]) for k, old in state.inner_states.items()})


@pytest.fixture(scope="module")
def carried():
    """After three steps in PyTorch and four more in JAX."""
    optimizer, torch_params = torch_side()
    take(optimizer, torch_params, range(3))
    saved, params, tx = copy.deepcopy(optimizer.state_dict()), numbers(torch_params), transformation()
    states = {g: from_torch_state(saved, part(params, g), group=i) for i, g in enumerate(GROUPS)}
    state = filled(tx.init(params), states)
    update = jax.jit(tx.update)
    for step in range(3, 7):
        updates, state = update({k: jnp.asarray(g) for k, g in gradients(step).items()}, state, params)
        params = optax.apply_updates(params, updates)
    return optimizer, torch_params, saved, params, state


def test_it_goes_on_as_in_pytorch_and_back(carried):
    optimizer, torch_params, saved, params, state = carried
    inner = {k: s.inner_state for k, s in state.inner_states.items()}
    back = saved
    for i, group in enumerate(GROUPS):
        before = copy.deepcopy(back)
        back = to_torch_state(inner[group], part(params, group), like=back, group=i)
        other = before["param_groups"][1 - i]["params"]
        assert all(back["state"][key].keys() == before["state"][key].keys() for key in other)
        assert back["param_groups"][1 - i]["automagic_step"] == before["param_groups"][1 - i]["automagic_step"]
    take(optimizer, torch_params, range(3, 7))
    begun = numbers(torch_side()[1])
    for name, ours in params.items():
        theirs, start = torch_params[name].detach().numpy(), np.asarray(begun[name])
        # Parameters move by some ten thousandths of their size, so their own rounding is up to 5e-4 of that.
        moved = np.linalg.norm(theirs - start)
        assert np.linalg.norm(np.asarray(ours) - theirs) < 1e-3 * moved, name
    fresh, fresh_params = torch_side()
    fresh.load_state_dict(back)
    assert [g["automagic_step"] for g in fresh.param_groups] == [7, 7]
    for group, theirs in zip(fresh.param_groups, optimizer.param_groups, strict=True):
        assert group["lr"] == theirs["lr"]
        # What the search finds depends on the steps, and so on codes that may be neighbours, as the parameters do.
        for key in SEARCH_KEYS:
            torch.testing.assert_close(group[key], theirs[key], rtol=1e-3, atol=0)
    for name, p in fresh_params.items():
        assert fresh.state[p].keys() == optimizer.state[torch_params[name]].keys()


def test_groups_of_a_file(carried, tmp_path):
    _, _, saved, _, _ = carried
    torch.save(saved, tmp_path / "run.pt")
    convert(tmp_path / "run.pt", tmp_path / "run.safetensors")
    params, path = numbers(torch_side()[1]), tmp_path / "run.safetensors"
    for i, group in enumerate(GROUPS):
        loaded = load_state_file(path, part(params, group), group=i, layout="torch")
        assert loaded.lr == GROUPS[group]["lr"]
        save_state_file(path, loaded.opt_state, part(params, group), like=path, group=i, layout="torch")
    convert(path, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    for key, states in saved["state"].items():
        assert back["state"][key].keys() == states.keys()
        assert all(torch.equal(back["state"][key][name], value) for name, value in states.items())
    torch_side()[0].load_state_dict(back)


def test_which_group_must_be_said(carried):
    _, _, saved, params, _ = carried
    with pytest.raises(ValueError, match=r"2 parameter groups.*group=0 to 1"):
        from_torch_state(saved, params)
    with pytest.raises(ValueError, match=r"group = 2: the state dict has 2"):
        from_torch_state(saved, params, group=2)
    with pytest.raises(ValueError, match=r"group = -1"):
        from_torch_state(saved, params, group=-1)
    with pytest.raises(ValueError, match=r"cannot tell which leaf.*PyTorch: down, bias"):
        from_torch_state(saved, params, group=0)
