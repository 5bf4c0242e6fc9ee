"""Reads directories of `torch.distributed.checkpoint` that version 0.1.0 wrote."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner

from automagic_core.arrays.group_keys import (
    EFFECTIVE_LR,
    LOG_RATE_SCALE,
    PEAK_AGREEMENT,
    PREFIX,
    SEARCH_KEYS,
    group_key,
)

_BEGINS = {"walk": 0, **dict.fromkeys(SEARCH_KEYS[1:], 0), PEAK_AGREEMENT: -1}
_FIELDS = set(map(group_key, ("search_gain", "straightness", "agreement_floor", "spatial_scope")))


class OldNamesLoadPlanner(DefaultLoadPlanner):
    """The `planner=` with which ``torch.distributed.checkpoint.load`` reads a directory of version 0.1.0, or today's.

    In that version the keys of `param_groups` had no prefix (section 6.1), ℓ was called `lr_scale`, and there was no
    walk.  The default planner refuses such a directory with ``Missing key in checkpoint state_dict: …`` before the
    optimizer sees it, and with ``allow_partial_load=True`` it leaves the step counter and the found rate of a fresh
    optimizer.  The search counts as climbed, and its walk begins here.  Fields that 0.1.0 had not
    stay as the optimizer has them.

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


def _old_name(name: str) -> str:
    """The name of an entry in a directory of version 0.1.0."""
    place, dot, key = name.rpartition(".")
    return place + dot + ("lr_scale" if key == LOG_RATE_SCALE else key.removeprefix(PREFIX))
