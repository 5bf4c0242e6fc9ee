"""Random runs in JAX.

Fields are constants of a compiled step, so with random ones a step is taken operation by operation; compiled steps are
those of a few configurations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from automagic_core.arrays.state_forms import SEARCH_SCALARS
from automagic_optax import ScaleByCameampState, SuppressEdgesState, automagic_8bit
from benchmarks.soak.fuzz_cases import COMPARABLE, ArrayCase, Case
from benchmarks.soak.fuzz_fields import Fields

DTYPES = ("float32", "bfloat16", "float16")
SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (7,),
    (257,),
    (8, 6),
    (5, 128),
    (0, 4),
    (3, 4, 3, 3),
    (2, 3, 1, 3, 3),
    (2, 3, 5),
)
"""Few, so that operations that are compiled once serve all cases."""
_SHARED = ("step", "learning_rate", *SEARCH_SCALARS)
"""What a state holds for all arrays."""

COMPILED_ARRAYS = (
    ArrayCase((), "float32", False, False, 1.0),
    ArrayCase((257,), "float32", False, False, 1.0),
    ArrayCase((16, 32), "float32", False, False, 1.0),
    ArrayCase((16, 32), "float32", False, True, 1.0),
    ArrayCase((3, 3, 2, 5), "float32", False, False, 1.0),
    ArrayCase((0, 3), "float32", False, False, 1.0),
)
_HALF = (
    *(replace(array, dtype="bfloat16") for array in COMPILED_ARRAYS[:3]),
    *(replace(array, dtype="float16") for array in COMPILED_ARRAYS[3:]),
)
_COMMON: Fields = {"lr": 1e-3, "max_lr": 1e-2, "min_8bit_size": 1, "weight_decay": 0.1, "warmup_steps": 3}
COMPILED: dict[str, tuple[list[tuple[Fields, str]], tuple[ArrayCase, ...]]] = {
    "float32": (
        [
            ({**_COMMON, "factored": "none", "torque_decay": 0.9, "percentile_clipping": 50}, "flax"),
            ({**_COMMON, **COMPARABLE}, "flax"),
        ],
        COMPILED_ARRAYS,
    ),
    "half": ([({**_COMMON, "factored": "all", "block_wise": False, "betas": (0.0, 0.5, 0.9)}, "torch")], _HALF),
}
"""Configurations of compiled steps and their arrays, by the precision of these."""


class JaxRunner:
    """The transformation of a case and its state."""

    flushes = True
    everywhere = True
    counts_from_first_gradient = False

    def __init__(self, case: Case) -> None:
        lora = [a.lora and len(a.shape) == 2 for a in case.arrays]
        embedding = [a.embedding for a in case.arrays]
        self.tx = make(case.fields, layout=case.layout, lora=lora, embedding=embedding)
        self.params = [jnp.asarray(w) for w in case.weights()]
        self.state = self.tx.init(self.params)

    def step(self, gradients: list[Any]) -> list[np.ndarray | None]:
        """As `Runner.step`; updates of half-precision parameters are rounded already."""
        grads = [None if g is None else jnp.asarray(g) for g in gradients]
        updates, self.state = self.tx.update(grads, self.state, self.params)
        self.params = [p if u is None else optax.apply_updates(p, u) for p, u in zip(self.params, updates, strict=True)]
        return [None if u is None or g is None else np.asarray(u) for u, g in zip(updates, gradients, strict=True)]

    def weights(self) -> list[np.ndarray]:
        """As `Runner.weights`."""
        return [np.asarray(p).copy() for p in self.params]

    def states(self, i: int) -> dict[str, np.ndarray]:
        """As `Runner.states`."""
        found: dict[str, np.ndarray] = {}
        for part in jax.tree.leaves(self.state, is_leaf=_is_state):
            if isinstance(part, ScaleByCameampState):
                trees = {k: v for k, v in part._asdict().items() if k not in _SHARED and v is not None}
            elif isinstance(part, SuppressEdgesState):
                trees = {"edge_age": part.age, "edge_history": part.edge_history}
            else:
                continue
            for name, tree in trees.items():
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree[i]):
                    found[name + jax.tree_util.keystr(path)] = np.asarray(leaf).copy()
        return found


class CompiledRunner(JaxRunner):
    """The same, compiled once for each configuration."""

    _steps: ClassVar[dict[str, Any]] = {}

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        key = repr((case.fields, case.layout, case.arrays))
        if key not in self._steps:
            self._steps[key] = jax.jit(self.tx.update)
        self.tx = optax.GradientTransformationExtraArgs(self.tx.init, self._steps[key])


def make(fields: dict[str, Any], **marks: Any) -> optax.GradientTransformationExtraArgs:
    """The transformation; raises what it raises."""
    others = {name: value for name, value in fields.items() if name != "lr"}
    return automagic_8bit(fields["lr"], **marks, **others)


def refuses(fields: dict[str, Any]) -> str:
    """The error's text, or an empty one where the fields are taken."""
    try:
        make(fields)
    except ValueError as error:
        return str(error)
    return ""


def _is_state(x: Any) -> bool:
    return isinstance(x, (ScaleByCameampState, SuppressEdgesState))
