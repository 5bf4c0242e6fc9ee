"""One compiled function for every form of batch: `new_values`, written back in place (section 8.1 of the page)."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Hashable
from functools import cache, lru_cache
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

    return None if has_triton() else f"Triton is not installed or does not support this {device_type} device"


@lru_cache(maxsize=256, typed=True)
def _computed_with(values: tuple[Any, ...]) -> Config:
    """The fields with which a compiled function computes, others at their defaults; cached as `Config` checks them."""
    return Config(**dict(zip(FIELD_NAMES, values, strict=True)) | _SAME)


def run_compiled(way: Way, given: Given) -> New:
    """`new_values` by a compiled function, written into `given` except for several arrays on a CPU."""
    device, several = given.before.device, len(given.before) > 1
    values = tuple(tuple(v) if isinstance(v, list) else v for v in way.arrays.config.__dict__.values())
    config = _computed_with(values)
    way = way._replace(arrays=way.arrays._replace(config=config), extent=Extent(way.extent.plan))
    fields = tuple(config.__dict__.values())
    key = (
        *(way.arrays.plan, fields, *way.arrays[2:], *way[2:], frozenset(given.stored), several, device),
        *(given.before.dtype, given.g.dtype, given.usable is None),
    )
    program = _programs.get(key)
    if program is None:
        program = _programs[key] = _new_program(way, device)

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
    if several:
        for x in (given.g, given.before, *given.stored.values(), *given.stage_states.values()):
            torch._dynamo.mark_dynamic(x, 0)
        if given.usable is not None:
            torch._dynamo.mark_dynamic(given.usable, 0)
    new = New(*program(given))
    if device.type == "cpu" and several:
        return new
    shares = written_back(way, given, new) if device.type == "cpu" else new.stored
    return new._replace(after=given.before, stored=shares or given.stored)


_programs: dict[Hashable, Program] = {}
"""One for every form of batch: what is computed, dtypes, the device, and whether there are several arrays."""


def _new_program(way: Way, device: torch.device) -> Program:
    """A function that torch compiles at its first call."""
    prepare_tables(device)

    def program(given: Given) -> tuple[Any, ...]:
        new = new_values(way, given)
        # Inductor cannot always compile C++ loops that write into what others read: a KeyError where it fuses them.
        return tuple(new) if device.type == "cpu" else (None, written_back(way, given, new), *new[2:])

    # Code of its own, since torch counts how often it compiles one code and stops at a limit.
    name = f"step_of_{'x'.join(map(str, way.arrays.plan.shape)) or 'scalars'}"
    own = FunctionType(program.__code__.replace(co_name=name), globals(), name, None, program.__closure__)
    compiled: Program = torch.compile(own, fullgraph=True, options=_options(device))
    return compiled
