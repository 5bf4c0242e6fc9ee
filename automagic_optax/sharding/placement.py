"""Finds out how arrays are split over a mesh, and makes states that are split alike.

Outside ``jax.jit`` the mesh of an array and how it is split over it are known.  Inside, the mesh is known if the array
was on it before, or from ``jax.set_mesh``; of ``in_shardings`` types say nothing.  How the array is split is known only
over Explicit axes; over Auto axes the compiler decides it later.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from automagic_optax.sharding.explicit_mesh import untyped


def devices_of(x: Any) -> int:
    """How many devices the array may be split over: 1 where it is on one device, or inside ``jax.shard_map``."""
    mesh = _mesh_of(x)
    return 1 if mesh is None or AxisType.Manual in mesh.axis_types else mesh.size


def varies(x: jax.Array) -> bool:
    """Whether the array may differ from device to device, inside ``jax.shard_map``."""
    return bool(varying_axes(x))


def varying_axes(tree: Any) -> frozenset[Any]:
    """The axes over which any array of the tree may differ from device to device, inside ``jax.shard_map``."""
    types = [jax.typeof(x) for x in jax.tree.leaves(tree) if isinstance(x, jax.core.Tracer)]
    found = [getattr(getattr(kind, "manual_axis_type", None), "varying", ()) for kind in types]
    return frozenset().union(*found)


def varying_over(axes: frozenset[Any], x: Any) -> Any:
    """The array, with a type that says that it may differ along these axes too."""
    missing = sorted(axes - varying_axes(x), key=str)
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing and isinstance(x, jax.Array) else x


def _mesh_of(x: Any) -> Mesh | AbstractMesh | None:
    sharding = getattr(x, "sharding", None) if isinstance(x, jax.ShapeDtypeStruct) else _sharding_type(x)
    mesh: Mesh | AbstractMesh | None = getattr(sharding, "mesh", None)
    if (mesh is None or mesh.empty) and isinstance(x, jax.core.Tracer):
        # An array that comes to ``jax.jit`` without a mesh: ``jax.set_mesh`` puts it on its own.
        context = jax.sharding.get_abstract_mesh()
        mesh = context if {*context.axis_types} == {AxisType.Auto} else None
    return None if mesh is None or mesh.empty else mesh


def _sharding_type(x: Any) -> Any:
    return getattr(jax.typeof(x), "sharding", None) if isinstance(x, jax.Array) else None


def has_explicit_axes(x: Any) -> bool:
    """Whether the array's type says how it is split."""
    mesh = _mesh_of(x)
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def known_sharding(x: Any) -> NamedSharding | None:
    """How the array is split over its mesh, where that is known; None on a single device and where it is not."""
    mesh = _mesh_of(x)
    if mesh is None:
        return None
    if isinstance(x, jax.core.Tracer):
        # The type leaves out Auto axes, over which the array may be split too.
        hidden = any(mesh.shape[name] > 1 for name in mesh.auto_axes)
        return _sharding_type(x) if has_explicit_axes(x) and not hidden else None
    return x.sharding if isinstance(x.sharding, NamedSharding) else None


def replicated_like(tree: Any) -> NamedSharding | None:
    """The sharding of an array that is whole on every device of the tree's mesh; None where no mesh is known."""
    for leaf in jax.tree.leaves(tree):
        sharding = known_sharding(leaf)
        if sharding is not None:
            return NamedSharding(sharding.mesh, PartitionSpec())
    return None


def full(shape: tuple[int, ...], value: Any, dtype: Any, sharding: NamedSharding | None = None) -> jax.Array:
    """An array filled with one value, with the given sharding; on the default device without one."""
    if sharding is None:
        return jnp.full(shape, value, dtype)
    if isinstance(sharding.mesh, AbstractMesh):
        return jnp.full(shape, value, dtype, out_sharding=sharding)
    return jnp.full(shape, value, dtype, device=sharding)


def scalar_like(tree: Any, value: Any, dtype: Any) -> jax.Array:
    """A scalar on every device of the tree's mesh; on the default device where no mesh is known."""
    return full((), value, dtype, replicated_like(tree))


def zeros_following(x: jax.Array) -> jax.Array:
    """float32 zeros in the array's shape, which the compiler splits as it splits the array."""
    # The compiler simplifies this only after it has split the program.
    zeros = jnp.zeros_like(x, jnp.float32)
    return jnp.where(x == x, zeros, zeros)


def following(value: jax.Array, x: Any) -> jax.Array:
    """A value in the shape of `x`.  Where only the compiler knows how `x` is split, it splits the value alike."""
    if devices_of(x) == 1 or known_sharding(x) is not None:
        return value
    if has_explicit_axes(x):
        found: jax.Array = untyped(following, _sharding_type(x))(value, x)
        return found
    return jnp.where(x == x, value, value)


def statistic_zeros(parameter: Any, shape: tuple[int, ...]) -> jax.Array:
    """float32 zeros for a row or column statistic of the parameter, split as it is along the axes that they share."""
    sharding = known_sharding(parameter)
    if sharding is None and devices_of(parameter) > 1:
        return zeros_in_shape(zeros_following(parameter), shape)
    return full(shape, 0, jnp.float32, sharding and statistic_sharding(sharding, parameter.shape, shape))


def statistic_sharding(parameter: NamedSharding, whole: tuple[int, ...], shape: tuple[int, ...]) -> NamedSharding:
    """How a statistic of the given shape is split, if its parameter has the shape `whole`."""
    spec = [*parameter.spec, *[None] * (len(whole) - len(parameter.spec))]
    kept = [entry if n == m else None for entry, n, m in zip(spec, shape, whole, strict=True)]
    return NamedSharding(parameter.mesh, PartitionSpec(*kept))


def zeros_in_shape(zeros: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Zeros in the shape of a row or column statistic, split like `zeros` along the axes that they share."""
    axes = tuple(axis for axis, (n, kept) in enumerate(zip(zeros.shape, shape, strict=True)) if n != kept)
    return jnp.max(zeros, axis=axes, keepdims=True, initial=0)


def whole(x: jax.Array) -> jax.Array:
    """The array, gathered on every device."""
    mesh = _mesh_of(x)
    if mesh is None or devices_of(x) == 1 or not isinstance(x, jax.core.Tracer) or has_explicit_axes(x):
        return x
    gathered: jax.Array = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))
    return gathered


def parts(spec_entry: Any, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts one entry of a PartitionSpec cuts an axis."""
    names = () if spec_entry is None else spec_entry if isinstance(spec_entry, tuple) else (spec_entry,)
    return math.prod(mesh.shape[name] for name in names)
