"""A thousand adapters are as much work to compile as a few: operations grow with the shapes, not with the arrays."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from automagic_optax import automagic_8bit
from tests.optax_side.small import find_state

SHAPES = ((16, 1280), (1280, 16), (32, 640), (640, 32))
FEW_SHAPES = SHAPES[:2]
FIELDS = {"percentile_clipping": 95, "warmup_steps": 10, "spatial_scope": "all"}
TX = automagic_8bit(1e-4, **FIELDS, lora=lambda path, leaf: True)
# What only puts arrays together and takes them apart; `call` is of the slice at a place that all arrays share.
MOVES = {"broadcast_in_dim", "call", "concatenate", "constant", "optimization_barrier", "reshape", "slice"}


def lowered(count: int, shapes: Sequence[tuple[int, int]]) -> Any:
    params = [jax.ShapeDtypeStruct(shapes[i % len(shapes)], jnp.float32) for i in range(count)]
    return jax.jit(TX.update).lower(params, jax.eval_shape(TX.init, params), params)


@cache
def operations(count: int) -> Counter[str]:
    """Of one update, before XLA optimizes it, by their names."""
    text = re.sub(r"inlineable = \"\w+\"", "", lowered(count, FEW_SHAPES).as_text())
    return Counter(re.findall(r"= \"?(?:stablehlo\.|func\.)?([a-z_]\w*)[ (\"]", text)) + Counter(
        re.findall(r"custom_call @(\w+)", text)
    )


@pytest.mark.slow  # the time to compile, not what is computed
def test_the_number_of_operations_does_not_grow_with_the_arrays() -> None:
    # Below 2¹⁸ elements a batch is not cut into chunks.
    few, many, more = operations(40), operations(60), operations(80)
    shapes = len(FEW_SHAPES)
    for found in (few, many, more):
        assert found["fft"] == 2 * shapes
        # The stage takes one Cholesky factor for each shape, and no eigenvectors.  The rank that it reports takes
        # eigenvalues, in a function for two shapes that differ in which side is the short one.
        assert found["lapack_dpotrf_ffi"] == shapes
        assert [n for name, n in found.items() if "syevd" in name or "gesdd" in name] == [shapes // 2]
        # Sums in float32 take one axis after another.
        assert 0 < found["reduce"] <= 64 * shapes
        # Ten arrays of a shape are taken out of their batch by one function, 20 slices of each.
        assert found["dynamic_slice"] <= 10 * 20 * shapes
    grown = {name for name in more if more[name] != many[name]}
    assert grown <= MOVES, {name: (many[name], more[name]) for name in grown - MOVES}
    assert {name for name in more if more[name] != few[name]} <= MOVES
    # Those grow by as many for each array, however many there are; long concatenations are made in parts.
    for name in grown:
        for_each = (more[name] - many[name]) / 20
        assert for_each <= 20, name
        assert name == "concatenate" or for_each == (many[name] - few[name]) / 20, name


# Batches enough to take every thread of XLA's pool at one time.
WAITING = """
import jax, jax.numpy as jnp
from automagic_optax.stages.spectrum import directions, effective_rank, gram, wide_numbers
def one(x):
    with wide_numbers():
        return directions(gram(x)).weak * effective_rank(gram(x))
def every(batches):
    return [jax.vmap(one)(jnp.sin(batch * (i + 1))) for i, batch in enumerate(batches)]
batches = [jax.random.normal(jax.random.key(i), (8, 24, 24)) for i in range(64)]
program = jax.jit(every)
for _ in range(50):
    found = jax.block_until_ready(program(batches))
print("done", all(bool(jnp.isfinite(x).all()) for x in found))
"""


@pytest.mark.slow
def test_decompositions_do_not_wait_for_each_other() -> None:
    # jaxlib's own eigh of batches came to a stop here, in a process that then had to be killed.
    done = subprocess.run([sys.executable, "-c", WAITING], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done True\n", done.stderr


@pytest.mark.slow
def test_a_thousand_adapters_compile_in_four_minutes() -> None:
    # Everything is on.  Processor time on a quiet machine: 123 s, with the flags of `make test-all` 172.
    start = time.process_time()
    traced = lowered(1000, SHAPES)
    between = time.process_time()
    program = traced.compile()
    end = time.process_time()
    print(f"traced in {between - start:.0f} s, compiled in {end - between:.0f} s")
    assert end - start < 240
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.standard_normal(SHAPES[i % len(SHAPES)]), jnp.float32) for i in range(1000)]
    updates, state = program(params, TX.init(params), params)
    assert all(np.asarray(u).any() for u in updates)
    assert {int(age) for age in find_state(state).age} == {1}
