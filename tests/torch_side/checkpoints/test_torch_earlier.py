"""What version 0.1.0 saved in the midst of its search: groups without the fields of today's, arrays without `walk`."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from automagic_core.arrays.group_keys import PEAK_AGREEMENT, SEARCH_KEYS
from automagic_core.moving.state_file import read_groups, write_groups
from automagic_core.moving.torch_dict import neutral_groups
from automagic_torch import AutomagicCameAMP8bit
from tests.torch_side.torch_helpers import FIRST, SMALL, parameters, run, same, set_gradients

NEW = {"search_gain", "straightness", "agreement_floor", "walk_energy", "agreement", "peak_agreement"}
NEW |= {"first_norm", "gradient_norm"}
SHAPES = ((8, 6), (12, 4), (5,))


def earlier(content: dict[str, Any], gain: float) -> dict[str, Any]:
    """A state dict, or what a pickle holds, as that version had it: no prefixes, ℓ as `lr_scale`, one gain for all."""
    content = copy.deepcopy(content)
    groups = [{key.removeprefix("automagic_"): value for key, value in g.items()} for g in content["param_groups"]]
    content["param_groups"] = [
        {"lr_scale" if key == "log_rate_scale" else key: value for key, value in group.items() if key not in NEW}
        | {"lr_mask_gain": gain}
        for group in groups
    ]
    for state in content["state"].values():
        state.pop("walk", None)
    return content


def made(steps: int, **fields: Any) -> AutomagicCameAMP8bit:
    params = parameters(SHAPES)
    params[1]._is_embedding = True  # type: ignore[attr-defined]
    optimizer = AutomagicCameAMP8bit(params, **SMALL | {"layout": "flax", "warmup_steps": 40} | fields)
    run(optimizer, range(steps))
    return optimizer


def loaded(source: AutomagicCameAMP8bit, gain: float, way: str) -> AutomagicCameAMP8bit:
    if way == "state dict":
        other = made(0)
        other.load_state_dict(earlier(source.state_dict(), gain))
        return other
    # In a copy parameters have no marks.  The embedding's rows are others than those of a kernel of its shape.
    other = AutomagicCameAMP8bit.__new__(AutomagicCameAMP8bit)
    content = earlier(source.__getstate__(), gain)
    for group in content["param_groups"]:
        assert not any(hasattr(p, "_is_embedding") for p in group["params"])
    other.__setstate__(content)
    return other


@pytest.mark.parametrize("way", ["state dict", "pickle"])
def test_the_search_goes_on_from_the_rate_found_and_measures_from_there(way: str) -> None:
    source = made(6)
    ell = float(source.param_groups[0]["automagic_log_rate_scale"])
    other = loaded(source, 0.2, way)
    (group,) = other.param_groups
    assert [float(group[key]) for key in SEARCH_KEYS] == [ell, 0, 0, -1, 0, 0]
    assert ell > FIRST
    assert (group["automagic_search_gain"], group["automagic_lr_mask_gain"]) == (0.5, 0.2)
    for p, q in zip(source.param_groups[0]["params"], group["params"], strict=True):
        assert same(other.state[q], source.state[p] | {"walk": torch.zeros_like(source.state[p]["walk"])})
    # From here on it is a run of today: the same as one whose search is set back by hand.
    for key in SEARCH_KEYS[1:]:
        source.param_groups[0][key] = torch.full((), -1.0 if key == PEAK_AGREEMENT else 0.0)
    for p in source.param_groups[0]["params"]:
        source.state[p]["walk"] = torch.zeros_like(source.state[p]["walk"])
    source.param_groups[0]["automagic_straightness"] = 1.2
    for q, p in zip(group["params"], source.param_groups[0]["params"], strict=True):
        q.data.copy_(p.data)
    run(source, range(6, 12))
    run(other, range(6, 12))
    assert same(source.state_dict()["state"], other.state_dict()["state"])
    assert float(group["automagic_log_rate_scale"]) > ell


@pytest.mark.parametrize("way", ["state dict", "pickle"])
def test_a_search_that_was_off_or_over_stays_so(way: str) -> None:
    off = loaded(made(6, search_gain=0, lr_mask_gain=0), 0.0, way)
    assert off.param_groups[0]["automagic_search_gain"] == 0
    over = loaded(made(6, warmup_steps=4), 0.2, way)
    for optimizer in (off, over):
        ell = float(optimizer.param_groups[0]["automagic_log_rate_scale"])
        run(optimizer, range(6, 9))
        assert not any({"walk", "last_polarity"} & state.keys() for state in optimizer.state.values())
        assert float(optimizer.param_groups[0]["automagic_log_rate_scale"]) == ell


def test_a_neutral_file_begins_the_walk_too(tmp_path: Any) -> None:
    source = made(6)
    (group,) = neutral_groups(earlier(source.state_dict(), 0.2))
    ell = source.param_groups[0]["automagic_log_rate_scale"].numpy()
    assert {name: float(value) for name, value in group.shared.items()} == {
        "log_rate_scale": ell,
        "walk_energy": 0,
        "agreement": 0,
        "peak_agreement": -1,
        "first_norm": 0,
        "gradient_norm": 0,
    }
    for array, p in zip(group.arrays, source.param_groups[0]["params"], strict=True):
        assert array.states["walk"].shape == tuple(source.state[p]["walk"].shape)
        assert not array.states["walk"].any()
    # Whoever knows the marks sets them, as `convert` does.
    arrays = tuple(dataclasses.replace(array, embedding=array.shape == (12, 4)) for array in group.arrays)
    write_groups(tmp_path / "run.safetensors", [dataclasses.replace(group, arrays=arrays)])
    assert np.array_equal(read_groups(tmp_path / "run.safetensors")[0].shared["log_rate_scale"], ell)


def test_an_lr_scale_that_is_not_ours_is_not_taken_for_the_rate_found() -> None:
    # timm's `param_groups_layer_decay` sets it in every group, and its schedulers multiply with it.
    params = parameters(SHAPES)
    optimizer = AutomagicCameAMP8bit([{"params": params, "lr_scale": 0.25}], **SMALL | {"warmup_steps": 40})
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.get_learning_rates() == [pytest.approx(1e-5)]
    run(optimizer, range(1, 12))
    ell = float(optimizer.param_groups[0]["automagic_log_rate_scale"])
    other = AutomagicCameAMP8bit(parameters(SHAPES))
    other.load_state_dict(optimizer.state_dict())
    for group in (optimizer.param_groups[0], other.param_groups[0], copy.deepcopy(other).param_groups[0]):
        assert (group["lr_scale"], float(group["automagic_log_rate_scale"])) == (0.25, ell)
        assert ell not in (0, 0.25)


def test_a_group_of_today_that_lacks_a_field_of_the_search_is_refused() -> None:
    for name in ("search_gain", "straightness", "agreement_floor"):
        state_dict = made(2).state_dict()
        del state_dict["param_groups"][0]["automagic_" + name]
        with pytest.raises(ValueError, match=f"lacks {name}"):
            made(0).load_state_dict(state_dict)
