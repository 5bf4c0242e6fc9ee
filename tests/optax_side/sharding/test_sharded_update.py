"""Meshes of eight devices: the same bits, the same statistics, states beside their parameters, and little to move."""

from __future__ import annotations

import json
from typing import Any

import pytest

from automagic_core.arrays.state_forms import SEARCH_SCALARS
from tests.optax_side.sharded_model import on_eight_devices

MESHES = [((8,), "data"), ((8,), "full"), ((4, 2), "data"), ((4, 2), "tensor"), ((4, 2), "full")]


def case(name: str, *arguments: Any, timeout: int = 600) -> dict[str, Any]:
    return json.loads(on_eight_devices("sharded_cases", name, *map(json.dumps, arguments), timeout=timeout))


def check_run(found: dict[str, Any]) -> None:
    assert found["placed"] == []
    assert found["again"]
    # Sums are the nearest float32 number in whatever order: what is left are roundings of matrix products of the
    # low-rank stage and of products that XLA joins with a sum in one program and not in the other.
    assert found["equal"] >= 0.9999
    assert found["farthest"] <= 1
    for name, apart in found["apart"].items():
        assert apart <= 1e-6, (name, apart)


def check_moved(found: dict[str, Any], largest: int) -> None:
    assert all(size <= largest for sizes in found["moved"].values() for size in sizes), found["moved"]


def test_a_layer_on_a_mesh() -> None:
    found = case("layer")
    check_run(found)
    assert found["signs"]
    assert {f"[1][0].{name}" for name in SEARCH_SCALARS} <= found["apart"].keys()
    assert found["apart"]["[1][0].exp_avg_sq['up'].row"] <= 1e-6
    # Row, column and block statistics of (256, 1024) have at most 1024 float32 values.
    check_moved(found["collectives"], 4 * 1024)
    assert found["collectives"]["report"]["cut_blocks"] == {}
    assert found["bare"] == {}


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "way"), MESHES)
def test_eight_steps_on_any_mesh(shape: tuple[int, ...], way: str) -> None:
    check_run(case("steps", shape, way))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "way"), MESHES[3:])
def test_eight_steps_in_32_bits(shape: tuple[int, ...], way: str) -> None:
    found = case("steps in 32 bits", shape, way)
    assert found["placed"] == []
    assert found["again"]
    for name, apart in found["apart"].items():
        # Torque is steep: near 0 it makes of a rounding up to a hundred (section 5's 0.01).
        assert apart <= (1e-4 if ".s[" in name else 1e-6), (name, apart)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "way"), MESHES[1:])
def test_no_array_is_gathered(shape: tuple[int, ...], way: str) -> None:
    found = case("collectives", shape, way)
    check_moved(found, 4 * 1024)
    whole = {"devices": 8, "cut_blocks": {}, "gathered_bytes": 0, "misplaced": []}
    assert {name: found["report"][name] for name in whole} == whole
    if way == "full":  # all but statistics and scalars is cut into at least four parts
        assert found["report"]["state_bytes_per_device"] < 0.3 * found["report"]["state_bytes"]


@pytest.mark.slow
def test_cut_blocks_are_named_and_their_cost_is_right() -> None:
    found = case("collectives of cut blocks", (4, 2), "full")
    assert set(found["report"]["cut_blocks"]) == {"cut", "rows", "heads", "conv", "lora_b"}
    # A gather over two axes of the mesh is two, the second of them of the whole.
    gathered = sum(size for sizes in found["moved"].values() for size in sizes if size > 4 * 256)
    assert 0 < gathered <= 2 * found["report"]["gathered_bytes"]


@pytest.mark.slow
def test_stages_gather_an_array_at_most_once_and_exchange_borders() -> None:
    found = case("collectives of stages", (4, 2), "full")
    # The frequency stage gathers an array as a whole, the largest of 256 · 1024 values.
    assert max(found["moved"]["all-gather"]) == 4 * 256 * 1024
    # The edge stage exchanges one row or one column of a device's part, at most 1024 values.
    assert max(found["moved"]["collective-permute"]) <= 4 * 1024
    assert set(found["moved"]) == {"all-gather", "collective-permute"}


@pytest.mark.slow
def test_moments_in_8_bits_are_split_as_their_parameters() -> None:
    found = case("moments of adam")
    assert found["wrong"] == []
    # One step from the same zeros without sums between elements: only products that XLA joins with a sum differ.
    assert found["equal"] >= 0.9999
    assert found["farthest"] <= 1
