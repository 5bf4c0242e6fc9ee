"""Finds the parts of a recorded update that work on one parameter element by element.

Such a *unit* is the update of a parameter and the new values of the states that were read for it.  It can be computed
chunk by chunk, and together with the units of other parameters that do the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

_ELEMENTWISE = frozenset(
    (
        *(
            "abs",
            "acos",
            "add",
            "add_any",
            "and",
            "asin",
            "atan",
            "atan2",
            "cbrt",
            "ceil",
            "clamp",
            "copy",
            "cos",
            "cosh",
        ),
        *(
            "convert_element_type",
            "div",
            "eq",
            "erf",
            "erfc",
            "exp",
            "exp2",
            "expm1",
            "floor",
            "ge",
            "gt",
            "integer_pow",
        ),
        *(
            "is_finite",
            "le",
            "log",
            "log1p",
            "logistic",
            "lt",
            "max",
            "min",
            "mul",
            "ne",
            "neg",
            "nextafter",
            "not",
            "or",
        ),
        *("pow", "reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt", "square"),
        *("stop_gradient", "sub", "tan", "tanh", "xor"),
    )
)
_CALLS = ("jit", "pjit", "closed_call")


class Unit(NamedTuple):
    """One parameter's part of a recorded computation.

    Attributes:
        target: its update.
        states: the positions of the states that it reads and writes, ascending.
        read, outputs: the variables of the states' values and of their new ones.
        equations: in order; all are elementwise.
        inputs: the other variables that it needs.
        ahead: equations, by their positions, that are to be computed before.
        shape: of the parameter.
    """

    target: Var
    states: tuple[int, ...]
    read: tuple[Var, ...]
    outputs: tuple[Any, ...]
    equations: tuple[JaxprEqn, ...]
    inputs: tuple[Var, ...]
    ahead: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> Any:
        """Of the update."""
        aval: Any = self.target.aval
        return aval.dtype

    def form(self, positions: Mapping[Var, int]) -> Hashable:
        """Equal for units that do the same on arrays of one shape."""
        names: dict[Any, int] = {}

        def name(atom: Any) -> Hashable:
            if isinstance(atom, Literal):
                return ("literal", str(atom.val), str(atom.aval))
            return (names.setdefault(atom, len(names)), str(atom.aval), atom in positions)

        written = [
            (e.primitive.name, str(e.params), _contexts(e), *map(name, e.invars), "to", *map(name, e.outvars))
            for e in self.equations
        ]
        return (self.shape, tuple(written), name(self.target), tuple(map(name, self.outputs)))


def _contexts(equation: JaxprEqn) -> Hashable:
    """What was in force when an equation was recorded, and when those that it calls were."""
    inner = equation.params["jaxpr"].jaxpr.eqns if equation.primitive.name in _CALLS else ()
    return (str(equation.ctx), *map(_contexts, inner))


class Recorded:
    """A recorded computation.

    Attributes:
        jaxpr: the computation.
        producer: of each variable the position of the equation that makes it.
        users: of each variable the positions of the equations that use it.
    """

    def __init__(self, jaxpr: Jaxpr) -> None:
        self.jaxpr = jaxpr
        self.producer = {v: i for i, equation in enumerate(jaxpr.eqns) for v in equation.outvars}
        self.users: dict[Var, list[int]] = {}
        for i, equation in enumerate(jaxpr.eqns):
            for v in equation.invars:
                if not isinstance(v, Literal):
                    self.users.setdefault(v, []).append(i)


def find_unit(
    recorded: Recorded, target: Any, known: Mapping[Var, Any], states: Mapping[Var, int], new: Sequence[Any]
) -> Unit | None:
    """The unit that gives `target`; None where something in it is not elementwise.

    Args:
        recorded: the computation.
        target: one of its results.
        known: the variables whose values are known.
        states: the variables of the states' values, and their positions.
        new: the atoms of the states' new values, by position.
    """
    if isinstance(target, Literal) or target in known or target in states:
        return None
    shape = _shape(target)
    jaxpr, producer = recorded.jaxpr, recorded.producer
    read: list[int] = []
    found: set[int] = set()
    pending: list[Any] = [target]
    while pending:
        v = pending.pop()
        if isinstance(v, Literal) or v in known:
            continue
        if v in states:
            if states[v] not in read:
                read.append(states[v])
                pending.append(new[states[v]])
        elif producer[v] not in found:
            found.add(producer[v])
            pending += jaxpr.eqns[producer[v]].invars
    if not read or any(isinstance(new[i], Literal) or _shape(new[i]) != shape for i in read):
        return None
    inside = {i for i in found if _is_elementwise(jaxpr.eqns[i], shape)}
    # All others come first, with what they need; they must not need a state.
    ahead: set[int] = set()
    pending = [v for i in found - inside for v in jaxpr.eqns[i].outvars]
    while pending:
        v = pending.pop()
        if isinstance(v, Literal) or v in known:
            continue
        if v in states:
            return None
        if producer[v] not in ahead:
            ahead.add(producer[v])
            pending += jaxpr.eqns[producer[v]].invars
    inside -= ahead
    equations = tuple(jaxpr.eqns[i] for i in sorted(inside))
    made = {v for equation in equations for v in equation.outvars}
    outputs = tuple(new[i] for i in sorted(read))
    if target not in made or any(v not in made for v in outputs):
        return None
    variables = {position: v for v, position in states.items()}
    of_states = tuple(variables[i] for i in sorted(read))
    # Nobody else may need what is made here, nor the old states, which are replaced when the unit is computed.
    own = made | set(of_states)
    split = len(jaxpr.outvars) - len(new)
    results = {jaxpr.outvars.index(target), *(split + i for i in read)}
    if any(v in own for i, v in enumerate(jaxpr.outvars) if i not in results and not isinstance(v, Literal)):
        return None
    users = {i for v in own for i in recorded.users.get(v, ())}
    elsewhere = {v for i in users - inside for v in jaxpr.eqns[i].invars if not isinstance(v, Literal)}
    if elsewhere & own:
        return None
    used = dict.fromkeys(v for e in equations for v in e.invars if not isinstance(v, Literal) and v not in made)
    inputs = tuple(v for v in used if v not in states)
    return Unit(target, tuple(sorted(read)), of_states, outputs, equations, inputs, tuple(sorted(ahead)), shape)


def _shape(atom: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = atom.aval.shape
    return shape


def _is_elementwise(equation: JaxprEqn, shape: tuple[int, ...]) -> bool:
    if any(_shape(v) != shape for v in equation.outvars) or not shape:
        return False
    if any(_shape(v) not in ((), shape) for v in equation.invars):
        return False
    name = equation.primitive.name
    if name == "broadcast_in_dim":
        return not _shape(equation.invars[0])
    if name in _CALLS:
        inner = equation.params["jaxpr"].jaxpr
        return not equation.params["jaxpr"].consts and all(
            _is_elementwise(e, shape) or _is_scalar(e) for e in inner.eqns
        )
    return name in _ELEMENTWISE


def _is_scalar(equation: JaxprEqn) -> bool:
    plain = equation.primitive.name in _ELEMENTWISE
    return plain and all(not _shape(v) for v in (*equation.invars, *equation.outvars))


def evaluated(equations: Sequence[JaxprEqn], values: dict[Any, Any], shape: tuple[int, ...]) -> None:
    """Carries out elementwise equations on arrays of another shape, and adds their results to `values`."""
    for equation in equations:
        with equation.ctx.manager:  # where it is computed, and what else was in force when it was recorded
            results = _results(equation, values, shape)
        values |= zip(equation.outvars, results, strict=True)


def _results(equation: JaxprEqn, values: Mapping[Any, Any], shape: tuple[int, ...]) -> list[Any]:
    given = [v.val if isinstance(v, Literal) else values[v] for v in equation.invars]
    name = equation.primitive.name
    if name == "broadcast_in_dim":
        return [jnp.broadcast_to(given[0], shape)]
    if name in _CALLS:
        inner = equation.params["jaxpr"].jaxpr
        inside = dict(zip(inner.invars, given, strict=True))
        evaluated(inner.eqns, inside, shape)
        results = [v.val if isinstance(v, Literal) else inside[v] for v in inner.outvars]
        return [jnp.broadcast_to(x, shape) if not jnp.shape(x) else x for x in results]
    found = equation.primitive.bind(*given, **equation.params)
    return list(found) if equation.primitive.multiple_results else [found]
