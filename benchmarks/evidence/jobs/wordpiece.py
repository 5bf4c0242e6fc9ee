"""BERT's tokenizer for lower-cased text: words and marks, cut greedily into the longest known pieces."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

LONGEST_WORD = 100
"""Characters; a longer word counts as unknown."""


class WordPiece:
    """Text → ids of pieces.

    Args:
        vocabulary: a file with one piece a line; a line's number is the piece's id.
    """

    def __init__(self, vocabulary: Path) -> None:
        pieces = vocabulary.read_text(encoding="utf-8").splitlines()
        self.ids = {piece: index for index, piece in enumerate(pieces)}
        self.pad, self.unknown = self.ids["[PAD]"], self.ids["[UNK]"]
        self.first, self.last = self.ids["[CLS]"], self.ids["[SEP]"]

    def __call__(self, text: str, length: int) -> list[int]:
        """Ids between [CLS] and [SEP], cut to `length` in all."""
        ids: list[int] = []
        for word in words(text):
            ids += self._pieces(word)
            if len(ids) >= length - 2:
                break
        return [self.first, *ids[: length - 2], self.last]

    def _pieces(self, word: str) -> list[int]:
        if len(word) > LONGEST_WORD:
            return [self.unknown]
        found, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(len(word), start, -1):
                piece = self.ids.get(prefix + word[start:end])
                if piece is not None:
                    break
            else:
                return [self.unknown]
            found.append(piece)
            start = end
        return found


def words(text: str) -> list[str]:
    """Lower-cased words without accents; every punctuation mark and every Chinese character is a word."""
    plain = unicodedata.normalize("NFD", _clean(text).lower())
    plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
    return "".join(f" {c} " if _stands_alone(c) else c for c in plain).split()


def _clean(text: str) -> str:
    text = re.sub(r"\s", " ", text)
    return "".join(c for c in text if c == " " or (c != "\ufffd" and not unicodedata.category(c).startswith("C")))


def _stands_alone(c: str) -> bool:
    ascii_mark = c.isascii() and c.isprintable() and not c.isalnum() and c != " "
    ideograph = "\u4e00" <= c <= "\u9fff" or "\u3400" <= c <= "\u4dbf" or "\uf900" <= c <= "\ufaff"
    return ascii_mark or ideograph or unicodedata.category(c).startswith("P")
