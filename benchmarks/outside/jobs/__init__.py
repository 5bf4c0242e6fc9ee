"""The jobs."""

from __future__ import annotations

from benchmarks.evidence.jobs.job import Job
from benchmarks.outside.jobs.denoiser import FewImages, OneEmbedding
from benchmarks.outside.jobs.images import Contrastive, Vae, Vit
from benchmarks.outside.jobs.policy import CartPole
from benchmarks.outside.jobs.tables import Coordinates, NodeKinds, Tabular, TabularBatchNorm
from benchmarks.outside.jobs.text import FineTune, LstmOnBytes, SkipGramOnPython, TrainOn

_ALL: tuple[Job, ...] = (
    LstmOnBytes(), Tabular(), TabularBatchNorm(), Vit(), Vae(), Contrastive(), CartPole(), NodeKinds(), FewImages(),
    OneEmbedding(), FineTune(), TrainOn(), SkipGramOnPython(), Coordinates(),
)  # fmt: skip

JOBS: dict[str, Job] = {job.name: job for job in _ALL}
"""By name."""
