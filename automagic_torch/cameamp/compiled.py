"""One compiled function for every form of batch: `new_values`, written back in place (section 8.1 of the page)."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Hashable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from automagic_core import Config
from automagic_torch.cameamp.new_values import Given, New, Way, new_values
from automagic_torch.codec.nearest import prepare_tables
from automagic_torch.codec.random_bits import signed_key
from automagic_torch.sharding.extent import Extent

Program = Callable[[Given], New]
_NOT_COMPUTED_WITH = (
    *("lr", "min_lr", "max_lr", "weight_decay", "warmup_steps", "search_gain", "straightness", "agreement_floor"),
    *("lr_mask_gain", "percentile_clipping", "min_8bit_size", "stable_emb", "force_8bit", "verbose", "profile"),
)
"""Fields that say which states there are or that come as tensors: a change of theirs compiles nothing."""
_SAME = {field.name: field.default for field in dataclasses.fields(Config) if field.name in _NOT_COMPUTED_WITH}
_OPTIONS = {"assert_indirect_indexing": False, "realize_opcount_threshold": 1000}
"""No check of indices, which are codes.  What a loop has computed is not stored for the next loop only because it is
long: the codes of one state are one expression."""


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
    """What a device of a type lacks to compile for it; None if nothing."""
    if device_type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            found = get_cpp_compiler()
        except Exception as error:
            return f"no C++ compiler was found ({type(error).__name__}); the variable CXX names one"
        return None if shutil.which(found) else f"the C++ compiler {found!r} was not found; the variable CXX names one"
    from torch.utils._triton import has_triton

    return None if has_triton() else f"Triton is not installed or does not support this {device_type} device"


def run_compiled(way: Way, given: Given) -> New:
    """`new_values` by a compiled function, which writes new parameters and states into `given`."""
    device, stacked = given.before.device, len(given.before) > 1
    config = dataclasses.replace(way.arrays.config, **_SAME)
    arrays = way.arrays._replace(config=tuple(config.__dict__.values()))
    key = (
        *(way._replace(arrays=arrays, extent=None), frozenset(given.stored), stacked, device),
        *(given.before.dtype, given.g.dtype, given.usable is None),
    )
    program = _programs.get(key)
    if program is None:
        plan = way.arrays.plan
        own_way = way._replace(arrays=way.arrays._replace(config=config), extent=Extent(plan))
        program = _programs[key] = _new_program(own_way, device)
    given = given._replace(
        rates=given.rates._replace(min_lr=_on(given.rates.min_lr, device), max_lr=_on(given.rates.max_lr, device)),
        decay=_on(given.decay, device),
        kept=_on(given.kept, device),
        votes=torch.full((), given.votes, dtype=torch.bool, device=device),
        state_keys={where: _key(key, device) for where, key in given.state_keys.items()},
        parameter_key=None if given.parameter_key is None else _key(given.parameter_key, device),
        walk_key=_key(given.walk_key, device),
    )
    if stacked:
        for x in (given.g, given.before, *given.stored.values(), *([] if given.usable is None else [given.usable])):
            torch._dynamo.mark_dynamic(x, 0)
    return program(given)


def _key(key: int | Tensor, device: torch.device) -> Tensor:
    assert isinstance(key, int)
    return torch.full((), signed_key(key), dtype=torch.int32, device=device)


def _on(value: Tensor | float, device: torch.device) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float32, device=device)


_programs: dict[Hashable, Program] = {}
"""One for every form of batch: the way, the states, dtypes and the device, and whether there are several arrays."""


def _new_program(way: Way, device: torch.device) -> Program:
    """A function that torch compiles at its first call."""
    prepare_tables(device)

    def program(given: Given) -> New:
        new = new_values(way, given)
        given.before.copy_(new.after)
        for name, value in new.stored.items():
            given.stored[name].copy_(value)
        return new._replace(after=None, stored=None)

    # Code of its own, since torch counts how often it compiles one code and stops at a limit.
    code = program.__code__.replace(co_name=f"step_of_{'x'.join(map(str, way.arrays.plan.shape)) or 'scalars'}")
    own = FunctionType(code, program.__globals__, code.co_name, None, program.__closure__)
    compiled: Program = torch.compile(own, fullgraph=True, options=_OPTIONS)
    return compiled
