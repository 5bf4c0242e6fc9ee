"""Does a sample show a digit, and which?  A classifier of real digits answers."""

from typing import NamedTuple

import numpy as np
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

from examples.digits_diffusion.data import NEW_CLASSES, Digits
from examples.digits_diffusion.settings import Settings


class Verdict(NamedTuple):
    """How many samples the classifier called each of the ten digits."""

    counts: np.ndarray

    @property
    def new_share(self) -> float:
        return float(self.counts[list(NEW_CLASSES)].sum() / self.counts.sum())


def train_classifier(digits: Digits) -> tuple[SVC, float]:
    """The classifier, and its accuracy on images that it has not seen."""
    classifier = SVC(C=10.0, gamma="scale")
    accuracy = cross_val_score(classifier, digits.images, digits.labels).mean()
    return classifier.fit(digits.images, digits.labels), float(accuracy)


def judge(classifier: SVC, samples: np.ndarray) -> Verdict:
    return Verdict(np.bincount(classifier.predict(samples), minlength=10))


def failures(before: Verdict, after: Verdict, settings: Settings) -> list[str]:
    """What the fine-tuning was to achieve and did not, in words; empty when all went well."""
    found = []
    if not after.new_share >= settings.least_after:
        found.append(
            f"after the fine-tuning {after.new_share:.1%} of the samples are called 5 to 9, "
            f"less than {settings.least_after:.0%}"
        )
    if not before.new_share <= settings.most_before:
        found.append(
            f"before the fine-tuning {before.new_share:.1%} of the samples are called 5 to 9 already, "
            f"more than {settings.most_before:.0%}"
        )
    missing = [str(digit) for digit in NEW_CLASSES if after.counts[digit] == 0]
    if missing:
        found.append(f"after the fine-tuning no sample is called {', '.join(missing)}")
    return found
