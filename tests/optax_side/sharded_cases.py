"""What the tests of meshes run in a process of their own, with eight devices: ``python -m ... CASE``; prints JSON."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from automagic_core import walk_signs as core_signs
from automagic_optax import automagic_8bit, finish_warmup, quantize_state, sharding_report, state_specs
from automagic_optax.codec.random_bits import walk_signs
from tests.optax_side.sharded_model import (
    CLEAN,
    FIELDS,
    ODD,
    STAGES_OFF,
    gradients,
    mesh_of,
    placed,
    runner,
    specs,
    values,
)

LAYER = {"query": CLEAN["layers"][0]["query"], "up": CLEAN["layers"][0]["up"], "rows": ODD["rows"]}
ALL = {**CLEAN, **ODD}
EIGHT_BIT_OFF = {"optim_bits": 32}


def compared(ours: Any, theirs: Any) -> dict[str, Any]:
    """How two runs differ: codes by the equal share and the largest distance, floats relative to the largest."""
    equal, codes, farthest, far, same = 0, 0, 0, 0, True
    apart: dict[str, float] = {}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        name, a, b = jax.tree_util.keystr(path), np.asarray(a), np.asarray(b)
        same = same and a.tobytes() == b.tobytes()
        if name.endswith(".codes"):
            distance = np.abs(a.astype(int) - b)
            equal, codes = equal + int((distance == 0).sum()), codes + distance.size
            farthest, far = max(farthest, int(distance.max())), far + int((distance > 1).sum())
        elif a.dtype == np.float32:
            apart[name] = float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30))
        else:
            assert np.array_equal(a, b), name
    shares = {
        "equal": equal / max(codes, 1),
        "farther than one": far / max(codes, 1),
    }
    return {**shares, "farthest": farthest, "same": same, "apart": apart}


def moved_bytes(text: str) -> dict[str, list[int]]:
    """Bytes of the results of each kind of collective in compiled HLO that moves values rather than sums them."""
    found: dict[str, list[int]] = {}
    kinds = "all-gather|collective-permute|all-to-all|reduce-scatter|collective-broadcast|ragged-all-to-all"
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({kinds})(-start)?\(", line)
        if match:
            sizes = [
                int(np.prod([int(n) for n in shape.split(",") if n])) * (1 if dtype in ("u8", "s8", "pred") else 4)
                for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            ]
            found.setdefault(match[2], []).append(max(sizes))
    return found


def signs_alike(shape: tuple[int, ...], spec: Any) -> bool:
    """Whether every device computes its own part of the walk's signs."""
    where = NamedSharding(mesh_of((4, 2)), spec)
    whole = jax.jit(walk_signs, static_argnums=0, out_shardings=where)(shape)
    expected = core_signs(int(np.prod(shape))).reshape(shape)
    return all(np.array_equal(shard.data, expected[shard.index]) for shard in whole.addressable_shards)


def steps_alike(described: Any, shape: tuple[int, ...], way: str, **fields: Any) -> dict[str, Any]:
    """Free runs of eight steps on one device and on a mesh, twice; at the third one array has a NaN."""
    spoilt = 2 if "embed" in described else -1
    mesh = mesh_of(shape)
    one = runner(described, None, "data", **fields)(8, spoilt)
    on_mesh = runner(described, mesh, way, **fields)
    first, again = on_mesh(8, spoilt), on_mesh(8, spoilt)
    found = {**compared(first, one), "again": compared(again, first)["same"]}
    return {**found, "placed": misplaced(described, mesh, way, first[1], fields)}


def misplaced(described: Any, mesh: Any, way: str, state: Any, fields: Any) -> list[str]:
    """States that are not where `state_specs` says, after the update, eager `init` and jitted `init`."""
    tx = automagic_8bit(1e-3, **{**FIELDS, **fields})
    params = placed(values(described, 0), described, mesh, way)
    expected = state_specs(tx, params, specs(described, way, mesh))
    states = {"update": state, "init": tx.init(params), "jitted init": jax.jit(tx.init)(params)}
    return [
        f"{when} {jax.tree_util.keystr(path)} {x.sharding}"
        for when, tree in states.items()
        for (path, x), spec in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True)
        if not x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
    ]


def collectives(described: Any, shape: tuple[int, ...], way: str, **fields: Any) -> dict[str, Any]:
    """What a compiled update moves, and what the report says of it."""
    mesh = mesh_of(shape)
    tx = automagic_8bit(1e-3, **{**FIELDS, **fields})
    params = placed(values(described, 0), described, mesh, way)
    state = tx.init(params)
    text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    return {"moved": moved_bytes(text), "report": sharding_report(params, state)}


def bare_collectives() -> dict[str, list[int]]:
    """What a step moves that is compiled for bare shapes, with the shardings beside them and the mesh set."""
    mesh, tx = mesh_of((8,)), quantize_state(optax.adam(1e-3))
    # Of two chunks, if a device computed all of it.
    params = {"w": jax.device_put(np.ones((1024, 512), np.float32), NamedSharding(mesh, P("data")))}
    with jax.set_mesh(mesh):
        arguments = (params, jax.jit(tx.init)(params), params)
        shardings = jax.tree.map(lambda x: x.sharding, arguments)
        bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        lowered = jax.jit(tx.update, in_shardings=shardings, out_shardings=shardings[:2]).lower(*bare)
    return moved_bytes(lowered.compile().as_text())


def types(described: Any, shape: tuple[int, ...], way: str, **fields: Any) -> dict[str, Any]:
    """Types of states and updates before and after, and the update against that on a mesh with Auto axes."""
    mesh, auto = mesh_of(shape, AxisType.Explicit), mesh_of(shape)
    tx = optax.chain(optax.clip_by_global_norm(1e6), automagic_8bit(1e-3, **{**FIELDS, **fields}))
    params, grads = (placed(x, described, mesh, way) for x in (values(described, 0), gradients(described, 0)))
    with jax.set_mesh(mesh):
        eager, state = tx.init(params), jax.jit(tx.init)(params)
        updates, after = jax.jit(tx.update)(grads, state, params)
    same = jax.tree.map(lambda a, b: jax.typeof(a) == jax.typeof(b), (state, state, params), (after, eager, updates))
    params, grads = (placed(x, described, auto, way) for x in (values(described, 0), gradients(described, 0)))
    expected = jax.jit(tx.update)(grads, tx.init(params), params)
    return {"types": all(jax.tree.leaves(same)), **compared((updates, after), expected)}


def moments_of_adam() -> dict[str, Any]:
    """Adam in 8 bits on a mesh: its moments that are not where `state_specs` says, and against one device."""
    described, mesh, way = {"up": CLEAN["layers"][0]["up"], **ODD}, mesh_of((4, 2)), "full"
    tx = quantize_state(optax.adam(1e-3))

    def run(where: Any) -> Any:
        params, grads = (placed(x, described, where, way) for x in (values(described, 0), gradients(described, 0)))
        return tx.init(params), jax.jit(tx.init)(params), jax.jit(tx.update)(grads, tx.init(params), params)[1]

    expected = state_specs(tx, values(described, 0), specs(described, way, mesh), mesh=mesh)
    eager, jitted, updated = run(mesh)
    wrong = [
        f"{when} {jax.tree_util.keystr(path)} {x.sharding}"
        for when, tree in (("init", eager), ("jitted init", jitted), ("update", updated))
        for (path, x), spec in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True)
        # What stays in 32 bits is where optax puts it.
        if ".codes" in jax.tree_util.keystr(path) or ".absmax" in jax.tree_util.keystr(path)
        if not x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
    ]
    return {"wrong": wrong, **compared(updated, run(None)[2])}


def mixed_axes() -> list[str]:
    """States on a mesh with an Explicit and an Auto axis that are not as those of eager `init`."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Auto))
    params = placed(values(LAYER, 0), LAYER, mesh, "full") | {
        "query": jax.device_put(values(LAYER, 0)["query"], NamedSharding(mesh, P("data", "model")))
    }
    wrong = []
    for tx in (automagic_8bit(1e-3, **{**FIELDS, **STAGES_OFF}), quantize_state(optax.adam(1e-3))):
        with jax.set_mesh(mesh):
            eager, jitted = tx.init(params), jax.jit(tx.init)(params)
        wrong += [
            f"{jax.tree_util.keystr(path)} {x.sharding}"
            for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(jitted), jax.tree.leaves(eager), strict=True)
            if jax.typeof(x) != jax.typeof(y) or not x.sharding.is_equivalent_to(y.sharding, x.ndim)
        ]
    return wrong


def checkpoints(folder: str) -> dict[str, Any]:
    """A run that is saved and restored on three places, and goes on."""
    import orbax.checkpoint as ocp

    from automagic_optax import restore

    described, tx = LAYER, automagic_8bit(1e-3, **FIELDS)
    mesh, other = mesh_of((4, 2)), mesh_of((8,))
    grads = gradients(described, 7)
    params, state = runner(described, mesh, "full")(2)
    with ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler()) as saver:
        saver.save(Path(folder) / "whole", args=ocp.args.StandardSave(state))
        saver.wait_until_finished()
    with ocp.StandardCheckpointer() as saver:
        saver.save(Path(folder) / "finished", finish_warmup(state))

    def on(where: Any, way: str) -> Any:
        return placed(jax.tree.map(np.asarray, params), described, where, way)

    def goes_on(state: Any, params: Any, where: Any, way: str) -> Any:
        return jax.jit(tx.update)(placed(grads, described, where, way), state, params)

    found = {}
    expected = goes_on(state, params, mesh, "full")
    for name, where, way in (("same", mesh, "full"), ("other", other, "full"), ("one", None, "data")):
        here = on(where, way)
        restored = restore(Path(folder) / "whole", tx, here)
        assert compared(restored, state)["same"], name
        placed_right = [
            x.sharding.is_equivalent_to(y.sharding, x.ndim)
            for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(tx.init(here)), strict=True)
        ]
        found[name] = {**compared(goes_on(restored, here, where, way), expected), "placed": all(placed_right)}
    as_saved = restore(Path(folder) / "finished", tx, on(mesh, "full"))
    asked = restore(Path(folder) / "whole", tx, on(mesh, "full"), finished=True)
    found["finished"] = {
        "as saved": compared(as_saved, finish_warmup(state))["same"],
        "asked": compared(asked, finish_warmup(state))["same"],
    }
    return found


CASES: dict[str, Callable[..., Any]] = {
    "layer": lambda: {
        **steps_alike({"up": LAYER["up"], "rows": ODD["rows"], "heads": ODD["heads"]}, (4, 2), "full", **STAGES_OFF),
        "collectives": collectives({"up": LAYER["up"]}, (4, 2), "tensor", **STAGES_OFF),
        "bare": bare_collectives(),
        "signs": all(signs_alike(*LAYER[name][:2]) for name in ("up", "rows")),
    },
    "steps": lambda shape, way: steps_alike(ALL, shape, way, percentile_clipping=60),
    "steps in 32 bits": lambda shape, way: steps_alike(ALL, shape, way, percentile_clipping=60, **EIGHT_BIT_OFF),
    "collectives": lambda shape, way: collectives(CLEAN, shape, way, **STAGES_OFF),
    "collectives of cut blocks": lambda shape, way: collectives(ODD, shape, way, **STAGES_OFF),
    "collectives of stages": lambda shape, way: collectives(ALL, shape, way),
    "types of a layer": lambda: types(LAYER, (4, 2), "full", frequency_penalty=0.0),
    "types": lambda shape, way: types(ALL, shape, way, percentile_clipping=60),
    "moments of adam": moments_of_adam,
    "mixed axes": mixed_axes,
    "checkpoints": checkpoints,
}

if __name__ == "__main__":
    assert jax.device_count() == 8
    print(json.dumps(CASES[sys.argv[1]](*map(json.loads, sys.argv[2:]))))
