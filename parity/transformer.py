"""The same byte-level transformer as a torch module and as a Flax module, from the same weights."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 64, 4, 2, 32, 16
VOCABULARY = 256
Weights = dict[str, np.ndarray]


class TorchBlock(nn.Module):
    """Attention and a feed-forward layer, normalized before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, width) to the same."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class TorchTransformer(nn.Module):
    """Logits of the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(TorchBlock() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.logits = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, length) to (batch, length, 256)."""
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))

    def loss(self, batch: np.ndarray) -> torch.Tensor:
        """Mean cross-entropy in nats per byte of (batch, length + 1) bytes."""
        tokens = torch.from_numpy(batch).to(self.embed.weight.device)
        return nn.functional.cross_entropy(self(tokens[:, :-1]).reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))


class FlaxBlock(nnx.Module):
    """`TorchBlock` in Flax."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(WIDTH, epsilon=1e-6, rngs=rngs)
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, epsilon=1e-6, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, _ = x.shape
        q, k, v = jnp.moveaxis(self.qkv(self.norm1(x)).reshape(batch, length, 3, HEADS, -1), 2, 0)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x)), approximate=True))


class FlaxTransformer(nnx.Module):
    """`TorchTransformer` in Flax."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([FlaxBlock(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-6, rngs=rngs)
        self.logits = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.positions.embedding[...][: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))

    def loss(self, batch: jax.Array) -> jax.Array:
        """Mean cross-entropy in nats per byte of (batch, length + 1) bytes."""
        log_p = jax.nn.log_softmax(self(batch[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(log_p, batch[:, 1:, None], axis=-1))


def torch_model(seed: int) -> TorchTransformer:
    """The torch model; its weights depend on the seed alone."""
    torch.manual_seed(seed)
    return TorchTransformer()


def flax_model(source: TorchTransformer) -> FlaxTransformer:
    """The Flax model with the torch model's weights: dense kernels transposed."""
    model = FlaxTransformer(nnx.Rngs(0))
    for name, value in source.state_dict().items():
        target = model
        *path, leaf = name.split(".")
        for part in path:
            target = target[int(part)] if part.isdigit() else getattr(target, part)
        array = value.detach().cpu().numpy()
        if isinstance(target, nnx.Linear) and leaf == "weight":
            target.kernel[...] = jnp.asarray(array.T)
        else:
            kind = {nnx.Embed: "embedding", nnx.LayerNorm: "scale"}.get(type(target), "bias")
            getattr(target, kind if leaf == "weight" else "bias")[...] = jnp.asarray(array)
    return model


@cache
def text(size: int = 400_000) -> np.ndarray:
    """About `size` bytes of Python's own standard library, uint8."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    read = b""
    for path in sorted(folder.glob("*.py")):
        if len(read) >= size:
            break
        read += path.read_bytes()
    return np.frombuffer(read, np.uint8)


def batches(seed: int, steps: int) -> np.ndarray:
    """Random stretches of the text: int64 (steps, batch, context + 1)."""
    starts = np.random.default_rng(seed).integers(0, len(text()) - CONTEXT - 1, size=(steps, BATCH))
    return text()[starts[..., None] + np.arange(CONTEXT + 1)].astype(np.int64)
