"""A byte-level transformer learns Python from nothing: every parameter is trained."""

from __future__ import annotations

import torch

from benchmarks.evidence.jobs.corpus import corpus_of, kept, standard_library
from benchmarks.evidence.jobs.headers import BytesTraining, ByteTransformer, Settings
from benchmarks.evidence.jobs.job import Base, Job, Training

SIZES = Settings(width=64, batch=16, steps=600, norm_queries=True)


class BytesTransformer(Job):
    """All parameters; queries and keys are normalized, so that their kernels have no scale that matters."""

    family = "bytes"
    heading = "Byte-level transformer from scratch"
    unit = "nats per byte"
    rate = 1e-2

    def __init__(self, sizes: Settings = SIZES, variation: str = "") -> None:
        super().__init__(sizes, variation)

    @property
    def description(self) -> str:
        sizes = self.sizes
        return (
            f"A transformer of {sizes.layers} layers and width {sizes.width} with normalized queries and keys learns "
            f"the bytes of Python's standard library, all parameters from scratch: {sizes.steps} steps of "
            f"{sizes.batch} windows of {sizes.context} bytes; held out are other files."
        )

    def build_base(self) -> Base:
        return kept(standard_library())

    def start(self, base: Base, seed: int) -> Training:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        return BytesTraining(ByteTransformer(self.sizes), [], generator, corpus_of(base), self.sizes)
