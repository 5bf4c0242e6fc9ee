"""Imports optional packages only when they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def needed(module: str, extra: str, purpose: str) -> Any:
    """Imports a module.

    Args:
        module: its name, as in an import statement.
        extra: the extra of this package that installs it.
        purpose: what needs it, for the error.

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
