"""The jobs."""

from __future__ import annotations

from benchmarks.evidence.jobs.job import Job
from benchmarks.outside.jobs.convolutions import Forecast, ResNet, Segmentation
from benchmarks.outside.jobs.denoiser import FewImages, OneEmbedding
from benchmarks.outside.jobs.embeddings import Recommender, Sort, Tagger
from benchmarks.outside.jobs.images import Contrastive, Vae, Vit
from benchmarks.outside.jobs.policy import CartPole
from benchmarks.outside.jobs.tables import Coordinates, NodeKinds, Tabular, TabularBatchNorm
from benchmarks.outside.jobs.text import FineTune, LstmOnBytes, SkipGramOnPython, TrainOn

_FIRST: tuple[Job, ...] = (
    LstmOnBytes(), Tabular(), TabularBatchNorm(), Vit(), Vae(), Contrastive(), CartPole(), NodeKinds(), FewImages(),
    OneEmbedding(), FineTune(), TrainOn(), SkipGramOnPython(), Coordinates(),
)  # fmt: skip

_NEW: tuple[Job, ...] = (ResNet(), Segmentation(), Forecast(), Sort(), Recommender(), Tagger())

JOBS: dict[str, Job] = {job.name: job for job in (*_FIRST, *_NEW)}
"""By name."""
NEW = frozenset(job.name for job in _NEW)
"""The jobs that were added after the last rule of the search was chosen, before anyone had seen it on them."""
