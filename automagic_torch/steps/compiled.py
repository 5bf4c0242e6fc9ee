"""One compiled function for every form of batch: `new_values`, written back in place (section 8.1 of the page)."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Hashable
from functools import cache, lru_cache
from importlib import import_module
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from automagic_core import FIELD_NAMES, Config
from automagic_torch.codec.nearest import prepare_tables
from automagic_torch.codec.random_bits import signed_key
from automagic_torch.sharding.extent import Extent
from automagic_torch.steps.new_values import Given, New, Way, new_values, written_back
from automagic_torch.steps.windows import run_in_windows

Program = Callable[[Given], tuple[Any, ...]]
_NOT_COMPUTED_WITH = (
    *("lr", "min_lr", "max_lr", "weight_decay", "warmup_steps", "search_gain", "straightness", "agreement_floor"),
    *("lr_mask_gain", "percentile_clipping", "min_8bit_size", "stable_emb", "force_8bit", "verbose", "profile"),
)
"""Fields that say which states there are or that come as tensors: a change of theirs compiles nothing."""
_SAME: dict[str, Any] = {
    field.name: field.default for field in dataclasses.fields(Config) if field.name in _NOT_COMPUTED_WITH
}
_OPTIONS: dict[str, Any] = {"assert_indirect_indexing": False, "realize_opcount_threshold": 1000}
"""No check of indices, which are codes.  What a loop has computed is not stored for the next loop only because it is
long: the codes of one state are one expression."""


_TRUST = {"cpp.vec_isa_ok": True}
"""The C++ compiler and torch know the vector instructions of the processor.  Inductor would compile small programs to
find out: 7 s, and 1 s where they lie in its cache."""

APART = {"cpu": 16, "other": 4}
"""A batch of more than so many times as many arrays as a function computes, or of as many times fewer, gets a function
of its own.  On a CPU a call takes 0.2 ms beside its work.  That of other devices is an estimate: every call is some
thirty launches.
"""


def _options(device: torch.device) -> dict[str, Any]:
    if device.type != "cpu":  # a GPU computes faster again than it reads
        return _OPTIONS
    from automagic_torch.steps.kept_values import KeepSharedValues

    return _OPTIONS | {"post_grad_custom_pre_pass": KeepSharedValues()}


def checked_compiled(compiled: Any) -> bool | None:
    """The argument `compiled` of the optimizer.

    Raises:
        ValueError: it is neither None nor a bool.
    """
    if compiled is None or isinstance(compiled, bool):
        return compiled
    raise ValueError(f"compiled = {compiled!r} is not valid; valid: None (compiled on CUDA), True, False")


@cache
def missing_compiler(device_type: str) -> str | None:
    """What torch or a device of a type lacks to compile for it; None if nothing."""
    if TorchVersion(torch.__version__) < "2.9.0.dev0":  # 2.6 and 2.7 cannot trace the step, 2.8 crashes on a CPU
        return f"torch {torch.__version__} cannot compile the step; 2.9 and later can"
    if device_type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            found = get_cpp_compiler()
        except Exception as error:
            return f"no C++ compiler was found ({type(error).__name__}); the variable CXX names one"
        return None if shutil.which(found) else f"the C++ compiler {found!r} was not found; the variable CXX names one"
    from torch.utils._triton import has_triton

    if not has_triton():
        return f"Triton is not installed or does not support this {device_type} device"
    try:
        # The driver is compiled at its first use, by a C compiler that may be missing.
        import_module("triton.runtime").driver.active.get_current_target()
    except Exception as error:
        return f"Triton does not work here ({type(error).__name__}: {error})"
    return None


@lru_cache(maxsize=256, typed=True)
def _computed_with(values: tuple[Any, ...]) -> Config:
    """The fields with which a compiled function computes, others at their defaults; cached as `Config` checks them."""
    return Config(**dict(zip(FIELD_NAMES, values, strict=True)) | _SAME)


def run_compiled(way: Way, given: Given) -> New:
    """`new_values` by a compiled function, written into `given`."""
    device = given.before.device
    values = tuple(tuple(v) if isinstance(v, list) else v for v in way.arrays.config.__dict__.values())
    config = _computed_with(values)
    way = way._replace(arrays=way.arrays._replace(config=config), extent=Extent(way.extent.plan))
    fields = tuple(config.__dict__.values())
    key = (
        *(way.arrays.plan, fields, *way.arrays[2:], *way[2:], frozenset(given.stored), device),
        *(given.before.dtype, given.g.dtype, given.usable is None),
    )
    compute, window = _program_for(key, len(given.before), way, device)

    def on_device(value: Tensor | float) -> Tensor:
        return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float32, device=device)

    def of_key(key: int | Tensor) -> Tensor:
        assert isinstance(key, int)
        return torch.full((), signed_key(key), dtype=torch.int32, device=device)

    rates = given.rates
    given = given._replace(
        rates=rates._replace(min_lr=on_device(rates.min_lr), max_lr=on_device(rates.max_lr)),
        decay=on_device(given.decay),
        kept=on_device(given.kept),
        votes=torch.full((), bool(given.votes), dtype=torch.bool, device=device),
        state_keys={where: of_key(key) for where, key in given.state_keys.items()},
        parameter_key=None if given.parameter_key is None else of_key(given.parameter_key),
        walk_key=of_key(given.walk_key),
    )

    def run(given: Given) -> New:
        new = New(*compute(given))
        shares = written_back(way, given, new) if device.type == "cpu" else new.stored
        return new._replace(after=given.before, stored=shares or given.stored)

    return run(given) if len(given.before) == window else run_in_windows(given, window, run)


_programs: dict[Hashable, list[tuple[Program, int]]] = {}
"""For every form of batch (what is computed, dtypes and the device) functions, and how many arrays each computes.

Their number is a constant of a function, that of its first batch.  With a number that may change it takes twice as long
to compile, and twice as long to be found in the cache of compiled functions.
"""


def _program_for(key: Hashable, count: int, way: Way, device: torch.device) -> tuple[Program, int]:
    """The function for a batch of `count` arrays whose own number is the nearest, and that number."""
    known = _programs.setdefault(key, [])
    apart = APART["cpu" if device.type == "cpu" else "other"]

    def times(window: int) -> float:
        return max(count / window, window / count)

    nearest = min(known, key=lambda program: times(program[1]), default=None)
    if nearest is None or times(nearest[1]) > apart:
        nearest = _new_program(way, device), count
        known.append(nearest)
    return nearest


def _new_program(way: Way, device: torch.device) -> Program:
    """A function that torch compiles at its first call."""
    prepare_tables(device)

    def program(given: Given) -> tuple[Any, ...]:
        new = new_values(way, given)
        # Inductor cannot always compile C++ loops that write into what others read: a KeyError where it fuses them.
        return tuple(new) if device.type == "cpu" else (None, written_back(way, given, new), *new[2:])

    def compiled(options: dict[str, Any]) -> Program:
        # Code of its own, since torch counts how often it compiles one code and stops at a limit.
        name = f"step_of_{'x'.join(map(str, way.arrays.plan.shape)) or 'scalars'}"
        own = FunctionType(program.__code__.replace(co_name=name), globals(), name, None, program.__closure__)
        made: Program = torch.compile(own, fullgraph=True, dynamic=False, options=options)
        return made

    return compiled(_options(device)) if device.type != "cpu" else _trusting_at_first(compiled, _options(device))


def _trusting_at_first(compiled: Callable[[dict[str, Any]], Program], options: dict[str, Any]) -> Program:
    """What `compiled` makes with `_TRUST`; if that fails at its first call, what it makes without, then and later."""
    from torch._inductor import config

    if config.cpp.vec_isa_ok is not None or _failures:  # the user has decided, or it is known
        return compiled(options)
    chosen: list[Program] = []

    def program(given: Given) -> tuple[Any, ...]:
        if chosen:
            return chosen[0](given)
        now = compiled(options | _TRUST)
        try:
            found = now(given)
        except Exception as error:  # of many kinds, among them those of the compiler and of the loader
            _failures.append(str(error))
            _forget_what_was_trusted()
            now = compiled(options)
            found = now(given)
        chosen.append(now)
        return found

    return program


_failures: list[str] = []
"""Why functions could not be made with `_TRUST`."""


def _forget_what_was_trusted() -> None:
    """Inductor remembers it for whatever else is compiled in this process."""
    from torch._inductor import cpu_vec_isa

    kinds = {type(isa).__bool__ for isa in cpu_vec_isa.supported_vec_isa_list}
    for remembers in (cpu_vec_isa.valid_vec_isa_list, *kinds):
        getattr(remembers, "cache_clear", lambda: None)()
