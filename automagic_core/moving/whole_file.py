"""Writes a file whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a temporary file beside `path` and then renames it to `path`.

    Args:
        path: of the file, in a folder that exists; an old file is replaced.  Of a symbolic link the file that it names.
        write: is called with the open file.  If it fails, `path` stays as it was.

    Raises:
        PermissionError: the old file may not be written.
        IsADirectoryError, FileNotFoundError: `path` is a folder, or lies in none.
    """
    path = Path(os.path.realpath(path))
    # Else the error would name the temporary file.
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "this is a folder", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    if path.exists() and not path.stat().st_mode & stat.S_IWUSR:
        raise PermissionError(errno.EACCES, "the file is read-only", str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_is_file(path: str | Path) -> None:
    """Checks that there is a file.

    Raises:
        FileNotFoundError, IsADirectoryError: there is nothing, or a folder.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
