"""What a migration has to say: collected array by array, told once for all arrays that it concerns."""

from __future__ import annotations

import logging

_NAMES_SHOWN = 3


class Notes:
    """Sentences about what was carried over and what was not.

    Each is kept once, with the arrays that it concerns.  `tell` logs them: what is lost at WARNING, the rest at INFO.
    """

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, str], list[str]] = {}

    def changed(self, sentence: str, array: str | None = None) -> None:
        """Something is kept in another form, or begins as in a new run."""
        self._add(logging.INFO, sentence, array)

    def lost(self, sentence: str, array: str | None = None) -> None:
        """Something that the old run had is gone, or only approximated."""
        self._add(logging.WARNING, sentence, array)

    def _add(self, level: int, sentence: str, array: str | None) -> None:
        arrays = self._arrays.setdefault((level, sentence), [])
        if array is not None:
            arrays.append(array)

    def tell(self, logger_name: str) -> list[str]:
        """Logs every sentence, and returns them: what is lost comes first."""
        logger = logging.getLogger(logger_name)
        told = []
        for (level, sentence), arrays in sorted(self._arrays.items(), key=lambda item: -item[0][0]):
            text = sentence + _listed(arrays)
            logger.log(level, text)
            told.append(text)
        return told


def _listed(arrays: list[str]) -> str:
    if not arrays:
        return ""
    more = f" and {len(arrays) - _NAMES_SHOWN} more" if len(arrays) > _NAMES_SHOWN else ""
    return f" ({', '.join(arrays[:_NAMES_SHOWN])}{more})"
