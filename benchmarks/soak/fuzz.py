"""Draws random cases, and tells the one that fails."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.soak.fuzz_cases import Case, cases, compiled_cases, shapes
from benchmarks.soak.fuzz_fields import INVALID, Fields, invalid_fields
from benchmarks.soak.fuzz_judge import Runner, Tally, check_case


def fuzz_torch(count: int, number: int) -> dict[str, Any]:
    """A record of `count` runs in PyTorch; `number` is their seed."""
    from benchmarks.soak.fuzz_torch import DTYPES, TorchRunner, refuses

    return _fuzz(count, number, cases(shapes(), DTYPES), TorchRunner, refuses)


def fuzz_torch_compiled(count: int, number: int) -> dict[str, Any]:
    """A record of `count` runs of compiled steps in PyTorch; `number` is their seed."""
    from benchmarks.soak.fuzz_torch import DTYPES, CompiledRunner, refuses

    return _fuzz(count, number, cases(shapes(), DTYPES), CompiledRunner, refuses)


def fuzz_jax(count: int, number: int, x64: bool = False) -> dict[str, Any]:
    """A record of `count` runs in JAX, with or without 64-bit numbers; `number` is their seed."""
    import jax

    from benchmarks.soak.fuzz_jax import DTYPES, SHAPES, JaxRunner, refuses

    jax.config.update("jax_enable_x64", x64)
    dtypes = (*DTYPES, "float64", "float64") if x64 else DTYPES
    return _fuzz(count, number, cases(st.sampled_from(SHAPES), dtypes), JaxRunner, refuses)


def fuzz_compiled(count: int, number: int) -> dict[str, Any]:
    """A record of `count` runs of compiled steps in JAX for each precision; `number` is their seed."""
    from benchmarks.soak.fuzz_jax import COMPILED, CompiledRunner, refuses

    records = [
        _fuzz(count, number, compiled_cases(*precision), CompiledRunner, refuses) for precision in COMPILED.values()
    ]
    total = records[0]
    for record in records[1:]:
        total["seconds"] += record["seconds"]
        total["counts"] = dict(Counter(total["counts"]) + Counter(record["counts"]))
        total["largest_distance"] = max(total["largest_distance"], record["largest_distance"])
        total["failures"] += record["failures"]
    return total


def _fuzz(
    count: int,
    number: int,
    strategy: st.SearchStrategy[Case],
    runner: Callable[[Case], Runner],
    refuses: Callable[[Fields], str],
) -> dict[str, Any]:
    begin = time.perf_counter()
    tally = Tally()
    failures: list[str] = []
    failing: list[str] = []
    # A case that fails is told as it was drawn: to find the smallest one takes minutes.
    calm = settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )

    @seed(number)
    @calm
    @given(strategy)
    def runs(case: Case) -> None:
        failing[:] = [repr(case)]
        check_case(case, runner(case), tally)

    @seed(number)
    @calm
    @given(invalid_fields())
    def refusals(drawn: tuple[Fields, str]) -> None:
        fields, name = drawn
        failing[:] = [repr(drawn)]
        tally.counts["invalid configurations"] += 1
        text = refuses(fields)
        assert text, f"{name} = {fields.get(name)!r} is taken"
        assert name in text, f"the error does not name {name}: {text}"
        assert repr(fields[name]) in text, f"the error does not name the value {fields[name]!r}: {text}"

    for property_ in (runs, refusals):
        try:
            property_()
        except Exception as error:  # whatever a case raises is a finding
            text = str(error).strip().splitlines()
            failures.append(f"{type(error).__name__}: {text[0] if text else ''}; {failing[0]}")
    return {
        "seed": number,
        "seconds": time.perf_counter() - begin,
        "counts": dict(sorted(tally.counts.items())),
        "invalid_fields": len(INVALID),
        "largest_distance": tally.largest_distance,
        "failures": failures,
    }
