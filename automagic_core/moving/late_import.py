"""Packages that only some functions need: imported when they are called."""

from __future__ import annotations

import importlib
from typing import Any


def needed(module: str, extra: str, purpose: str) -> Any:
    """The module.

    Args:
        module: as in an import statement.
        extra: of this package, which brings it.
        purpose: what it is needed for.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(
            f"{purpose} needs {package}, which is not installed: pip install 'automagic-cameamp[{extra}]' brings it"
        ) from error
