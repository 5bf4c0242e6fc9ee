"""Runs a wrapped update one array at a time, so that only one array is in float32.

A wrapped transformation is called once, with all its states, and XLA would read all of them before it uses one.  So
its computation is recorded and done in parts.  A part computes one parameter's update, then the new values of the
states that were read for it, and stores them.  Then the next part begins.  The operations stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import jax
from jax.extend.core import ClosedJaxpr, Literal, Var

from automagic_optax.moments.units import Recorded, Unit, find_unit


class States(Protocol):
    """How states are read and written, by their positions."""

    def read(self, position: int) -> jax.Array:
        """The state's values, computed after everything that was written before."""

    def write(self, position: int, value: jax.Array) -> None:
        """Stores the new values of a state that was read before."""


class Together(Protocol):
    """How states are computed together."""

    def batches(self, units: list[Unit], form: Hashable) -> list[list[Unit]]:
        """Which units of one form are computed together, and chunk by chunk; the others are computed one by one."""

    def together(self, units: list[Unit], inputs: list[list[Any]]) -> list[jax.Array]:
        """Computes units of one form, stores their states, and returns their updates.

        Args:
            units: they do the same on arrays of one shape.
            inputs: for each, the values of its `inputs`.
        """


def in_turn(
    function: Callable[[list[Any]], tuple[list[Any], list[Any]]],
    shapes: Sequence[Any],
    states: States,
    together: Together | None = None,
) -> list[Any]:
    """Calls `function` on the values of stored states and stores their new values.

    Args:
        function: from the states' values to results and the states' new values; it is traced.
        shapes: shape and dtype of each state's values.
        states: reads and writes the states.  Every state is read once and then written once.
        together: computes the units of parameters that work element by element, if there is one.

    Returns:
        The results, as if all states had been read, `function` called, and all written.
    """
    closed = jax.make_jaxpr(function)(list(shapes))
    parts = _Parts(closed, states)
    if closed.effects:  # prints and callbacks must keep their order
        parts.compute(range(len(closed.jaxpr.eqns)))
    split = len(closed.jaxpr.outvars) - len(shapes)
    targets = closed.jaxpr.outvars[:split]
    if together is not None and not closed.effects:
        parts.compute_units(targets, together)
    results = []
    for target in targets:
        results.append(parts.value(target))
        parts.write_what_was_read()
    for position, state in enumerate(closed.jaxpr.invars):  # also those on which no result depends
        if position in parts.done:
            continue
        parts.value(state)
        parts.write_what_was_read()
    return results


class _Parts:
    """A recorded computation, and the values that are known so far."""

    def __init__(self, closed: ClosedJaxpr, states: States) -> None:
        self.jaxpr, self.states = closed.jaxpr, states
        self.values: dict[Var, Any] = dict(zip(self.jaxpr.constvars, closed.consts, strict=True))
        self.position = {v: i for i, v in enumerate(self.jaxpr.invars)}
        self.recorded = Recorded(self.jaxpr)
        self.producer = self.recorded.producer
        self.read: list[int] = []
        self.done: set[int] = set()
        self.targets = self.jaxpr.outvars[len(self.jaxpr.outvars) - len(self.position) :]

    def value(self, target: Any) -> Any:
        """The value of one variable.  Reads the states and computes the values that it needs."""
        missing: set[int] = set()
        unread: set[int] = set()
        pending = [target]
        while pending:
            v = pending.pop()
            if isinstance(v, Literal) or v in self.values:
                continue
            if v in self.position:
                unread.add(self.position[v])
            elif self.producer[v] not in missing:
                missing.add(self.producer[v])
                pending += self.jaxpr.eqns[self.producer[v]].invars
        self.compute(sorted(missing), sorted(unread))
        return target.val if isinstance(target, Literal) else self.values[target]

    def compute(self, equations: Sequence[int], unread: Sequence[int] | None = None) -> None:
        """Reads states, then carries out equations, which are given in their own order."""
        for position in range(len(self.position)) if unread is None else unread:
            assert position not in self.done, "a state that has its new value already"
            self.values[self.jaxpr.invars[position]] = self.states.read(position)
            self.read.append(position)
        if not equations:
            return
        chosen = [self.jaxpr.eqns[i] for i in equations]
        made = dict.fromkeys(v for equation in chosen for v in equation.outvars)
        used = (v for equation in chosen for v in equation.invars if not isinstance(v, Literal))
        needed = dict.fromkeys(v for v in used if v not in made)
        part = self.jaxpr.replace(
            constvars=[],
            invars=list(needed),
            outvars=list(made),
            eqns=chosen,
            debug_info=self.jaxpr.debug_info.with_unknown_names(),
        )
        self.values |= zip(made, jax.core.eval_jaxpr(part, [], *(self.values[v] for v in needed)), strict=True)

    def compute_units(self, targets: Sequence[Any], together: Together) -> None:
        """Computes what works element by element, together where it is the same for several parameters."""
        by_form: dict[Hashable, list[Unit]] = {}
        taken: set[int] = set()
        for target in targets:
            unit = find_unit(self.recorded, target, self.values, self.position, self.targets)
            if unit is not None and not taken & {*unit.states}:
                taken |= {*unit.states}
                by_form.setdefault(unit.form(self.position), []).append(unit)
        for form, units in by_form.items():
            for batch in together.batches(units, form):
                for unit in batch:
                    self.compute([i for i in unit.ahead if self.jaxpr.eqns[i].outvars[0] not in self.values], ())
                inputs = [[self.values[v] for v in unit.inputs] for unit in batch]
                for unit, update in zip(batch, together.together(batch, inputs), strict=True):
                    self.values[unit.target] = update
                    self.done.update(unit.states)

    def write_what_was_read(self) -> None:
        """Stores the new values of all states that were read.  Computing them may read further states."""
        while self.read:
            position = self.read.pop(0)
            self.states.write(position, self.value(self.targets[position]))
