"""The 1,797 handwritten digits of scikit-learn, 8 by 8 pixels in 17 grey levels."""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIDE = 8
PIXELS = SIDE * SIDE
OLD_CLASSES = (0, 1, 2, 3, 4)
NEW_CLASSES = (5, 6, 7, 8, 9)
_HALF_RANGE = 8.0  # grey levels are 0 to 16


class Digits(NamedTuple):
    """Images as rows of 64 pixels in [-1, 1], and the digit that each one shows."""

    images: np.ndarray
    labels: np.ndarray

    def only(self, classes: tuple[int, ...]) -> "Digits":
        keep = np.isin(self.labels, classes)
        return Digits(self.images[keep], self.labels[keep])


def load() -> Digits:
    bunch = load_digits()
    return Digits((bunch.data / _HALF_RANGE - 1.0).astype(np.float32), bunch.target)


def to_grey_levels(images: np.ndarray) -> np.ndarray:
    """Rounds to the 17 levels that the real images have."""
    return np.round((np.asarray(images) + 1.0) * _HALF_RANGE) / _HALF_RANGE - 1.0


def split(digits: Digits, held_out: float, seed: int) -> tuple[Digits, Digits]:
    """Training and held-out images, with the same share of every class in both."""
    images, held_images, labels, held_labels = train_test_split(
        digits.images, digits.labels, test_size=held_out, random_state=seed, stratify=digits.labels
    )
    return Digits(images, labels), Digits(held_images, held_labels)
