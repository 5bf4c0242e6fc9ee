"""A pretrained sentence encoder learns to tell the packages of the standard library apart by their docstrings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.evidence.jobs.docstrings import PACKAGES, docstrings
from benchmarks.evidence.jobs.job import Base, Job, Training
from benchmarks.evidence.jobs.minilm import LAYERS, WIDTH, MiniLM, mean_pooled, model_folder, read_safetensors
from benchmarks.evidence.jobs.wordpiece import WordPiece
from benchmarks.evidence.lora import adapt


class Settings(NamedTuple):
    """The sizes of the job."""

    tuned_layers: int = 2
    tokens: int = 20
    rank: int = 16
    batch: int = 16
    steps: int = 200
    texts_per_class: int = 200
    frozen_dtype: str = "bfloat16"


class Classifier(nn.Module):
    """The upper layers, the mean over the tokens, and a linear head that starts at 0."""

    def __init__(self, encoder: MiniLM, tuned_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([encoder.layer(i) for i in range(LAYERS - tuned_layers, LAYERS)])
        self.head = nn.Linear(WIDTH, len(PACKAGES))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, present)
        return self.head(mean_pooled(x, present))


@dataclass
class _SentencesTraining(Training):
    base: Base
    batch: int

    def loss(self) -> Tensor:
        base = self.base
        chosen = torch.randint(len(base["labels"]), (self.batch,), generator=self.generator)
        scores = self.model(base["hidden"][chosen], base["present"][chosen])
        return functional.cross_entropy(scores, base["labels"][chosen])

    def validation_loss(self) -> float:
        return float(functional.cross_entropy(self._held_out_scores(), self.base["held_out_labels"]))

    def further_results(self) -> dict[str, float]:
        right = self._held_out_scores().argmax(dim=1) == self.base["held_out_labels"]
        return {"accuracy": float(right.float().mean())}

    @torch.no_grad()
    def _held_out_scores(self) -> Tensor:
        hidden, present = self.base["held_out_hidden"], self.base["held_out_present"]
        pieces = zip(hidden.split(32), present.split(32), strict=True)
        return torch.cat([self.model(x, there) for x, there in pieces])


class SentenceClassifier(Job):
    """LoRA on the upper layers of all-MiniLM-L6-v2, whose lower layers are computed once for every text."""

    family = "docstrings"
    heading = "Sentence encoder on docstrings"
    unit = "cross-entropy, nats"
    rate = 3e-3
    pictured = True

    def __init__(self, sizes: Settings = Settings(), variation: str = "") -> None:  # noqa: B008  # an immutable tuple
        super().__init__(sizes, variation)

    @property
    def description(self) -> str:
        sizes = self.sizes
        return (
            f"The pretrained encoder all-MiniLM-L6-v2 gets adapters of rank {sizes.rank} on the linear layers of its "
            f"upper {sizes.tuned_layers} layers and a linear head, and learns which of {len(PACKAGES)} packages of "
            f"Python's standard library a docstring (its first {sizes.tokens} tokens) describes: {sizes.steps} steps "
            f"of {sizes.batch} texts."
        )

    def build_base(self) -> Base:
        sizes = self.sizes
        tokenize = WordPiece(model_folder() / "vocab.txt")
        encoder = MiniLM(read_safetensors(model_folder() / "model.safetensors"))
        texts = docstrings(sizes.texts_per_class)
        lower = [encoder.layer(i) for i in range(LAYERS - sizes.tuned_layers)]
        base: Base = {
            "labels": torch.tensor(texts.train_labels),
            "held_out_labels": torch.tensor(texts.held_out_labels),
            "upper": {name: tensor for name, tensor in encoder.weights.items() if _layer_number(name) >= len(lower)},
        }
        for prefix, part in (("", texts.train), ("held_out_", texts.held_out)):
            ids = torch.full((len(part), sizes.tokens), tokenize.pad)
            for row, text in enumerate(part):
                tokens = tokenize(text, sizes.tokens)
                ids[row, : len(tokens)] = torch.tensor(tokens)
            present = ids != tokenize.pad
            base[f"{prefix}present"] = present
            base[f"{prefix}hidden"] = _through(lower, encoder.embed(ids), present)
        return _in_dtype(base, getattr(torch, sizes.frozen_dtype))

    def start(self, base: Base, seed: int) -> Training:
        sizes = self.sizes
        generator = torch.Generator().manual_seed(seed)
        base = _in_dtype(base, torch.float32)
        model = Classifier(MiniLM(base["upper"]), sizes.tuned_layers)
        layers = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name != "head"]
        adapters = adapt(model, layers, sizes.rank, generator)
        model.head.requires_grad_(True)
        return _SentencesTraining(model, adapters, generator, base, sizes.batch)


def _in_dtype(base: Base, dtype: torch.dtype) -> Base:
    """The base with its floating arrays in a dtype: what stays frozen is kept in 16 bits, as people keep it."""

    def converted(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: converted(part) for name, part in x.items()}
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return {name: converted(part) for name, part in base.items()}


@torch.no_grad()
def _through(layers: Sequence[nn.Module], x: Tensor, present: Tensor) -> Tensor:
    """All texts through the layers that stay frozen, in pieces."""
    done = []
    for piece, there in zip(x.split(64), present.split(64), strict=True):
        for layer in layers:
            piece = layer(piece, there)
        done.append(piece)
    return torch.cat(done)


def _layer_number(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["encoder", "layer"] else -1
