"""Computes a large array in slabs of rows that stay in the cache (docs/algorithm.md, section 8)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from automagic_core import MAX_STEP, Decay, StatePlan, decay
from automagic_core.config.constants import SQUARE_FLOOR
from automagic_torch.arrays.averages import ema
from automagic_torch.arrays.stacked import chosen
from automagic_torch.arrays.usable import are_usable
from automagic_torch.cameamp.learning_rate import Evidence, Vote
from automagic_torch.codec.stored import States
from automagic_torch.sharding.extent import Extent
from automagic_torch.steps.new_values import OF_ARRAYS, Given, New, Way

SLAB = {"eager": 2**17, "compiled": 2**19, "other": 2**25}
"""A slab has about this many elements, in eager and in compiled code on a CPU and on other devices.

On a CPU what is computed for each element then fits in the cache, and a call of the compiled function takes little
beside its work.  On other devices slabs only bound the temporary memory.
"""


def slab_size(device_type: str, compiled: bool) -> int:
    """About how many elements a slab has."""
    return SLAB[("compiled" if compiled else "eager") if device_type == "cpu" else "other"]


@lru_cache(maxsize=4096)
def rows_of_slab(plan: StatePlan, limit: int, equal: bool) -> int | None:
    """How many rows a slab of at most `limit` elements has; None: the array is computed whole.

    Args:
        plan: of the array.
        limit: a slab has at most this many elements.
        equal: all slabs have equally many rows, else the last one may have fewer.
    """
    if plan.row_axis != 0 or plan.narrow or plan.block_size is None or plan.size < 4 * limit:
        return None
    rows, width = plan.shape[0], plan.size // plan.shape[0]
    unit = plan.block_size // math.gcd(plan.block_size, width)  # this many rows are whole blocks
    fitting = [n for n in range(unit, limit // width + 1, unit) if not equal or rows % n == 0]
    return fitting[-1] if fitting and fitting[-1] * width >= limit // 8 else None


def run_in_slabs(way: Way, given: Given, rows: int, run: Callable[[Way, Given], New]) -> New:
    """One step of one array, whose new parameters and states are written into `given`.

    Args:
        way, given: as for `new_values`; nothing is shown.
        rows: of a slab.
        run: `new_values` for a slab, which writes into what it is given and returns the states of `OF_ARRAYS`.
    """
    plan, stored, config = way.extent.plan, given.stored, way.arrays.config
    width = plan.size // plan.shape[0]
    g = torch.split(given.g, rows, 1)
    squares = [_squares(part.float()) for part in g]
    row_means = torch.cat([of_rows for of_rows, _ in squares], 1)
    column_means = torch.stack([of_columns for _, of_columns in squares]).sum(0) / plan.shape[0]
    ok = given.usable
    if ok is None:
        ok = torch.stack([are_usable(part) for part in g]).all(0)
        row_means, column_means = torch.where(ok, row_means, 0.0), torch.where(ok, column_means, 0.0)

    way_of = {count: _way_of_slab(way, count) for count in {part.shape[1] for part in g}}
    ways = [way_of[part.shape[1]] for part in g]
    beta2 = decay(config.betas[1])
    known = {"usable": ok} | _known(stored, row_means, column_means, beta2)
    cut = {name: _cut(x, plan, rows) for name, x in stored.items() if name not in OF_ARRAYS}
    whole = {name: x for name, x in stored.items() if name in OF_ARRAYS}
    if "exp_avg_sq" in cut:
        of_v = [name for name in cut if name.startswith("exp_avg_sq")]
        read = (slab_way.extent.read({name: cut[name][i] for name in of_v}) for i, slab_way in enumerate(ways))
        v = [_mean(values["exp_avg_sq"]) * slab_way.share for values, slab_way in zip(read, ways, strict=True)]
        # The mean after the step follows from that before it.
        known["exp_avg_sq"] = ema(beta2, torch.stack(v).sum(0), known["squares"])
    before = torch.split(given.before, rows, 1)
    steps: list[New] = []
    for index, slab_way in enumerate(ways):
        first, size = index * rows * width, slab_way.extent.plan.size
        keys = {(slot, size): (key + first) % 2**32 for (slot, _), key in given.state_keys.items()}
        slab = given._replace(
            g=g[index],
            before=before[index],
            stored=whole | {name: parts[index] for name, parts in cut.items()},
            stage_states={},
            state_keys=keys,
            parameter_key=None if given.parameter_key is None else (given.parameter_key + first) % 2**32,
            walk_key=(given.walk_key + first) % 2**32,
            known=known,
        )
        steps.append(run(slab_way, slab))

    found = [step.stored for step in steps]
    new: States = {"age": found[0]["age"]} | {name: x for name, x in found[0].items() if name == "exp_avg_sq_col"}
    for name in ("torque_mean", "background_scale", "exp_avg_res_col"):
        if name in found[0]:
            new[name] = torch.stack([shares[name] for shares in found]).sum(0)
    if "exp_avg_res_col" in new:
        new["exp_avg_res_col"] = ema(decay(config.betas[2]), stored["exp_avg_res_col"], new["exp_avg_res_col"])
    new |= given.stage_states
    # The ages are those before the step until they are written.
    cast = _vote(steps, ok & (stored["age"] >= 1) & given.votes, plan)
    for name, value in new.items():
        stored[name].copy_(chosen(ok, value, stored[name]))
    skipped = stored["skipped_steps"]
    skipped.add_(~ok & (skipped < MAX_STEP))
    square_norm = row_means.sum() * width if way.measures else None
    return New(given.before, stored, _evidence(steps, plan), cast, stored.get("lr_mask"), square_norm, None)


def _way_of_slab(way: Way, rows: int) -> Way:
    plan = way.extent.plan
    slab = dataclasses.replace(plan, shape=(rows, *plan.shape[1:]), row_shape=(rows, *plan.row_shape[1:]))
    arrays = way.arrays._replace(plan=slab)
    return way._replace(arrays=arrays, extent=Extent(slab), measures=False, share=rows / plan.shape[0])


def _vote(steps: Sequence[New], took_a_step: Tensor, plan: StatePlan) -> Vote | None:
    """The vote of an array, from those of its slabs."""
    votes = [step.cast for step in steps if step.cast is not None]
    if not votes:
        return None
    total = torch.stack([v.weight for v in votes]).sum(0)
    agreed = torch.stack([v.weight * v.array for v in votes]).sum(0)
    rows = [v.rows for v in votes if v.rows is not None]
    weights = [v.row_weight for v in votes if v.row_weight is not None]
    counts = took_a_step & (total > 0)
    array = (agreed / total).masked_fill(~counts, 0.0)
    return Vote(
        torch.cat(rows, 1) if rows else None,
        torch.cat(weights, 1) if weights else None,
        total,
        array,
        counts,
        plan.size,
    )


def _evidence(steps: Sequence[New], plan: StatePlan) -> Evidence | None:
    """The evidence of an array, from that of its slabs."""
    parts = [step.found for step in steps if step.found is not None]
    if not parts:
        return None
    walk_square, moved, gradient_square = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    return Evidence(walk_square, (moved > 0) * float(plan.size), gradient_square)


def _squares(g: Tensor) -> tuple[Tensor, Tensor]:
    """The mean square of every row, and the sum of squares of every column."""
    across = tuple(range(2, g.ndim))
    q = g.square()
    return q.mean(across, keepdim=True), q.sum(1, keepdim=True)


def _known(stored: States, row_means: Tensor, column_means: Tensor, beta: Decay) -> States:
    """What a slab must know of the whole array."""
    q = row_means + SQUARE_FLOOR
    known = {"columns": column_means, "squares": _mean(q)}
    for name in ("exp_avg_res_row", "spatial_variance"):
        if name in stored:
            known[name] = _mean(stored[name])
    if "exp_avg_sq_row" in stored:
        R = ema(beta, stored["exp_avg_sq_row"], q)
        known |= {"exp_avg_sq_row": _mean(R), "root": _mean(R.sqrt())}
    return known


def _mean(R: Tensor) -> Tensor:
    return R.mean(tuple(range(1, R.ndim)), keepdim=True)


def _cut(x: Tensor, plan: StatePlan, rows: int) -> Sequence[Tensor]:
    """The slabs of a stored state: along its first axis, which counts rows, or blocks in their order."""
    # Where blocks are as many as rows but no rows, no slab has whole blocks, and the array is computed whole.
    assert plan.block_size is not None
    width = plan.size // plan.shape[0]
    return torch.split(x, rows if x.shape[1] == plan.shape[0] else rows * width // plan.block_size, 1)
