"""The three jobs."""

from __future__ import annotations

from benchmarks.evidence.jobs.digits import DigitsDiffusion
from benchmarks.evidence.jobs.headers import HeadersTransformer
from benchmarks.evidence.jobs.job import Base, Job, Training
from benchmarks.evidence.jobs.sentences import SentenceClassifier

JOBS: dict[str, Job] = {job.name: job for job in (DigitsDiffusion(), HeadersTransformer(), SentenceClassifier())}
"""By name, the cheapest first."""

__all__ = ["JOBS", "Base", "Job", "Training"]
