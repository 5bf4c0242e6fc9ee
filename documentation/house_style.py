"""Reads the docstrings of this project as Google's, for the pages of the API."""

from __future__ import annotations

import re
from typing import Any

import griffe


class HouseStyle(griffe.Extension):
    """Calls the section "Example" by Google's name, so that its code is shown as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
