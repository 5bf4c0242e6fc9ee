"""States go into the optimizer within a wrapper; other optimizers and other things than states are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from automagic_torch import (
    AutomagicCameAMP8bit,
    ProgressiveQuantization,
    load_adam_state,
    load_requantized,
    release_gradients,
)
from tests.torch_side.torch_helpers import SMALL, parameters, run, same, snapshot

TAKE = {"adam": load_adam_state, "own": load_requantized, "progressive": lambda o, _: ProgressiveQuantization(o, 10)}


class Lookahead:
    """Holds the groups of what it wraps, as timm's does."""

    def __init__(self, optimizer: Any) -> None:
        self._base_optimizer, self.param_groups = optimizer, optimizer.param_groups


class Lightning:
    """Has the class of what it wraps, as those of Lightning and its Fabric have."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Lightning", (type(self), type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


WRAPPERS = [Lookahead, Lightning, lambda o: SimpleNamespace(optimizer=o), lambda o: Lookahead(Lightning(o))]


def saved_by(kind: str) -> Any:
    params = parameters()
    optimizer: Any = torch.optim.AdamW(params) if kind == "adam" else AutomagicCameAMP8bit(params, **SMALL)
    run(optimizer, range(3))
    return optimizer.state_dict()


@pytest.mark.parametrize("kind", TAKE)
def test_another_optimizer_is_named(kind: str) -> None:
    with pytest.raises(TypeError, match="optimizer is a AdamW; valid: an AutomagicCameAMP8bit"):
        TAKE[kind](torch.optim.AdamW(parameters()), saved_by(kind))


@pytest.mark.parametrize("kind", ["adam", "own"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_optimizer_in_a_wrapper_takes_the_state(kind: str, wrapper: Any) -> None:
    plain, inside = (AutomagicCameAMP8bit(parameters(), **SMALL) for _ in range(2))
    wrapped, saved = wrapper(inside), saved_by(kind)
    assert TAKE[kind](wrapped, saved) == TAKE[kind](plain, saved)
    assert inside.state
    assert same(snapshot(inside), snapshot(plain))
    if hasattr(wrapped, "param_groups"):  # a scheduler sets the rate there
        assert wrapped.param_groups is inside.param_groups
    assert ProgressiveQuantization(wrapped, 10).optimizer is inside


@pytest.mark.parametrize("kind", ["adam", "own"])
def test_what_is_no_state_is_refused(kind: str) -> None:
    optimizer = AutomagicCameAMP8bit(parameters(), **SMALL)
    with pytest.raises(ValueError, match="state is a AdamW; valid: a dict"):
        TAKE[kind](optimizer, torch.optim.AdamW(parameters()))
    for name in ("state", "param_groups"):
        with pytest.raises(ValueError, match=f"state has a int as '{name}'; valid: what state_dict"):
            TAKE[kind](optimizer, saved_by(kind) | {name: 3})


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_releases_no_gradients(wrapper: Any) -> None:
    optimizer = AutomagicCameAMP8bit(parameters(), **SMALL)
    with pytest.raises(TypeError, match="a wrapper's own optimizer is the one to give"):
        release_gradients(wrapper(optimizer))
    assert optimizer._gradient_release is None
