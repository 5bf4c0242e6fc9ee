"""Reads and writes safetensors files whose every byte is covered by a checksum.

The metadata in the header holds a format name, a version, a description in JSON and a SHA-256.  The digest is that of
the whole file with 64 zeros in place of the digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from automagic_core.moving.late_import import needed
from automagic_core.moving.whole_file import check_is_file, write_whole

_PURPOSE = "a neutral state file"
_LENGTH = 8
"""A safetensors file begins with this many bytes, which hold the length of its header."""
_BLANK = "0" * 64


def write_sealed(
    path: str | Path, tensors: Mapping[str, np.ndarray], description: Any, *, file_format: str, version: str
) -> None:
    """Writes tensors and their description; the file appears whole or not at all.

    Args:
        path: of the file; an old file is replaced.
        tensors: by name.
        description: anything that JSON can hold.
        file_format, version: must be the same when the file is read.

    Raises:
        ValueError: the description holds what JSON cannot.
        ImportError: safetensors is missing; the message says how to get it.
    """
    safetensors = needed("safetensors.numpy", "files", _PURPOSE)
    try:
        text = json.dumps(description, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the description cannot be written as JSON: {error}") from error
    metadata = {"format": file_format, "version": version, "sha256": _BLANK, "description": text}
    arrays = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in tensors.items()}
    data = bytearray(safetensors.save(arrays, metadata=metadata))
    start = _start_of_digest(data, _BLANK)
    data[start : start + len(_BLANK)] = hashlib.sha256(data).hexdigest().encode()
    write_whole(path, lambda file: file.write(data))


def read_sealed(path: str | Path, *, file_format: str, version: str) -> tuple[dict[str, np.ndarray], Any]:
    """Reads the tensors and the description of a file that `write_sealed` wrote.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file.
        ValueError: it is cut short, of another format or version, or a byte of it was changed.
        ImportError: safetensors is missing; the message says how to get it.
    """
    safetensors = needed("safetensors.numpy", "files", _PURPOSE)
    path = Path(path)
    check_is_file(path)
    data = path.read_bytes()
    metadata = _metadata(data, path)
    if metadata.get("format") != file_format:
        raise ValueError(f"{path} has the format {metadata.get('format')!r}; valid: {file_format!r}")
    if metadata.get("version") != version:
        raise ValueError(f"{path} has version {metadata.get('version')!r} of its format; valid: {version!r}")
    if not _is_whole(data, metadata.get("sha256")):
        raise ValueError(f"{path} is damaged: its bytes do not have the SHA-256 that it names")
    try:
        return safetensors.load(data), json.loads(metadata["description"])
    except Exception as error:  # safetensors has error types of its own
        raise ValueError(f"{path} cannot be read: {error}") from error


def is_sealed(path: str | Path, file_format: str) -> bool:
    """Whether a file says that it has a format; its contents are not looked at."""
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        header = file.read(min(length, Path(path).stat().st_size))
    try:
        return bool(json.loads(header)["__metadata__"]["format"] == file_format)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _metadata(data: bytes, path: Path) -> Mapping[str, Any]:
    length = int.from_bytes(data[:_LENGTH], "little")
    if len(data) < _LENGTH or length > len(data) - _LENGTH:
        raise ValueError(f"{path} is no safetensors file, or is cut short: {len(data)} bytes do not hold its header")
    try:
        header = json.loads(data[_LENGTH : _LENGTH + length])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        missing = max(ends, default=0) - (len(data) - _LENGTH - length)
        metadata = header.get("__metadata__", {})
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged: its header cannot be read") from error
    if missing > 0:
        raise ValueError(f"{path} is cut short: {missing} bytes of data are missing")
    if not isinstance(metadata, Mapping):
        raise ValueError(f"{path} is damaged: its metadata is no mapping")
    return metadata


def _is_whole(data: bytes, digest: Any) -> bool:
    start = _start_of_digest(data, digest) if isinstance(digest, str) and len(digest) == len(_BLANK) else -1
    if start < 0:
        return False
    found = hashlib.sha256(memoryview(data)[:start])
    found.update(_BLANK.encode())
    found.update(memoryview(data)[start + len(_BLANK) :])
    return bool(found.hexdigest() == digest)


def _start_of_digest(data: bytes | bytearray, digest: str) -> int:
    """Index of the digest's first byte, or −1.  Quotes in the description are escaped, so it cannot match there."""
    mark = b'"sha256":"'
    header = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    start = data.find(mark + digest.encode("ascii", "replace") + b'"', _LENGTH, header)
    return start + len(mark) if start >= 0 else -1
