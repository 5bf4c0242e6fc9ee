"""Records as runs would leave them, of losses that a test chooses."""

import math
from collections.abc import Callable

from benchmarks.evidence.jobs import JOBS
from benchmarks.evidence.plan import Spec, plan
from benchmarks.evidence.store import Record, losses, place_of, settings_of
from benchmarks.evidence.variants import VARIANTS


def record(spec: Spec, loss: float) -> Record:
    """One run's record with the loss given; infinite: diverged."""
    variant = VARIANTS[spec.variant]
    diverged = not math.isfinite(loss)
    measures = dict.fromkeys(("frequency_factors", "frequency_product", "edge_factors", "edge_product"), 0.5)
    measures["effective_rank"] = 12.0 if spec.variant == "no-stages" else 9.0 + 0.1 * spec.seed
    return {
        **spec._asdict(),
        "settings": settings_of(JOBS[spec.job]),
        "optimizer": variant.optimizer,
        "fields": dict(variant.fields),
        "swaps": list(variant.swaps),
        "steps": 100,
        "loss": None if diverged else loss,
        "best": min(loss, 2.0),
        "curve": [(0, 3.0), (50, 2.0), (100, None if diverged else loss)],
        "found_rate": 0.01 if variant.optimizer == "ours" else None,
        "state_bytes": 200,
        "adam_bytes": 800,
        "share_8bit": 1.0,
        "parameters": 100,
        "measures": {} if diverged else measures,
        "further": {},
        "seconds": 2.0,
        "cpu_seconds": 1.0,
        "versions": {"python": "3"},
        "code": "0",
    }


PLACES = {name: place_of(job) for name, job in JOBS.items()}


def full_set(loss: Callable[[Spec], float]) -> dict[Spec, Record]:
    """Every run of the plan, which grows as results come in."""
    records: dict[Spec, Record] = {}
    while todo := [spec for spec in plan(losses(records), PLACES) if spec not in records]:
        records |= {spec: record(spec, loss(spec)) for spec in todo}
    return records
