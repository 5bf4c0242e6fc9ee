"""Runs in an environment into which the package was installed: names, first steps, a state file and a command.

`python -I first_steps.py` sees only what is installed; it prints which frameworks took a step.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.metadata import distribution
from importlib.resources import files
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

FRAMEWORKS = {"torch": ["torch"], "jax": ["jax", "optax"]}
NEEDS = {"torch": ["automagic_torch", "automagic_cameamp_improved_8bit"], "jax": ["automagic_optax"]}
"""The packages that need a framework; automagic_core needs none."""


def public_names(package: str) -> None:
    """Every public name can be reached, and type checkers are told that the package has types."""
    module = import_module(package)
    assert "site-packages" in str(module.__file__), f"{package} is not the installed one: {module.__file__}"
    for name in module.__all__:
        getattr(module, name)
    assert files(package).joinpath("py.typed").is_file(), f"{package} has no py.typed"


def refuses_without(framework: str, package: str) -> None:
    """Without its framework a package says which module is missing."""
    missing = None
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        missing = error.name
    assert missing in FRAMEWORKS[framework], f"{package} without {framework} misses {missing}"


def step_of_torch() -> None:
    """Two steps in 8 bits where bitsandbytes is there, and the way through a checkpoint and a state file."""
    import torch

    from automagic_torch import BITSANDBYTES_AVAILABLE, AutomagicCameAMP8bit, create_improved_8bit_optimizer

    assert bool(find_spec("bitsandbytes")) == BITSANDBYTES_AVAILABLE, "bitsandbytes is installed and cannot be used"
    model = torch.nn.Linear(64, 64)
    before = model.weight.detach().clone()
    optimizer = create_improved_8bit_optimizer(
        model.named_parameters(), profile="balanced", force_8bit=BITSANDBYTES_AVAILABLE
    )
    for _ in range(2):
        model(torch.ones(4, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(model.weight).all(), "a weight is not finite"
    assert not torch.equal(model.weight, before), "no weight moved"
    if BITSANDBYTES_AVAILABLE:
        kept = [state for state in optimizer.state[model.weight].values() if isinstance(state, torch.Tensor)]
        assert any(state.dtype == torch.uint8 for state in kept), "no state has 8 bits"
    if not find_spec("safetensors"):
        return
    with tempfile.TemporaryDirectory() as folder:
        names = [Path(folder, name) for name in ("a.pt", "b.safetensors", "c.pt")]
        torch.save(optimizer.state_dict(), names[0])
        for source, target in pairwise(names):
            subprocess.run([sys.executable, "-I", "-m", "automagic_core.convert", source, target], check=True)
        again = AutomagicCameAMP8bit(model.named_parameters())
        again.load_state_dict(torch.load(names[2], weights_only=True))
    for name, state in optimizer.state[model.weight].items():
        if isinstance(state, torch.Tensor):
            assert torch.equal(state, again.state[model.weight][name]), f"{name} came back otherwise"


def step_of_jax() -> None:
    """Two steps in 8 bits by jit, of both transformations, and the way through a state file."""
    import jax
    import jax.numpy as jnp
    import optax

    from automagic_core import OptimizationProfiles
    from automagic_optax import automagic_8bit, load_state_file, quantize_state, save_state_file

    config = OptimizationProfiles.balanced()
    params = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}
    for tx in (quantize_state(optax.adamw(1e-3)), automagic_8bit(config=config)):
        state, moved = tx.init(params), params
        for _ in range(2):
            updates, state = jax.jit(tx.update)(moved, state, moved)
            moved = optax.apply_updates(moved, updates)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(moved)), "a weight is not finite"
        assert bool((moved["kernel"] != params["kernel"]).any()), "no weight moved"
        assert any(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(state)), "no state has 8 bits"
    if not find_spec("safetensors"):
        return
    with tempfile.TemporaryDirectory() as folder:
        save_state_file(Path(folder, "a.safetensors"), state, params, config)
        again = load_state_file(Path(folder, "a.safetensors"), params).opt_state
    # What is kept only to be told, as the rate in force, is not in a file; what the next step does, all of it is.
    goes_on, would_have = (jax.jit(tx.update)(moved, either, moved)[0] for either in (again, state))
    for name, update in would_have.items():
        assert bool((goes_on[name] == update).all()), f"the step after a state file is another one: {name}"


def main() -> None:
    public_names("automagic_core")
    subprocess.run(
        [sys.executable, "-I", "-m", "automagic_core.convert", "--help"], check=True, stdout=subprocess.DEVNULL
    )
    steps = {"torch": step_of_torch, "jax": step_of_jax}
    done = []
    for framework, packages in NEEDS.items():
        there = all(map(find_spec, FRAMEWORKS[framework]))
        for package in packages:
            if there:
                public_names(package)
            else:
                refuses_without(framework, package)
        if there:
            steps[framework]()
            done.append(framework)
    print("version", distribution("automagic-cameamp").version, *done)


if __name__ == "__main__":
    main()
