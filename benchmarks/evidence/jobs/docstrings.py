"""A text classification task that ships with Python: which of its packages does a docstring describe?"""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

PACKAGES = (
    "asyncio",
    "email",
    "http",
    "importlib",
    "logging",
    "mailbox",
    "multiprocessing",
    "tarfile",
    "unittest",
    "urllib",
    "xml",
    "_pydecimal",
)
"""The classes: packages with many docstrings that every Python from 3.11 on ships."""
FEWEST_WORDS = 5
HELD_OUT_SHARE = 0.25


class Docstrings(NamedTuple):
    """Texts and their classes (indices into `PACKAGES`), split within every class."""

    train: list[str]
    train_labels: list[int]
    held_out: list[str]
    held_out_labels: list[int]


def docstrings(most: int) -> Docstrings:
    """Up to `most` docstrings of each package, each text once, shuffled from a fixed seed.

    Raises:
        FileNotFoundError: this Python has no sources of a package.
    """
    generator = torch.Generator().manual_seed(0)
    parts = Docstrings([], [], [], [])
    taken: set[str] = set()
    for label, package in enumerate(PACKAGES):
        # A text that two packages share says nothing: the first one keeps it, and no text is in both parts.
        texts = [text for text in dict.fromkeys(_of_package(package)) if text not in taken]
        taken.update(texts)
        if not texts:
            raise FileNotFoundError(f"no docstrings of {package} under {_folder()}; needed: the library's .py files")
        chosen = [texts[i] for i in torch.randperm(len(texts), generator=generator)[:most].tolist()]
        held = round(HELD_OUT_SHARE * len(chosen))
        parts.held_out.extend(chosen[:held])
        parts.held_out_labels.extend([label] * held)
        parts.train.extend(chosen[held:])
        parts.train_labels.extend([label] * (len(chosen) - held))
    return parts


def _folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _of_package(package: str) -> list[str]:
    folder = _folder() / package
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [_folder() / f"{package}.py"]
    found = []
    for path in files:
        if not path.is_file() or "test" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text.split()) >= FEWEST_WORDS:
                    found.append(text)
    return found
