"""A small byte-level transformer and its data, Python's own standard library: what several benchmarks train.

Parameters are a plain tree of float32 arrays in Flax's layout: kernels (in, out), embeddings (num, features).
"""

from __future__ import annotations

import math
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

VOCABULARY = 256
VALIDATION_EVERY = 10
"""Every tenth file is held out."""

Params = dict[str, Any]


class Shape(NamedTuple):
    """The size of the model."""

    layers: int = 2
    width: int = 96
    heads: int = 4
    context: int = 64


class Text(NamedTuple):
    """Bytes as uint8 arrays of one axis."""

    train: np.ndarray
    validation: np.ndarray


@cache
def standard_library(size: int = 2_000_000) -> Text:
    """About `size` bytes of the top-level modules of Python's standard library, split by file.

    Args:
        size: files are read in alphabetical order until there are this many bytes.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    read = 0
    for number, path in enumerate(sorted(folder.glob("*.py"))):
        if read >= size:
            break
        text = path.read_bytes()
        parts[number % VALIDATION_EVERY == VALIDATION_EVERY - 1].append(text)
        read += len(text)
    train, validation = (np.frombuffer(b"".join(part), np.uint8) for part in parts)
    return Text(train, validation)


def windows(text: np.ndarray, count: int, context: int, rng: np.random.Generator) -> np.ndarray:
    """`count` random stretches of `context` + 1 bytes: int32 (count, context + 1)."""
    starts = rng.integers(0, len(text) - context - 1, size=count)
    return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def initial_params(key: jax.Array, shape: Shape = Shape()) -> Params:  # noqa: B008  # an immutable tuple
    """Kernels of variance 1 / fan-in, those that write to the residual stream smaller by √(2 · layers)."""
    keys = iter(jax.random.split(key, 3 + 4 * shape.layers))
    width = shape.width

    def normal(size: tuple[int, int], scale: float) -> jax.Array:
        return scale * jax.random.normal(next(keys), size, jnp.float32)

    def linear(fan_in: int, fan_out: int, gain: float = 1.0) -> Params:
        return {"kernel": normal((fan_in, fan_out), gain / math.sqrt(fan_in)), "bias": jnp.zeros(fan_out)}

    def norm() -> Params:
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    into_residual = 1 / math.sqrt(2 * shape.layers)
    params: Params = {"bytes": {"embedding": normal((VOCABULARY, width), 0.1)}}
    params["positions"] = {"embedding": normal((shape.context, width), 0.1)}
    for layer in range(shape.layers):
        params[f"block_{layer}"] = {
            "attention_norm": norm(),
            "query_key_value": linear(width, 3 * width),
            "attention_out": linear(width, width, into_residual),
            "mlp_norm": norm(),
            "mlp_in": linear(width, 4 * width),
            "mlp_out": linear(4 * width, width, into_residual),
        }
    params["final_norm"] = norm()
    params["logits"] = linear(width, VOCABULARY)
    return params


def is_embedding(path: tuple[Any, ...], leaf: Any) -> bool:
    """The predicate that `automagic_8bit` takes as ``embedding=``."""
    del leaf
    return str(getattr(path[-1], "key", path[-1])) == "embedding"


def _normalize(params: Params, x: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(variance + 1e-6) * params["scale"] + params["bias"]


def _linear(params: Params, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"]


def _attention(params: Params, x: jax.Array, heads: int) -> jax.Array:
    batch, length, width = x.shape
    split = _linear(params["query_key_value"], x).reshape(batch, length, 3, heads, width // heads)
    query, key, value = split[:, :, 0], split[:, :, 1], split[:, :, 2]
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return _linear(params["attention_out"], mixed.reshape(batch, length, width))


def logits(params: Params, tokens: jax.Array, shape: Shape = Shape()) -> jax.Array:  # noqa: B008
    """Logits of the next byte: (batch, length) → (batch, length, 256)."""
    x = params["bytes"]["embedding"][tokens] + params["positions"]["embedding"][: tokens.shape[1]]
    for layer in range(shape.layers):
        block = params[f"block_{layer}"]
        x = x + _attention(block, _normalize(block["attention_norm"], x), shape.heads)
        hidden = jax.nn.gelu(_linear(block["mlp_in"], _normalize(block["mlp_norm"], x)))
        x = x + _linear(block["mlp_out"], hidden)
    return _linear(params["logits"], _normalize(params["final_norm"], x))


def loss(params: Params, batch: jax.Array, shape: Shape = Shape()) -> jax.Array:  # noqa: B008
    """Mean cross-entropy in nats per byte of a batch of `windows`."""
    log_p = jax.nn.log_softmax(logits(params, batch[:, :-1], shape))
    return -jnp.mean(jnp.take_along_axis(log_p, batch[:, 1:, None], axis=-1))
