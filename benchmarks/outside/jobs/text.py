"""Bytes and words: an LSTM and a transformer, all parameters, and embeddings of words."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.evidence.jobs import headers
from benchmarks.evidence.jobs.corpus import corpus_of, kept, standard_library, windows
from benchmarks.evidence.jobs.headers import VOCABULARY, BytesTraining, ByteTransformer, HeadersTransformer
from benchmarks.evidence.jobs.job import Base, Training
from benchmarks.outside.jobs.common import FromFunctions, OutsideJob, fixed, seeded

CLIP = 1.0
"""Norm to which gradients are clipped, as is usual for models of language."""


class LstmSettings(NamedTuple):
    """The sizes of the job."""

    width: int = 128
    embedding: int = 48
    context: int = 40
    batch: int = 8
    steps: int = 250
    held_out_windows: int = 64


class Lstm(nn.Module):
    """Bytes (batch, length) → logits of the next byte (batch, length, 256)."""

    def __init__(self, sizes: LstmSettings) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, sizes.embedding)
        self.lstm = nn.LSTM(sizes.embedding, sizes.width, batch_first=True)
        self.logits = nn.Linear(sizes.width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.bytes(tokens))
        return self.logits(hidden)


class LstmOnBytes(OutsideJob):
    """All parameters of an LSTM, gradients clipped."""

    family = "lstm"
    heading = "LSTM on the bytes of Python, from scratch, gradients clipped"
    unit = "nats per byte"
    rate = 1e-2
    defaults = LstmSettings()

    def build_base(self) -> Base:
        return kept(standard_library())

    def start(self, base: Base, seed: int) -> Training:
        sizes, generator, corpus = self.sizes, seeded(seed), corpus_of(base)
        model = Lstm(sizes)
        held_out = windows(corpus.held_out, sizes.held_out_windows, sizes.context, fixed())
        return FromFunctions(
            model,
            [],
            generator,
            lambda: headers.next_byte_loss(model, windows(corpus.train, sizes.batch, sizes.context, generator)),
            lambda: headers.next_byte_loss(model, held_out),
            clip=CLIP,
        )


class Pretrained(OutsideJob):
    """A transformer that has read Python to the end of its schedule goes on from there.  Further class attributes:

    Attributes:
        reads: which corpus of the base it goes on with.
    """

    family = "pretrained"
    unit = "nats per byte"
    reads: str

    def base_settings(self) -> dict[str, Any]:
        # What is left out changes nothing in the base, so that both jobs share it.
        return {name: value for name, value in super().base_settings().items() if name != "held_out_windows"}

    def build_base(self) -> Base:
        made = HeadersTransformer(self.sizes).build_base()
        model = made.pop("model")
        return {"model": model, "headers": made, "library": kept(standard_library())}

    def start(self, base: Base, seed: int) -> Training:
        generator = seeded(seed)
        model = ByteTransformer(self.sizes)
        model.load_state_dict(base["model"])
        return BytesTraining(model, [], generator, corpus_of(base[self.reads]), self.sizes, clip=CLIP)


PRETRAINED = headers.Settings(width=64, base_steps=1200)


class FineTune(Pretrained):
    """Goes on with C headers."""

    own_name = "fine-tune"
    heading = "Pretrained transformer learns C headers, all parameters, gradients clipped"
    rate = 3e-3
    reads = "headers"
    defaults = PRETRAINED._replace(batch=8, steps=150)


class TrainOn(Pretrained):
    """Goes on with what it has read, in few windows a batch: there is nothing to gain but by small steps."""

    own_name = "train-on"
    heading = "Pretrained transformer goes on with its own data, batches of two, gradients clipped"
    rate = 1e-4
    reads = "library"
    defaults = PRETRAINED._replace(batch=2, steps=200)


class SkipGramSettings(NamedTuple):
    """The sizes of the job."""

    words: int = 1000
    width: int = 48
    reach: int = 3
    batch: int = 256
    steps: int = 300
    held_out_pairs: int = 8192


class SkipGram(nn.Module):
    """Words (n,) → logits of a word nearby (n, words)."""

    def __init__(self, sizes: SkipGramSettings) -> None:
        super().__init__()
        self.inner = nn.Embedding(sizes.words, sizes.width)
        self.outer = nn.Embedding(sizes.words, sizes.width)
        nn.init.normal_(self.inner.weight, std=0.1)
        nn.init.zeros_(self.outer.weight)

    def forward(self, words: Tensor) -> Tensor:
        return self.inner(words) @ self.outer.weight.T


class SkipGramOnPython(OutsideJob):
    """Two tables of embeddings and nothing else."""

    family = "skipgram"
    heading = "Skip-gram embeddings of the commonest words of Python's sources"
    unit = "nats per word"
    rate = 1e-2
    defaults = SkipGramSettings()

    def build_base(self) -> Base:
        corpus = standard_library()
        train, held_out = _words(corpus.train), _words(corpus.held_out)
        known = [word for word, _ in Counter(train).most_common(self.sizes.words)]
        number = {word: place for place, word in enumerate(known)}
        texts = {"train": train, "held_out": held_out}
        return {name: torch.tensor([number[word] for word in text if word in number]) for name, text in texts.items()}

    def start(self, base: Base, seed: int) -> Training:
        sizes, generator = self.sizes, seeded(seed)
        model = SkipGram(sizes)

        def loss(text: Tensor, count: int, draws: torch.Generator) -> Tensor:
            reach = sizes.reach
            middle = torch.randint(reach, len(text) - reach, (count,), generator=draws)
            distance = torch.randint(1, reach + 1, (count,), generator=draws)
            side = 2 * torch.randint(2, (count,), generator=draws) - 1
            return functional.cross_entropy(model(text[middle]), text[middle + side * distance])

        return FromFunctions(
            model,
            [],
            generator,
            lambda: loss(base["train"], sizes.batch, generator),
            lambda: loss(base["held_out"], sizes.held_out_pairs, fixed()),
        )


def _words(text: np.ndarray) -> list[str]:
    return re.findall("[a-z]{3,}", text.tobytes().decode(errors="replace").lower())
