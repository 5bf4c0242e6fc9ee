"""Collects what was lost or changed when a run was converted, and logs each sentence once."""

from __future__ import annotations

import logging

_NAMES_SHOWN = 3


class Notes:
    """Sentences about what changed and what was lost.

    Each sentence is kept once, with the arrays that it concerns.  `tell` logs losses at WARNING, the rest at INFO.
    """

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, str], list[str]] = {}

    def changed(self, sentence: str, array: str | None = None) -> None:
        """Notes that something is kept in another form, or begins as in a new run."""
        self._add(logging.INFO, sentence, array)

    def lost(self, sentence: str, array: str | None = None) -> None:
        """Notes that something is gone, or only approximated."""
        self._add(logging.WARNING, sentence, array)

    def _add(self, level: int, sentence: str, array: str | None) -> None:
        arrays = self._arrays.setdefault((level, sentence), [])
        if array is not None:
            arrays.append(array)

    def tell(self, logger_name: str) -> list[str]:
        """Logs all sentences and returns them, losses first."""
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
