"""Keywords that are no fields: an error says what to use instead, whichever way they come."""

from __future__ import annotations

import re

import pytest

from automagic_core import FIELD_NAMES, Config
from automagic_core.config.not_here import INSTEAD

ORIGINAL = {
    "lr_bump": 3e-6,
    "eps": (1e-30, 1e-16, 1e-8),
    "clip_threshold": 1.0,
    "eta": 2.0,
    "beta1_decay": 0.9995,
    "context_window": 30,
    "adaptation_rate": 0.25,
    "came": True,
    "full_finetune": False,
    "detail_preservation": 0.8,
    "fused_adam": False,
}
"""The original's defaults."""


def test_every_field_of_the_original_is_a_field_or_has_an_answer() -> None:
    assert INSTEAD.keys() == ORIGINAL.keys()
    assert not INSTEAD.keys() & set(FIELD_NAMES)


@pytest.mark.parametrize("name", INSTEAD)
@pytest.mark.parametrize("value", ["original", None, "1e-8"])
def test_the_answer_is_the_error(name: str, value: object) -> None:
    """Also for a value that another library hands over as text, or as None for its own default."""
    value = ORIGINAL[name] if value == "original" else value
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        Config(profile="balanced", **{name: value})
    assert str(error.value) == f"unknown field {name} = {value!r}; {INSTEAD[name]}"


@pytest.mark.parametrize("name", INSTEAD)
def test_the_answer_names_fields_that_there_are(name: str) -> None:
    text = INSTEAD[name]
    named = re.findall(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b", text)
    assert set(named) <= set(FIELD_NAMES)
    assert named or text.startswith("leave it out: ")
    assert len(text) < 120
    assert "did you mean" not in text


def test_a_config_of_the_original_gets_all_answers_at_once() -> None:
    with pytest.raises(ValueError, match="unknown field") as error:
        Config(**ORIGINAL, lr=1e-4, warmup_step=3)
    lines = str(error.value).split("\n")
    assert [line.split()[2] for line in lines] == [*ORIGINAL, "warmup_step"]
    assert "did you mean 'warmup_steps'" in lines[-1]
