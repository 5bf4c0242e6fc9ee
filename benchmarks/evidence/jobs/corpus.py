"""Bytes to read that every machine with this project has: Python's standard library, and C headers."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

HELD_OUT_EVERY = 8
"""Every eighth file is held out."""
LONGEST = 40_000
"""Bytes taken of one file: no single table or class may be most of a corpus."""


class Corpus(NamedTuple):
    """Bytes as uint8 arrays of one axis, split by file."""

    train: np.ndarray
    held_out: np.ndarray


@cache
def standard_library() -> Corpus:
    """The top-level modules of Python's standard library."""
    return _corpus(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))


@cache
def c_headers() -> Corpus:
    """The C headers of Python and of numpy."""
    # numpy's come with it, Python's are missing where a distribution keeps them in a package of its own.
    files = [path for folder in (sysconfig.get_paths()["include"], np.get_include()) for path in _headers(Path(folder))]
    return _corpus(files)


def _headers(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.h"))


def _corpus(files: Sequence[Path]) -> Corpus:
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, path in enumerate(files):
        held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        parts[held_out].append(path.read_bytes()[:LONGEST])
    train, held = (np.frombuffer(b"".join(part), np.uint8) for part in parts)
    return Corpus(train, held)


def kept(corpus: Corpus) -> dict[str, Tensor]:
    """The corpus as part of a base, so that runs on another machine read the same bytes."""
    return {name: torch.tensor(part) for name, part in corpus._asdict().items()}


def corpus_of(base: Mapping[str, Any]) -> Corpus:
    """The corpus that a base holds."""
    return Corpus(*(base[name].numpy() for name in Corpus._fields))


def windows(text: np.ndarray, count: int, context: int, generator: torch.Generator) -> Tensor:
    """`count` random stretches of `context` + 1 bytes: int64 (count, context + 1)."""
    starts = torch.randint(len(text) - context - 1, (count,), generator=generator).numpy()
    return torch.from_numpy(text[starts[:, None] + np.arange(context + 1)].astype(np.int64))
