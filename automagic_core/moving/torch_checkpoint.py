"""Reads and writes PyTorch checkpoint files of this optimizer.  Its functions need PyTorch."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from automagic_core.moving.late_import import needed
from automagic_core.moving.neutral import NeutralGroup
from automagic_core.moving.torch_dict import neutral_groups, state_dict_of
from automagic_core.moving.value_limits import check_range
from automagic_core.moving.whole_file import check_is_file, write_whole

SUFFIXES = (".pt", ".pth", ".bin")
_PURPOSE = "a PyTorch checkpoint"


def read_checkpoint(path: str | Path) -> list[NeutralGroup]:
    """Reads the groups of a checkpoint: ``optimizer.state_dict()``, or a dict with that under ``"optimizer"``.

    The file is read with ``weights_only=True``, so that no code in it can run.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file.
        ValueError: the file is damaged or holds something else; the message says what.
        ImportError: PyTorch is missing; the message says how to get it.
    """
    torch = needed("torch", "torch", _PURPOSE)
    check_is_file(path)
    _check_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind fails in many ways
        raise ValueError(f"{path} cannot be read as weights alone: {error}") from error
    if isinstance(loaded, Mapping) and "optimizer" in loaded and "param_groups" not in loaded:
        loaded = loaded["optimizer"]
    if not isinstance(loaded, Mapping):
        raise ValueError(
            f"{path} holds {type(loaded).__name__}; valid: a state dict, or a dict with one in 'optimizer'"
        )
    try:
        groups = neutral_groups(loaded)
        for index, group in enumerate(groups):
            _check_values(group.shared, f"group {index}")
            for array in group.arrays:
                _check_values(array.states, f"the state of {array.name}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return groups


def refuse_to_lose(path: str | Path) -> None:
    """Checks that a file may be replaced: it is not there, or holds an optimizer state and nothing else.

    Raises:
        ValueError: it holds something else, which would be lost; the message says what.
        ImportError: PyTorch is missing; the message says how to get it.
    """
    if not Path(path).is_file():
        return
    torch = needed("torch", "torch", _PURPOSE)
    try:
        loaded = torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # a file of another kind fails in many ways
        held = "what cannot be read as weights alone"
    else:
        if isinstance(loaded, Mapping) and set(loaded) in ({"state", "param_groups"}, {"optimizer"}, set()):
            return
        held = ", ".join(map(repr, loaded)) if isinstance(loaded, Mapping) else type(loaded).__name__
    raise ValueError(f"{path} is there and holds {held}, which would be lost; give a name of a file that is not there")


def _check_archive(path: str | Path) -> None:
    """Compares the file with its own checksums, which ``torch.load`` does not; old checkpoints have none."""
    try:
        damaged = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
    except Exception as error:  # a damaged archive fails in many ways
        raise ValueError(f"{path} is damaged: {error}") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: {damaged!r} in it does not have the checksum that the file names")


def _check_values(states: Mapping[str, np.ndarray], owner: str) -> None:
    """Refuses numbers that no run can have written.  `check_group` checks everything else."""
    for name, value in states.items():
        if value.size and value.dtype in (np.float32, np.int32):
            check_range(float(value.min()), float(value.max()), name, owner)


def write_checkpoint(path: str | Path, groups: Sequence[NeutralGroup]) -> None:
    """Writes a state dict that ``torch.load(path, weights_only=True)`` reads for ``optimizer.load_state_dict``.

    Raises:
        ImportError: PyTorch is missing; the message says how to get it.
    """
    torch = needed("torch", "torch", _PURPOSE)
    state_dict: Any = state_dict_of(groups, lambda array: torch.tensor(array))
    write_whole(path, lambda file: torch.save(state_dict, file))
