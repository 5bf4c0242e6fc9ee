"""The machine, its libraries, its copy bandwidth and how it rounds: the first part of ``make gpu``."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import measuring, torch_timer
from benchmarks.gpu.measuring import Record

PACKAGES = (
    *("torch", "triton", "bitsandbytes", "torchao", "flashoptim", "came-pytorch", "prodigyopt", "numpy"),
    *("jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "flashoptim-jax", "pytest"),
)
MODULES = ("bitsandbytes", "torchao.optim", "flashoptim", "came_pytorch", "prodigyopt", "flax.nnx", "flashoptim_jax")


def versions() -> dict[str, str]:
    """Of every package that matters here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def imports() -> dict[str, str]:
    """Which modules can be imported, and why others cannot."""
    found = {}
    for name in MODULES:
        started = time.perf_counter()
        try:
            import_module(name)
            found[name] = f"ok, {time.perf_counter() - started:.1f} s"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:500]
    return found


def card(device: str) -> dict[str, Any]:
    """What torch and the driver say of the card."""
    facts: dict[str, Any] = {"cores": os.cpu_count(), "platform": platform.platform()}
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        facts |= {"name": p.name, "memory_bytes": p.total_memory, "multiprocessors": p.multi_processor_count}
        facts |= {"capability": f"{p.major}.{p.minor}", "cache_bytes": getattr(p, "L2_cache_size", None)}
        facts |= {"cuda": torch.version.cuda, "cards": torch.cuda.device_count()}
    if tool := shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.mem,power.limit"
        shown = subprocess.run([tool, query, "--format=csv"], capture_output=True, text=True, timeout=20, check=False)
        facts["nvidia_smi"] = shown.stdout.strip().splitlines()
    return facts


def copy_in_torch(device: str, elements: int) -> dict[str, Any]:
    """GB/s of a copy on the device, bytes read and written."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    found = torch_timer.timed(lambda: target.copy_(source), device)
    return found | {"GB_per_s": 8 * elements / found["ms"] / 1e6, "bytes": 8 * elements}


def copy_in_jax(elements: int) -> dict[str, Any]:
    """GB/s of a sum with a constant in JAX, bytes read and written."""
    import jax
    import jax.numpy as jnp

    add = jax.jit(lambda x: x + np.float32(1))
    x = jax.block_until_ready(jax.random.normal(jax.random.key(0), (elements,), jnp.float32))
    rounds = []
    for _ in range(3 + measuring.ROUNDS):
        started = time.perf_counter()
        for _ in range(10):
            y = add(x)
        jax.block_until_ready(y)
        rounds.append(1e2 * (time.perf_counter() - started))
    found = measuring.spread(rounds[3:])
    return found | {"GB_per_s": 8 * elements / found["ms"] / 1e6, "devices": str(jax.devices())}


def _operands() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(1_000_000).astype(np.float32) for _ in range(3))
    return a, b, c


OPERATIONS: dict[str, Callable[..., Any]] = {
    "a / b": lambda np_, a, b, c: a / b,
    "1 / b": lambda np_, a, b, c: 1 / b,
    "a / a": lambda np_, a, b, c: a / a,
    "sqrt |a|": lambda np_, a, b, c: np_.sqrt(np_.abs(a)),
    "a * b + c": lambda np_, a, b, c: a * b + c,
    "denormal products": lambda np_, a, b, c: (a * np.float32(1e-20)) * (b * np.float32(1e-20)),
    "exp": lambda np_, a, b, c: np_.exp(a),
}


def rounding(apply: Callable[[Callable[..., Any]], np.ndarray]) -> dict[str, float]:
    """Share of results that are not numpy's, by operation: numpy rounds every single one correctly but exp.

    Args:
        apply: computes an operation on `_operands` elsewhere.
    """
    with np.errstate(all="ignore"):
        expected = {name: function(np, *_operands()) for name, function in OPERATIONS.items()}
    return {
        name: float(np.mean(np.asarray(apply(function)).view(np.int32) != expected[name].view(np.int32)))
        for name, function in OPERATIONS.items()
    }


def rounding_in_torch(device: str, compiled: bool = False) -> dict[str, float]:
    """`rounding`, eager or each operation compiled."""
    operands = [torch.from_numpy(x).to(device) for x in _operands()]

    def apply(function: Callable[..., Any]) -> np.ndarray:
        operation = partial(function, torch)
        found: np.ndarray = (torch.compile(operation) if compiled else operation)(*operands).cpu().numpy()
        return found

    return rounding(apply)


def rounding_in_jax() -> dict[str, float]:
    """`rounding`, each operation one program."""
    import jax
    import jax.numpy as jnp

    operands = [jnp.asarray(x) for x in _operands()]
    return rounding(lambda function: np.asarray(jax.jit(lambda *x: function(jnp, *x))(*operands)))


def main() -> None:
    """All of it."""
    options = measuring.options(__doc__)
    record = Record(options.out)
    elements = 2**20 if options.small else 2**28
    record.tried("versions", versions)
    record.tried("card", lambda: card(options.device))
    record.tried("copy_torch", lambda: copy_in_torch(options.device, elements))
    record.tried("copy_jax", lambda: copy_in_jax(elements))
    record.tried("imports", imports)
    record.tried("rounding_torch", lambda: rounding_in_torch(options.device))
    record.tried("rounding_compiled", lambda: rounding_in_torch(options.device, compiled=True))
    record.tried("rounding_jax", rounding_in_jax)


if __name__ == "__main__":
    main()
