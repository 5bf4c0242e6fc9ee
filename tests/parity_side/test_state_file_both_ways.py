"""A run goes from PyTorch through a neutral file to JAX, and through another one back."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from automagic_core import Config
from automagic_core.convert import convert
from automagic_core.moving.state_file import read_groups, write_groups
from automagic_optax import automagic_8bit, load_state_file, peft_name, save_state_file
from automagic_optax.moving.neutral_state import flat_states
from automagic_torch import AutomagicCameAMP8bit

pytestmark = pytest.mark.compiled_quickly
FIELDS = {"force_8bit": True, "min_8bit_size": 256, "warmup_steps": 4, "torque_decay": 0.5}
# In this order in PyTorch; JAX sorts its keys.
SHAPES = {
    "wte.weight": (30, 12),
    "lora_A.default.weight": (20, 70),
    "dense.weight": (20, 20),
    "conv.weight": (8, 6, 3, 3),
}


def names(path):
    return peft_name(path, prefix="")


def torch_run(steps, **fields):
    torch.manual_seed(0)
    params = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    params["wte.weight"]._is_embedding = True
    optimizer = AutomagicCameAMP8bit(params.items(), lr=5e-4, **(FIELDS | fields))
    for _ in range(steps):
        for p in params.values():
            p.grad = torch.randn(p.shape)
        optimizer.step()
    return optimizer


def tree(layout):
    def array(name):
        shape = SHAPES[name]
        order = (2, 3, 1, 0)[4 - len(shape) :] if layout == "flax" and "wte" not in name else range(len(shape))
        order = (1, 0) if layout == "flax" and len(shape) == 2 and "wte" not in name else order
        return jnp.zeros(tuple(shape[axis] for axis in order))

    return {
        "conv": {"kernel": array("conv.weight")},
        "dense": {"kernel": array("dense.weight")},
        "lora_a": array("lora_A.default.weight"),
        "wte": {"embedding": array("wte.weight")},
    }


@pytest.fixture
def checkpoint(tmp_path):
    def saved(steps, **fields):
        optimizer = torch_run(steps, **fields)
        torch.save(optimizer.state_dict(), tmp_path / "run.pt")
        convert(tmp_path / "run.pt", tmp_path / "run.safetensors")
        return optimizer.state_dict()

    return saved


@pytest.mark.parametrize("steps", [3, 6])
@pytest.mark.parametrize(("layout", "fields"), [("torch", {}), ("flax", {"optim_bits": 32, "factored": "none"})])
def test_every_bit_comes_back(checkpoint, tmp_path, steps, layout, fields):
    saved = checkpoint(steps, percentile_clipping=90, **fields)
    params = tree(layout)
    loaded = load_state_file(tmp_path / "run.safetensors", params, names=names, layout=layout)
    assert (loaded.lr, loaded.told) == (5e-4, [])
    tx = automagic_8bit(loaded.lr, layout=layout, **loaded.fields)
    fresh = jax.eval_shape(tx.init, params)
    if steps == 3:
        assert jax.tree.structure(fresh) == jax.tree.structure(loaded.opt_state)
    like = tmp_path / "run.safetensors"
    save_state_file(tmp_path / "jax.safetensors", loaded.opt_state, params, like=like, names=names, layout=layout)
    convert(tmp_path / "jax.safetensors", tmp_path / "back.pt", layout="torch")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back["param_groups"][0].keys() == saved["param_groups"][0].keys() - {"effective_lr"}
    assert back["param_groups"][0]["param_names"] == list(SHAPES)
    for index, states in saved["state"].items():
        assert back["state"][index].keys() == states.keys()
        for name, value in states.items():
            assert torch.equal(back["state"][index][name], value), name
    torch_run(0, percentile_clipping=90, **fields).load_state_dict(back)


def test_a_run_that_began_in_jax(tmp_path):
    params, config = tree("flax"), Config(lr=lambda step: 1e-3 / (1 + step), **FIELDS)
    fields = {name: value for name, value in config.__dict__.items() if name != "lr"}
    state = automagic_8bit(config.lr, **fields).init(params)
    path = tmp_path / "jax.safetensors"
    with pytest.raises(ValueError, match="give config= or like="):
        save_state_file(path, state, params)
    save_state_file(path, state, params, config, names=names)
    (group,) = read_groups(path)
    assert (group.fields["lr"], group.layout, group.step) == (1e-3, "flax", 0)
    assert sorted(array.name for array in group.arrays) == sorted(SHAPES)
    assert {array.name for array in group.arrays if array.embedding} == {"wte.weight"}
    # JAX's order is another: the checkpoint takes that of the run in PyTorch.
    torch.save(torch_run(0).state_dict(), tmp_path / "like.pt")
    convert(path, tmp_path / "back.pt", layout="torch", like=tmp_path / "like.pt")
    optimizer = torch_run(0)
    optimizer.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True))
    with pytest.raises(ValueError, match=r"the state of conv\.kernel lacks exp_avg_sq"):
        save_state_file(path, state, params, Config(**FIELDS, factored="none"))


def test_marks_that_differ_are_refused_or_told(checkpoint, tmp_path):
    checkpoint(3)
    path, params = tmp_path / "run.safetensors", tree("flax")
    with pytest.raises(ValueError, match=r"wte\.weight is an embedding in the file and no embedding in params"):
        load_state_file(path, params, names=names, embedding=lambda path, leaf: False)
    told = load_state_file(path, params, names=names, lora=lambda path, leaf: False).told
    assert "no adapter here, other than in the file (lora_A.default.weight)" in told
    convert(path, path, layout="flax")
    with pytest.raises(
        ValueError, match=r"(conv|dense)\.weight is no embedding in the file and an embedding in params"
    ):
        load_state_file(path, params, names=names, embedding=lambda path, leaf: True)
    (group,) = read_groups(path)
    write_groups(path, [group, dataclasses.replace(group)])
    with pytest.raises(ValueError, match="has 2 parameter groups"):
        load_state_file(path, params, names=names)


def test_an_nnx_state_is_filled_too(checkpoint, tmp_path):
    checkpoint(3)
    params = tree("flax")
    state = nnx.State(jax.tree.map(nnx.Param, params))
    path = tmp_path / "run.safetensors"
    plain = load_state_file(path, params, names=names).opt_state
    held = load_state_file(path, state, names=names).opt_state
    for ours, theirs in zip(flat_states(held, state), flat_states(plain, params), strict=True):
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], value)
    save_state_file(tmp_path / "nnx.safetensors", held, state, like=path, names=names)
    save_state_file(tmp_path / "plain.safetensors", plain, params, like=path, names=names)
    a, b = (read_groups(tmp_path / f"{name}.safetensors")[0] for name in ("nnx", "plain"))
    assert [array.name for array in a.arrays] == [array.name for array in b.arrays] == list(SHAPES)


@pytest.mark.slow
def test_neither_side_needs_the_other(checkpoint, tmp_path):
    saved = checkpoint(3)
    code = """
import sys
for name in ("torch", "bitsandbytes", "automagic_torch"):
    sys.modules[name] = None
import jax.numpy as jnp
from automagic_optax import load_state_file, save_state_file
source, target = sys.argv[1:]
params = [jnp.zeros((30, 12)), jnp.zeros((20, 70)), jnp.zeros((20, 20)), jnp.zeros((8, 6, 3, 3))]
names = ["wte.weight", "lora_A.default.weight", "dense.weight", "conv.weight"]
marks = [True, False, False, False]
loaded = load_state_file(source, params, names=names, layout="torch", embedding=marks)
save_state_file(target, loaded.opt_state, params, like=source, names=names, layout="torch", embedding=marks)
"""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(tmp_path / "run.safetensors"), str(tmp_path / "jax.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    assert done.returncode == 0, done.stderr
    block = "import sys\nfor name in ('jax', 'jaxlib', 'optax', 'flax', 'automagic_optax'): sys.modules[name] = None\n"
    run = block + "from automagic_core.convert import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", run, str(tmp_path / "jax.safetensors"), str(tmp_path / "back.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    assert done.returncode == 0, done.stderr
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    for index, states in saved["state"].items():
        for name, value in states.items():
            assert torch.equal(back["state"][index][name], value)
