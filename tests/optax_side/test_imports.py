"""What `automagic_optax` may import: not PyTorch, and nothing that it does not need."""

from __future__ import annotations

import subprocess
import sys

MARKS = "{'lora': ['lora_a'], 'embedding': ['wte']} False"
BLOCK = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # an import of it now raises ImportError
"""
USE = """
import jax.numpy as jnp
import automagic_optax
tx = automagic_optax.automagic_8bit(1e-4)
weights = {"scale": jnp.ones(())}
updates, state = tx.update(weights, tx.init(weights), weights)
automagic_optax.memory_report(automagic_optax.finish_warmup(state))
print("works", float(updates["scale"]) < 0)
loaded = {name.partition(".")[0] for name in sys.modules if sys.modules[name] is not None}
print("automagic_torch" in loaded, "torch" in loaded, "bitsandbytes" in loaded)
found = automagic_optax.found_marks({"lora_a": jnp.ones((4, 2)), "wte": jnp.ones((9, 4))})
print(found, bool(sys.modules.get("flax.nnx")))
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_without_torch_and_without_flax() -> None:
    blocked = ("torch", "bitsandbytes", "automagic_torch", "flax")
    check = "\ntry:\n    import torch\nexcept ImportError:\n    print('blocked')\n"
    printed = run(BLOCK.format(blocked=blocked) + check + USE)
    assert printed.splitlines() == ["blocked", "works True", "False False False", MARKS]


def test_does_not_import_torch_and_nnx_where_they_are_installed() -> None:
    assert run("import sys\n" + USE).splitlines() == ["works True", "False False False", MARKS]


def test_every_public_name_is_there() -> None:
    import automagic_optax

    assert len(set(automagic_optax.__all__)) == len(automagic_optax.__all__)
    for name in automagic_optax.__all__:
        assert getattr(automagic_optax, name) is not None
        assert name == "Config" or getattr(automagic_optax, name).__doc__
