"""Computes large arrays, and batches, a chunk at a time: less is in memory at once, and on a CPU it stays in the cache.

Whole arrays at once, XLA stores every value that two kernels share: on a CPU 12 bytes a parameter for Adam in 8 bits
and 28 for `scale_by_cameamp`, on a GPU 9 for the latter.  In chunks these are below 0.5 bytes.  A step then takes less
than half the time on a CPU and a third more on a GPU (docs/performance.md), so there only very large arrays are cut.
A mesh cuts arrays in its own way: they are computed whole.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from automagic_optax.arrays.batches import waiting
from automagic_optax.arrays.means import float32_sums
from automagic_optax.sharding.placement import devices_of, varies

CHUNK = 2**18
"""In elements: 1 MB for each float32 value of a chunk.  Smaller chunks take longer to start than they save."""
GPU_CHUNK = 2**24
"""In elements.  With 2²² a step took as long."""
GPU_WHOLE = 2**27
"""In elements: arrays up to here are computed whole on a GPU, with 1.2 GB of temporary memory at the most."""
SMALLEST_CHUNK = 2**12
"""In elements.  Smaller ones take longer to start than to compute."""
Sums = TypeVar("Sums")


def runs_in_chunks(x: Any) -> bool:
    """Whether the array is computed where chunks help: compiled, on a single CPU device."""
    return _can_be_cut(x) and jax.default_backend() == "cpu"


def chunk_of_array(x: Any) -> int | None:
    """About how many elements a chunk of an array has; None where the array is computed whole."""
    if runs_in_chunks(x):
        return CHUNK
    large = x.size > GPU_WHOLE and _can_be_cut(x)
    return GPU_CHUNK if large and jax.default_backend() == "gpu" else None


def _can_be_cut(x: Any) -> bool:
    # Zeros, with which a loop begins, do not vary over devices, so JAX refuses a loop that fills them with what varies.
    return isinstance(x, jax.core.Tracer) and devices_of(x) == 1 and not varies(x)


def after(last: jax.Array, x: jax.Array) -> jax.Array:
    """x, where it is cut into chunks as a new array that waits for `last`, which is never negative.

    What is written over a gradient that must be kept is written over a copy, and without this XLA copies the gradients
    of all large arrays before the first step.
    """
    chunk = chunk_of_array(x)
    return x if chunk is None or x.size <= chunk else waiting(last, x)


def chunk_count(length: int, width: int, blocks: int = 1, chunk: int | None = None) -> int:
    """Into how many equal chunks an array of `length` rows of `width` elements is cut; 1 where it is not.

    Args:
        length, width: their product is the number of elements; a chunk has whole rows.
        blocks: every chunk has a multiple of this many elements.
        chunk: about how many elements a chunk has, by default `CHUNK`.
    """
    chunk = CHUNK if chunk is None else chunk
    if length * width <= chunk:
        return 1
    for rows in range(max(chunk // max(width, 1), 1), 0, -1):
        if length % rows == 0 and rows * width % blocks == 0:
            return length // rows if rows * width >= SMALLEST_CHUNK else 1
    return 1


def in_chunks(
    function: Callable[..., tuple[Any, Sums]],
    count: int,
    arrays: Any,
    into: Any,
    add: Callable[..., Sums] | None = None,
) -> tuple[Any, Sums]:
    """Calls `function(index, chunk)` on each chunk of the arrays, one after another.

    Args:
        function: from the chunk's number and the chunks of `arrays` to the chunks of `into` and a tree of sums.
        count: how many chunks; the leading axis of every array is a multiple of it.
        arrays: a tree of arrays.
        into: a tree of arrays, which the results replace chunk by chunk.  Where they are also in `arrays`, XLA writes
            in place.
        add: (number, sums so far, sums of the next chunk) → sums.  By default all are added.

    Returns:
        The results, and the sums over all chunks.
    """
    structure: Any  # JAX's stubs lack its methods
    buffer_structure: Any
    leaves, structure = jax.tree.flatten(arrays)
    buffers, buffer_structure = jax.tree.flatten(into)
    stays_a_call = jax.default_backend() == "cpu"
    shared = [next((i for i, x in enumerate(leaves) if x is buffer), None) for buffer in buffers]

    def cut(x: jax.Array, index: Any) -> jax.Array:
        length = x.shape[0] // count
        return lax.dynamic_slice_in_dim(x, index * length, length, 0)

    def call(index: Any, held: list[jax.Array]) -> tuple[list[jax.Array], Sums]:
        now = list(leaves)
        for buffer, i in zip(held, shared, strict=True):
            if i is not None:
                now[i] = buffer
        chunk = structure.unflatten([cut(x, index) for x in now])
        # On a CPU a call that stays a call: what it is given is cut out once, before anything is written.  Inlined,
        # each kernel would cut its own slices, also after some were written, and XLA would copy the whole arrays first.
        # On a GPU XLA copies the whole arrays for the call, and a step takes 12 times as long as inlined.
        with set_xla_metadata(inlineable="false") if stays_a_call else nullcontext():
            results, sums = jax.jit(inside)(index, chunk)
        return jax.tree.leaves(results), sums

    def inside(index: Any, chunk: Any) -> tuple[Any, Sums]:
        with set_xla_metadata(inlineable="true") if stays_a_call else nullcontext(), float32_sums():
            return function(index, chunk)

    def put(held: list[jax.Array], results: list[jax.Array], index: Any) -> list[jax.Array]:
        return [
            lax.dynamic_update_slice_in_dim(buffer, lax.convert_element_type(x, buffer.dtype), index * x.shape[0], 0)
            for buffer, x in zip(held, results, strict=True)
        ]

    def body(index: Any, carried: tuple[list[jax.Array], Sums]) -> tuple[list[jax.Array], Sums]:
        held, total = carried
        results, sums = call(index, held)
        return put(held, results, index), add(index, total, sums) if add else jax.tree.map(jnp.add, total, sums)

    nothing = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: call(jnp.int32(0), buffers)[1])
    )
    held, total = lax.fori_loop(np.int32(0), np.int32(count), body, (buffers, nothing))
    return buffer_structure.unflatten(held), total
