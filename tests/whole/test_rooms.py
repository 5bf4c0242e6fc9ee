"""Imports run one way: between the packages, between the rooms of a package, and between modules."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the lowest room to the highest; "" is what lies in the package itself, without `__init__`, which may see all.
# In JAX an array knows how it is split, so sharding lies below the codec.  In PyTorch a shard is one more way in which
# the stages and the codec are put to work, so it lies above them.
ROOMS = {
    "automagic_core": ["config", "codec", "arrays", "watching", "moving", ""],
    "automagic_torch": [
        "codec",
        "arrays",
        "stages",
        "sharding",
        "cameamp",
        "steps",
        "checkpoints",
        "watching",
        "",
        "moving",
    ],
    "automagic_optax": [
        *["sharding", "codec", "arrays", "stages", "cameamp", "moments", "checkpoints", "watching", "", "moving"]
    ],
}
MAY_SEE = {
    "automagic_core": set(),
    "automagic_torch": {"automagic_core"},
    "automagic_optax": {"automagic_core"},
    "automagic_cameamp_improved_8bit": {"automagic_torch"},
    "parity": {"automagic_core", "automagic_torch", "automagic_optax"},
}


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules among `known` that a module imports, at its top or later."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


EVERYTHING = {name: path for package in MAY_SEE for name, path in modules(package).items()}


def room_of(module: str) -> tuple[str, str]:
    """(package, room) of a module."""
    package, *inner = module.split(".")
    is_room = len(inner) > 1 or (inner and (ROOT / package / inner[0]).is_dir())
    return package, inner[0] if is_room else ""


@pytest.mark.parametrize("package", MAY_SEE)
def test_a_package_sees_only_the_packages_below_it(package: str) -> None:
    allowed = MAY_SEE[package] | {package}
    for name, path in modules(package).items():
        seen = {module.split(".")[0] for module in imports(path, EVERYTHING)} & (MAY_SEE.keys() | {"tests"})
        assert seen <= allowed, f"{name} imports {seen - allowed}"


@pytest.mark.parametrize("package", ROOMS)
def test_a_room_sees_only_the_rooms_below_it(package: str) -> None:
    order = ROOMS[package]
    assert sorted({room_of(name)[1] for name in modules(package)}) == sorted(order)
    wrong = [
        f"{name} imports {module}"
        for name, path in modules(package).items()
        if name != package
        for module in imports(path, EVERYTHING)
        if module in EVERYTHING and module.split(".")[0] == package
        if order.index(room_of(module)[1]) > order.index(room_of(name)[1])
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    below = {name: imports(path, EVERYTHING) & EVERYTHING.keys() - {name} for name, path in EVERYTHING.items()}
    while leaves := {name for name, seen in below.items() if not seen}:
        below = {name: seen - leaves for name, seen in below.items() if name not in leaves}
    assert not below, f"in circles: {below}"


def test_the_two_frameworks_have_one_floor_plan() -> None:
    # Only JAX wraps other optimizers, and only PyTorch has several ways to compute a batch.
    assert set(ROOMS["automagic_optax"]) - {"moments"} == set(ROOMS["automagic_torch"]) - {"steps"}


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_stay_small(package: str) -> None:
    for room in ROOMS[package]:
        assert len([path for path in (ROOT / package / room).glob("*.py") if path.stem != "__init__"]) <= 13
