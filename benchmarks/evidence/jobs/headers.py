"""A byte-level transformer that has read Python learns to read C headers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.evidence.jobs.corpus import Corpus, c_headers, corpus_of, kept, standard_library, windows
from benchmarks.evidence.jobs.job import Base, Job, Training, cosine
from benchmarks.evidence.lora import adapt

VOCABULARY = 256


class Settings(NamedTuple):
    """The sizes of the job."""

    layers: int = 2
    width: int = 256
    heads: int = 4
    context: int = 64
    rank: int = 16
    batch: int = 8
    steps: int = 250
    base_batch: int = 16
    base_steps: int = 800
    base_rate: float = 2e-3
    held_out_windows: int = 128
    norm_queries: bool = False


class _Block(nn.Module):
    """Causal self-attention and an MLP, each behind a layer norm and added."""

    def __init__(self, width: int, heads: int, norm_queries: bool) -> None:
        super().__init__()
        self.heads, self.norm_queries = heads, norm_queries
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.query_key_value(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        if self.norm_queries:
            query, key = (functional.rms_norm(x, x.shape[-1:]) for x in (query, key))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(functional.gelu(self.mlp_in(self.mlp_norm(x))))


class ByteTransformer(nn.Module):
    """Bytes (batch, length) → logits of the next byte (batch, length, 256)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, settings.width)
        self.positions = nn.Embedding(settings.context, settings.width)
        self.blocks = nn.ModuleList(
            [_Block(settings.width, settings.heads, settings.norm_queries) for _ in range(settings.layers)]
        )
        self.norm = nn.LayerNorm(settings.width)
        self.logits = nn.Linear(settings.width, VOCABULARY)
        for embedding in (self.bytes, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


def next_byte_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte of windows (count, context + 1)."""
    return functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@dataclass
class BytesTraining(Training):
    """On windows of a corpus; the held-out windows are the same in every run."""

    corpus: Corpus
    sizes: Settings

    def __post_init__(self) -> None:
        fixed = torch.Generator().manual_seed(12345)
        self.held_out = windows(self.corpus.held_out, self.sizes.held_out_windows, self.sizes.context, fixed)

    def loss(self) -> Tensor:
        return next_byte_loss(
            self.model, windows(self.corpus.train, self.sizes.batch, self.sizes.context, self.generator)
        )

    @torch.no_grad()
    def validation_loss(self) -> float:
        # In pieces: the logits of all windows at once would leave the caches.
        pieces = self.held_out.split(16)
        return sum(float(next_byte_loss(self.model, piece)) * len(piece) for piece in pieces) / len(self.held_out)


class HeadersTransformer(Job):
    """LoRA on the linear layers of both blocks; embeddings, norms and logits stay."""

    family = "headers"
    heading = "Byte-level transformer on C headers"
    unit = "nats per byte"
    rate = 1e-2
    pictured = True

    def __init__(self, sizes: Settings = Settings(), variation: str = "") -> None:  # noqa: B008  # an immutable tuple
        super().__init__(sizes, variation)

    @property
    def description(self) -> str:
        sizes = self.sizes
        return (
            f"A transformer of {sizes.layers} layers and width {sizes.width}, pretrained on the bytes of Python's "
            f"standard library ({sizes.base_steps} steps), gets adapters of rank {sizes.rank} on the linear layers of "
            f"its blocks and learns the C headers of Python and numpy: {sizes.steps} steps of {sizes.batch} windows "
            f"of {sizes.context} bytes; held out are other files."
        )

    def build_base(self) -> Base:
        sizes = self.sizes
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        model = ByteTransformer(sizes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.base_rate)
        for step in range(sizes.base_steps):
            optimizer.param_groups[0]["lr"] = sizes.base_rate * cosine(step, sizes.base_steps, ramp=50)
            optimizer.zero_grad()
            batch = windows(standard_library().train, sizes.base_batch, sizes.context, generator)
            next_byte_loss(model, batch).backward()
            optimizer.step()
        return {"model": model.state_dict(), **kept(c_headers())}

    def start(self, base: Base, seed: int) -> Training:
        sizes = self.sizes
        generator = torch.Generator().manual_seed(seed)
        model = ByteTransformer(sizes)
        model.load_state_dict(base["model"])
        parts = ("query_key_value", "attention_out", "mlp_in", "mlp_out")
        layers = [f"blocks.{block}.{part}" for block in range(sizes.layers) for part in parts]
        adapters = adapt(model, layers, sizes.rank, generator)
        return BytesTraining(model, adapters, generator, corpus_of(base), sizes)
