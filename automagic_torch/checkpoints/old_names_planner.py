"""Reads directories of `torch.distributed.checkpoint` that an earlier version wrote."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner

from automagic_core.arrays.group_keys import (
    EFFECTIVE_LR,
    LOG_RATE_SCALE,
    PEAK_AGREEMENT,
    PREFIX,
    SEARCH_KEYS,
    group_key,
)
from automagic_core.arrays.state_forms import COMPANDED, STATE_NAMES, Form, moment_of
from automagic_core.codec.blocks import absmax_shape
from automagic_core.moving.earlier_forms import form_of, moved
from automagic_torch.arrays.dtensors import is_dtensor
from automagic_torch.sharding.split import chunk_borders

_BEGINS = {"walk": 0, **dict.fromkeys(SEARCH_KEYS[1:], 0), PEAK_AGREEMENT: -1}
_FIELDS = set(map(group_key, ("search_gain", "straightness", "agreement_floor", "spatial_scope")))


class OldNamesLoadPlanner(DefaultLoadPlanner):
    """The `planner=` with which ``torch.distributed.checkpoint.load`` reads a directory of any version.

    In that version the keys of `param_groups` had no prefix (section 6.1), ℓ was called `lr_scale`, and there was no
    walk.  The default planner refuses such a directory with ``Missing key in checkpoint state_dict: …`` before the
    optimizer sees it, and with ``allow_partial_load=True`` it leaves the step counter and the found rate of a fresh
    optimizer.  The search counts as climbed, and its walk begins here.  Fields that 0.1.0 had not
    stay as the optimizer has them.

    Moments of narrow arrays (section 1.2) had other forms.  Every process reads these whole and brings them into
    today's form.

    Args:
        **options: those of ``DefaultLoadPlanner``; ``allow_partial_load=True`` for a checkpoint that a single process
            without a process group saved after the warm-up.

    Example:
        >>> dcp.load(state, checkpoint_id=path, planner=OldNamesLoadPlanner())
    """

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        """As in ``DefaultLoadPlanner``; `metadata` then has each old entry by its present name too."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        saved = metadata.state_dict_metadata
        missing = [name for name in self.state_dict if name not in saved]
        present = {name: _old_name(name) for name in missing}
        for name, old in present.items():
            key = name.rpartition(".")[2]
            if old in saved:
                saved[name] = saved[old]
            elif key == EFFECTIVE_LR:  # no input, but what a fresh optimizer has there is not this run's
                self.state_dict.pop(name).fill_(torch.nan)
            elif key in _BEGINS:
                self.state_dict.pop(name).fill_(_BEGINS[key])
            elif key in _FIELDS:
                self.state_dict.pop(name)
        for index, place in list(metadata.storage_data.items()):
            for name in (name for name, old in present.items() if old == index.fqn):
                metadata.storage_data[replace(index, fqn=name)] = place
        self._narrow = {
            place: moments
            for place in {name.rpartition(".")[0] for name in missing if name.rpartition(".")[2] in STATE_NAMES}
            if (moments := self._moments_at(place, saved)) is not None
        }

    def finish_plan(self, new_plan: Any) -> Any:
        """As in ``DefaultLoadPlanner``; counts what is still to be read of every narrow array."""
        plan = super().finish_plan(new_plan)
        for item in plan.items:
            moments = self._narrow.get(item.dest_index.fqn.rpartition(".")[0])
            if moments is not None and item.dest_index.fqn.rpartition(".")[2] in moments.held:
                moments.unread += 1
        return plan

    def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
        """As in ``DefaultLoadPlanner``; the last tensor of a narrow array's moments completes it."""
        super().commit_tensor(read_item, tensor)
        place, _, key = read_item.dest_index.fqn.rpartition(".")
        moments = self._narrow.get(place)
        if moments is not None and key in moments.held:
            moments.unread -= 1
            if moments.unread == 0:
                moments.complete()

    def _moments_at(self, place: str, saved: Any) -> _Moments | None:
        """Arranges that the moments of one array are read as they were saved; None where they have today's form."""

        def own(names: Any) -> list[str]:
            keys = (key for at, _, key in (name.rpartition(".") for name in names) if at == place)
            return [key for key in keys if key in STATE_NAMES and moment_of(key) in COMPANDED]

        wanted = {key: self.state_dict[f"{place}.{key}"] for key in own(self.state_dict)}
        forms = {key: saved[f"{place}.{key}"] for key in own(saved)}
        absmax = f"{place}.exp_avg_absmax"
        if not forms or wanted.keys() <= forms.keys() or (absmax in saved) != (absmax in self.state_dict):
            return None
        shape = tuple(saved[f"{place}.exp_avg"].size)
        blocks = tuple(saved[absmax].size) if absmax in saved else None
        sizes = [2**k for k in range(6, 13) if absmax_shape(shape, 2**k) == blocks]
        held = {key: torch.empty(form.size, dtype=form.properties.dtype) for key, form in forms.items()}
        for key in wanted:
            del self.state_dict[f"{place}.{key}"]
        self.state_dict |= {f"{place}.{key}": x for key, x in held.items()}
        return _Moments(shape, sizes[0] if len(sizes) == 1 else None, held, wanted)


@dataclass
class _Moments:
    """The moments of one array that are read in an earlier form.

    Attributes:
        shape: the array's.
        block_size: elements per block; None where it is one block.
        held: whole tensors in the saved form.
        wanted: the tensors to be filled.
        unread: how many pieces of `held` are not read yet.
    """

    shape: tuple[int, ...]
    block_size: int | None
    held: dict[str, Tensor]
    wanted: dict[str, Tensor]
    unread: int = 0

    def complete(self) -> None:
        forms: dict[str, Form] = {key: form_of(x) for key, x in self.wanted.items()}
        new = moved(self.held, forms, self.shape, self.block_size, lambda x: x.numpy(), torch.from_numpy)
        for key, x in self.wanted.items():
            _fill(x, new[key])


def _fill(x: Any, value: Tensor) -> None:
    """Writes a whole value into a tensor, or this process's piece of it into a DTensor."""
    if not is_dtensor(x):
        x.copy_(value)
        return
    for dim, placement in enumerate(x.placements):
        if placement.is_shard():
            borders = chunk_borders(value.shape[0], x.device_mesh.size(dim))
            index = x.device_mesh.get_local_rank(dim)
            value = value[borders[index] : borders[index + 1]]
    x.to_local().copy_(value)


def _old_name(name: str) -> str:
    """The name of an entry in a directory of version 0.1.0."""
    place, dot, key = name.rpartition(".")
    return place + dot + ("lr_scale" if key == LOG_RATE_SCALE else key.removeprefix(PREFIX))
