"""Gives shape, dtype and sharding of every leaf of an optimizer state (`docs/algorithm.md`, section 9.2)."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from automagic_optax.cameamp.find_states import finish_warmup


def state_specs(
    tx: optax.GradientTransformation, params: Any, specs: Any, *, mesh: Mesh | AbstractMesh | None = None
) -> Any:
    """How every leaf of an optimizer state is split, given how the parameters are split.

    A state is split as its parameter, along every axis that they share.  An absmax is split along an axis
    only where every device then has whole blocks.  Scalars are whole on every device.

    Args:
        tx: ``automagic_8bit(...)``, alone or in any chain.  Its `init` is only traced.
        params: tree of arrays or of ``jax.ShapeDtypeStruct``.
        specs: PartitionSpecs or NamedShardings in the structure of `params`, or in a prefix of it; None: whole.
        mesh: gives the lengths of the mesh's axes; by default the mesh of `specs`, of `params` or of ``jax.set_mesh``.
            Without a mesh the specs fit any lengths that divide the axes of the parameters and the number of devices.

    Returns:
        PartitionSpecs in the structure of ``tx.init(params)``.

    Raises:
        ValueError: a spec does not fit its parameter; the message is JAX's.

    Reference: section 9.2.

    Example:
        >>> specs = state_specs(tx, params, jax.tree.map(lambda w: w.sharding.spec, params))
        >>> shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        >>> opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
    """
    flat = jax.tree.leaves(jax.tree.broadcast(specs, params, is_leaf=_is_spec), is_leaf=_is_spec)
    mesh = mesh or _mesh_of([*flat, *(getattr(w, "sharding", None) for w in jax.tree.leaves(params))])
    flat = [spec.spec if isinstance(spec, NamedSharding) else spec or PartitionSpec() for spec in flat]
    if mesh is None:
        names = dict.fromkeys(name for spec in flat for entry in spec for name in _names(entry))
        lengths = dict.fromkeys(names, 1)
    else:
        lengths = dict(mesh.shape)
    typed = AbstractMesh(tuple(lengths.values()), tuple(lengths), axis_types=(AxisType.Explicit,) * len(lengths))
    leaves, structure = jax.tree.flatten(params)
    described = [
        jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=NamedSharding(typed, spec))
        for w, spec in zip(leaves, flat, strict=True)
    ]
    # JAX replaces a mesh only by one of the same size or by an empty one, and an empty one by any.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())), jax.sharding.use_abstract_mesh(typed):
        state = jax.eval_shape(tx.init, jax.tree.unflatten(structure, described))
    found = jax.tree.map(_spec_of, state)
    if mesh is not None:
        return found
    certain = _Certain([w.shape for w in leaves], flat)
    return jax.tree.map(lambda x, spec: certain.part(x.shape, spec), state, found)


class _Certain:
    """Tells which axes any mesh can split that can split the parameters."""

    def __init__(self, shapes: list[tuple[int, ...]], specs: list[PartitionSpec]) -> None:
        self._split = {
            (entry, n) for shape, spec in zip(shapes, specs, strict=True) for entry, n in zip(spec, shape, strict=False)
        }

    def part(self, shape: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
        devices = jax.device_count()

        def fits(entry: Any, length: int) -> bool:
            return length % devices == 0 or any(entry == e and n and length % n == 0 for e, n in self._split)

        return PartitionSpec(*(e if fits(e, n) else None for e, n in zip(spec, shape, strict=False)))


def abstract_state(
    tx: optax.GradientTransformation,
    params_or_specs: Any,
    mesh: Mesh | None = None,
    finished: bool = False,
) -> Any:
    """Shapes, dtypes and shardings of an optimizer state that is to be restored.

    Args:
        tx: the transformation.
        params_or_specs: tree of arrays or of ``jax.ShapeDtypeStruct``, with the shardings that parameters have.
        mesh: the mesh of the restored state; the parameters keep their PartitionSpecs.  By default the mesh of the
            parameters, or the first device where they are on no mesh.
        finished: give the state after `finish_warmup`.

    Returns:
        ``jax.ShapeDtypeStruct`` in the structure of ``tx.init(params)``.
    """
    leaves, structure = jax.tree.flatten(params_or_specs)
    shardings = [getattr(w, "sharding", None) for w in leaves]
    mesh = mesh or _mesh_of(shardings, ambient=False)
    specs = [sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec() for sharding in shardings]
    described = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in leaves])
    state = jax.eval_shape(tx.init, described)
    if mesh is None:
        where: Any = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), state)
    else:
        found = state_specs(tx, described, jax.tree.unflatten(structure, specs), mesh=mesh)
        where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), found)
    state = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, where)
    return finish_warmup(state) if finished else state


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, (PartitionSpec, NamedSharding))


def _spec_of(x: Any) -> PartitionSpec:
    sharding = getattr(x, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def _names(entry: Any) -> tuple[Any, ...]:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def _mesh_of(shardings: list[Any], ambient: bool = True) -> Any:
    for sharding in shardings:
        if isinstance(sharding, NamedSharding) and not sharding.mesh.empty:
            return sharding.mesh
    current = jax.sharding.get_abstract_mesh() if ambient else None
    return None if current is None or current.empty else current
