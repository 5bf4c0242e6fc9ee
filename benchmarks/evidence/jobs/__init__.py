"""The jobs."""

from __future__ import annotations

from benchmarks.evidence.jobs.bytes_model import BytesTransformer
from benchmarks.evidence.jobs.convolution import ConvolutionalDiffusion
from benchmarks.evidence.jobs.digits import DigitsDiffusion
from benchmarks.evidence.jobs.flax_lora import FlaxDiffusion
from benchmarks.evidence.jobs.headers import HeadersTransformer
from benchmarks.evidence.jobs.job import Base, Job, Training, variations
from benchmarks.evidence.jobs.sentences import SentenceClassifier

_ADAPTED: list[Job] = [DigitsDiffusion(), HeadersTransformer(), SentenceClassifier()]
_FULL: list[Job] = [BytesTransformer(), ConvolutionalDiffusion()]
_VARIED = [other for job in _ADAPTED for other in variations(job)] + variations(_FULL[0], longer=False)

JOBS: dict[str, Job] = {job.name: job for job in (*_ADAPTED, *_FULL, FlaxDiffusion(), *_VARIED)}
"""By name: what trains adapters, then all parameters, then in JAX, then the same at other lengths and batches."""

__all__ = ["JOBS", "Base", "Job", "Training"]
