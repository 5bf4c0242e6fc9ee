"""Symbols to sort, films to rate and bytes to tag: what is looked up in embeddings."""

from __future__ import annotations

import keyword
import re
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.evidence.jobs import headers
from benchmarks.evidence.jobs.corpus import corpus_of, windows
from benchmarks.evidence.jobs.headers import ByteTransformer
from benchmarks.evidence.jobs.job import Base, Training
from benchmarks.evidence.lora import adapt
from benchmarks.outside.jobs.common import FromFunctions, OutsideJob, fixed, from_rows, seeded
from benchmarks.outside.jobs.text import CLIP, PRETRAINED, Pretrained


class SortSettings(NamedTuple):
    """The sizes of the job."""

    symbols: int = 20
    length: int = 10
    width: int = 48
    heads: int = 4
    layers: int = 2
    dropout: float = 0.1
    smoothing: float = 0.1
    batch: int = 24
    steps: int = 300
    held_out_lists: int = 256


class Translator(nn.Module):
    """(lists (n, length), results so far (n, length)) → logits of each next symbol of the result (n, length, symbols).

    The encoder-decoder transformer as it was first published: a norm behind each sum.
    """

    def __init__(self, sizes: SortSettings) -> None:
        super().__init__()
        width, layers = sizes.width, sizes.layers
        # One symbol more: where a result begins.
        self.symbols = nn.Embedding(sizes.symbols + 1, width)
        self.positions = nn.Embedding(sizes.length, width)
        self.transformer = nn.Transformer(
            width, sizes.heads, layers, layers, 4 * width, sizes.dropout, batch_first=True
        )
        self.logits = nn.Linear(width, sizes.symbols)

    def forward(self, lists: Tensor, so_far: Tensor) -> Tensor:
        source, target = (self.symbols(symbols) + self.positions.weight for symbols in (lists, so_far))
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.logits(self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True))


class Sort(OutsideJob):
    """Lists of symbols in, the same in order out; held out are lists drawn by another seed."""

    family = "sort"
    heading = "Encoder-decoder transformer that learns to sort, labels smoothed, gradients clipped"
    unit = "nats per symbol, smoothed"
    rate = 1e-3
    defaults = SortSettings()

    def start(self, base: Base, seed: int) -> Training:
        del base
        sizes, generator = self.sizes, seeded(seed)
        model = Translator(sizes)

        def loss(count: int, draws: torch.Generator) -> Tensor:
            lists = torch.randint(sizes.symbols, (count, sizes.length), generator=draws)
            results = lists.sort(1).values
            logits = model(lists, functional.pad(results[:, :-1], (1, 0), value=sizes.symbols))
            return functional.cross_entropy(logits.flatten(0, 1), results.flatten(), label_smoothing=sizes.smoothing)

        return FromFunctions(
            model,
            [],
            generator,
            lambda: loss(sizes.batch, generator),
            lambda: loss(sizes.held_out_lists, fixed()),
            clip=CLIP,
        )


class RatingSettings(NamedTuple):
    """The sizes of the job."""

    people: int = 400
    films: int = 300
    tastes: int = 4
    ratings: int = 30000
    known_ratings: int = 24000
    width: int = 8
    batch: int = 256
    steps: int = 400


class Ratings(NamedTuple):
    """Who rated what, and how: (n,) each."""

    people: Tensor
    films: Tensor
    stars: Tensor


@cache
def ratings(sizes: RatingSettings) -> Ratings:
    """Stars from 1 to 5: the person's kindness, the film's quality, shared tastes and chance; few films get most."""
    generator = torch.Generator().manual_seed(8)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    fame = torch.exp(1.2 * normal(sizes.films))
    people = torch.randint(sizes.people, (sizes.ratings,), generator=generator)
    films = torch.multinomial(fame, sizes.ratings, replacement=True, generator=generator)
    match = (normal(sizes.people, sizes.tastes)[people] * normal(sizes.films, sizes.tastes)[films]).mean(1)
    liked = 0.4 * normal(sizes.people)[people] + 0.6 * normal(sizes.films)[films] + 1.4 * match
    return Ratings(people, films, (3.5 + liked + 0.5 * normal(sizes.ratings)).round().clamp(1, 5))


class Factors(nn.Module):
    """(people (n,), films (n,)) → stars (n,): a bias each, and the product of their factors."""

    def __init__(self, sizes: RatingSettings, mean: float) -> None:
        super().__init__()
        self.mean = mean
        self.people = nn.Embedding(sizes.people, sizes.width + 1)
        self.films = nn.Embedding(sizes.films, sizes.width + 1)
        for table in (self.people, self.films):
            nn.init.normal_(table.weight, std=0.1)
            nn.init.zeros_(table.weight[:, 0])

    def forward(self, people: Tensor, films: Tensor) -> Tensor:
        theirs, its = self.people(people), self.films(films)
        return self.mean + theirs[:, 0] + its[:, 0] + (theirs[:, 1:] * its[:, 1:]).sum(1)


class Recommender(OutsideJob):
    """Matrix factorization: a batch has gradients for a part of the rows only."""

    family = "recommender"
    heading = "Matrix factorization of ratings of films"
    unit = "squared error in stars"
    rate = 1e-2
    defaults = RatingSettings()

    def start(self, base: Base, seed: int) -> Training:
        del base
        sizes, generator = self.sizes, seeded(seed)
        people, films, stars = ratings(sizes)
        model = Factors(sizes, float(stars[: sizes.known_ratings].mean()))

        def loss(rows: Tensor | slice) -> Tensor:
            return functional.mse_loss(model(people[rows], films[rows]), stars[rows])

        return from_rows(model, generator, loss, sizes.known_ratings, sizes.batch)


LABELLED = 200_000
"""Bytes from the beginning of each corpus that have tags."""
KINDS = {
    "comment": r"#[^\n]*",
    "string": r"'[^'\n]*'|\"[^\"\n]*\"",
    "number": r"\b\d[\w.]*",
    "keyword": rf"\b(?:{'|'.join(keyword.kwlist)})\b",
    "name": r"\b[A-Za-z_]\w*",
}
"""Of the bytes of Python, as an editor colours them line by line; what is of none of them is the kind 0."""


def tagged(text: np.ndarray) -> np.ndarray:
    """The bytes plus 256 times the kind of each, int64."""
    pattern = "|".join(f"(?P<{name}>{expression})" for name, expression in KINDS.items())
    numbers = {name: number for number, name in enumerate(KINDS, 1)}
    tags = np.zeros(len(text), np.int64)
    for match in re.finditer(pattern, text.tobytes().decode("latin-1"), re.ASCII):
        tags[slice(*match.span())] = numbers[match.lastgroup or ""]
    return text + headers.VOCABULARY * tags


class Tagger(Pretrained):
    """Adapters on the layers of both blocks and a new last layer; rare kinds weigh as much as common ones."""

    own_name = "tagger"
    heading = "Pretrained transformer with LoRA that tags the bytes of Python, classes weighted"
    unit = "nats per byte, weighted"
    rate = 1e-2
    reads = "library"
    defaults = PRETRAINED._replace(batch=8, steps=250)

    def start(self, base: Base, seed: int) -> Training:
        sizes, generator, corpus = self.sizes, seeded(seed), corpus_of(base[self.reads])
        model = ByteTransformer(sizes)
        model.load_state_dict(base["model"])
        layers = [f"blocks.{name}" for name, part in model.blocks.named_modules() if isinstance(part, nn.Linear)]
        adapters = adapt(model, layers, sizes.rank, generator)
        model.logits = nn.Linear(sizes.width, len(KINDS) + 1)
        known, held_out = (tagged(text[:LABELLED]) for text in corpus)
        counts = np.bincount(known // headers.VOCABULARY, minlength=len(KINDS) + 1)
        weights = torch.tensor(counts.mean() / counts, dtype=torch.float32)

        def loss(text: np.ndarray, count: int, draws: torch.Generator) -> Tensor:
            chosen = windows(text, count, sizes.context - 1, draws)
            logits = model(chosen % headers.VOCABULARY)
            return functional.cross_entropy(logits.flatten(0, 1), chosen.flatten() // headers.VOCABULARY, weights)

        return FromFunctions(
            model,
            adapters,
            generator,
            lambda: loss(known, sizes.batch, generator),
            lambda: loss(held_out, sizes.held_out_windows, fixed()),
        )
