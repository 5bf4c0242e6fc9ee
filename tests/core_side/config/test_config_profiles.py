"""The last table of section 7, and that a field given beside a profile wins."""

from __future__ import annotations

from typing import Any

import pytest

from automagic_core import FIELD_NAMES, PROFILES, Config, OptimizationProfiles

TABLE: dict[str, dict[str, Any]] = {
    "memory_optimized": {
        "factored": "all",
        "min_8bit_size": 1024,
        "force_8bit": True,
        "edge_suppression": False,
        "frequency_penalty": 0.0,
        "spatial_awareness": False,
        "background_regularization": False,
        "lora_rank_penalty": False,
    },
    "balanced": {
        "factored": "second_moment",
        "min_8bit_size": 1024,
        "spatial_awareness": False,
        "background_regularization": False,
        "lora_rank_penalty": False,
    },
    "quality_optimized": {
        "factored": "none",
        "edge_penalty": 0.15,
        "frequency_penalty": 0.08,
    },
}


@pytest.mark.parametrize("profile", TABLE)
def test_a_profile_sets_its_row_and_nothing_else(profile: str) -> None:
    config = Config(profile=profile)
    assert config.__dict__ == {**Config().__dict__, **TABLE[profile], "profile": profile}
    assert set(PROFILES) == set(TABLE)


@pytest.mark.parametrize("profile", TABLE)
def test_a_field_beside_the_profile_wins(profile: str) -> None:
    for name, value in TABLE[profile].items():
        other = getattr(Config(), name)
        # Given as the default: it must still win over the profile.
        assert getattr(Config(**{"profile": profile, name: other}), name) == other
        # The other fields of the profile stay.
        rest = {key: TABLE[profile][key] for key in TABLE[profile] if key != name}
        assert rest.items() <= Config(**{name: other, "profile": profile}).__dict__.items()
        assert getattr(Config(profile=profile), name) == value


@pytest.mark.parametrize("profile", TABLE)
def test_methods_are_the_profiles(profile: str) -> None:
    method = getattr(OptimizationProfiles, profile)
    assert method() == Config(profile=profile)
    assert method(factored="none", lr=1e-4) == Config(profile=profile, factored="none", lr=1e-4)
    with pytest.raises(ValueError, match="nonsense"):
        method(nonsense=1)


@pytest.mark.parametrize("profile", [None, *TABLE])
def test_dict_round_trip(profile: str | None) -> None:
    other = Config(profile=profile, lr=1e-4, factored="second_moment", betas=(0.8, 0.9, 0.95), verbose=True)
    copy = Config(**other.__dict__)
    assert copy == other
    assert copy is not other
    assert list(copy.__dict__) == list(FIELD_NAMES)
    copy.lr = 2e-4
    assert copy != other
    assert other.lr == 1e-4


def test_a_changed_field_survives_the_round_trip_with_a_profile() -> None:
    config = Config(profile="memory_optimized")
    config.factored = "none"
    assert Config(**config.__dict__).factored == "none"
