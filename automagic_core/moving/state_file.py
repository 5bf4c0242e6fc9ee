"""The state file: the neutral form of a run's state as safetensors (docs/algorithm.md, section 11.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from automagic_core.moving.earlier import as_now
from automagic_core.moving.neutral import NeutralArray, NeutralGroup, check_group
from automagic_core.moving.sealed_tensors import is_sealed, read_sealed, write_sealed

FILE_FORMAT = "automagic-cameamp-state"
FILE_VERSION = "1"

_GROUP = ("fields", "layout", "step", "named", "others", "shared", "parameters")
_PARAMETER = ("name", "shape", "embedding", "lora", "states")


def write_groups(path: str | Path, groups: Sequence[NeutralGroup]) -> None:
    """Writes a run's groups.

    Args:
        path: of the file; an old file is replaced as a whole.
        groups: are checked first.

    Raises:
        ValueError: something does not fit or cannot be written; the message says what.  `path` stays as it was.
        ImportError: safetensors is missing; the message says how to get it.
    """
    tensors: dict[str, np.ndarray] = {}
    described = []
    for index, group in enumerate(groups):
        label = _label(index)
        check_group(group, label)
        _check_others(group.others, label)
        tensors |= {_shared_key(index, name): value for name, value in group.shared.items()}
        for array in group.arrays:
            tensors |= {_state_key(index, array.name, state): value for state, value in array.states.items()}
        described.append(
            {
                "fields": dict(group.fields),
                "layout": group.layout,
                "step": group.step,
                "named": group.named,
                "others": dict(group.others),
                "shared": sorted(group.shared),
                "parameters": [
                    {
                        "name": array.name,
                        "shape": None if array.shape is None else list(array.shape),
                        "embedding": array.embedding,
                        "lora": array.lora,
                        "states": sorted(array.states),
                    }
                    for array in group.arrays
                ],
            }
        )
    write_sealed(path, tensors, {"groups": described}, file_format=FILE_FORMAT, version=FILE_VERSION)


def refuse_to_replace(path: str | Path) -> None:
    """Checks that a file may be replaced: it is not there, or is a state file.

    Raises:
        ValueError: it is something else, which would be lost.
    """
    if Path(path).is_file() and not is_sealed(path, FILE_FORMAT):
        raise ValueError(
            f"{path} is there and is no state file, so it would be lost; give a name of a file that is not there"
        )


def read_groups(path: str | Path) -> list[NeutralGroup]:
    """Reads a run's groups.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file.
        ValueError: another format or version, a damaged file, or contents that do not fit; the message says what.
        ImportError: safetensors is missing; the message says how to get it.
    """
    tensors, description = read_sealed(path, file_format=FILE_FORMAT, version=FILE_VERSION)
    try:
        (described,) = _entries(description, ("groups",), str(path))
        groups = [_group(entry, index, tensors) for index, entry in enumerate(described)]
    except (TypeError, AttributeError) as error:  # from lists and mappings that another program put in wrong places
        raise ValueError(f"{path} has a description that does not fit: {error}") from error
    if tensors:
        raise ValueError(f"{path} has tensors that its description does not name: {', '.join(sorted(tensors))}")
    return groups


def _group(described: Any, index: int, tensors: dict[str, np.ndarray]) -> NeutralGroup:
    """Makes one group and removes its tensors from `tensors`."""
    label = _label(index)
    fields, layout, step, named, others, shared, parameters = _entries(described, _GROUP, label)
    group = NeutralGroup(
        # JSON has no tuples, which `betas` is.
        fields={name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()},
        layout=layout,
        step=step,
        shared={name: _taken(tensors, _shared_key(index, name)) for name in shared},
        arrays=tuple(_array(entry, index, tensors) for entry in parameters),
        named=named,
        others=others,
    )
    group = _of_any_version(group, label)
    check_group(group, label)
    return group


def _of_any_version(group: NeutralGroup, label: str) -> NeutralGroup:
    try:
        return as_now(group)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{label} does not fit: {error}") from error


def _array(described: Any, index: int, tensors: dict[str, np.ndarray]) -> NeutralArray:
    name, shape, embedding, lora, states = _entries(described, _PARAMETER, f"a parameter of {_label(index)}")
    if shape is not None and not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
        raise ValueError(f"{name} has the shape {shape!r}; valid: a list of lengths, or null")
    for mark, value in (("embedding", embedding), ("lora", lora)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} has {mark} = {value!r}; valid: true, false")
    held = {state: _taken(tensors, _state_key(index, name, state)) for state in states}
    return NeutralArray(name, None if shape is None else tuple(shape), embedding, lora, held)


def _entries(described: Any, names: Sequence[str], label: str) -> list[Any]:
    """The values of these entries, in order; there must be no others."""
    if not isinstance(described, Mapping):
        raise ValueError(f"{label} is described by {type(described).__name__}; valid: a mapping")
    differing = [f"{name} ({'missing' if name in names else 'unknown'})" for name in sorted({*described} ^ {*names})]
    if differing:
        raise ValueError(f"{label} does not fit: {', '.join(differing)}")
    return [described[name] for name in names]


def _taken(tensors: dict[str, np.ndarray], key: str) -> np.ndarray:
    if key not in tensors:
        raise ValueError(f"the file has no tensor {key!r}, which its description names")
    return tensors.pop(key)


def _check_others(others: Mapping[str, Any], label: str) -> None:
    for name, value in others.items():
        if not (isinstance(name, str) and _is_json(value)):
            raise ValueError(
                f"{label} has {name} = {value!r}, which is none of this optimizer's fields; "
                "a neutral file holds only finite numbers, strings, lists and dicts beside them"
            )


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(entry) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_json, value))
    return math.isfinite(value) if isinstance(value, float) else value is None or isinstance(value, (bool, int, str))


def _label(index: int) -> str:
    return f"group {index}"


def _shared_key(index: int, name: str) -> str:
    return f"{index}/{name}"


def _state_key(index: int, parameter: str, state: str) -> str:
    return f"{index}/{parameter}/{state}"
