"""Runs this package's code under its own rules, whatever JAX's switches for the caller's code say.

Under ``jax_numpy_rank_promotion="raise"``, ``jax_numpy_dtype_promotion="strict"`` or
``jax_transfer_guard="disallow"`` a constant in a formula can be an error.  These switches find slips in the code of
those who set them, as JAX's own functions suspend them too.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import optax

_STRICT: contextvars.ContextVar[bool] = contextvars.ContextVar("_STRICT", default=False)


def caller_is_strict() -> bool:
    """Whether the caller may not mix dtypes: ``jax_numpy_dtype_promotion="strict"`` holds around `own_rules`."""
    return _STRICT.get() or jax.numpy_dtype_promotion.value == "strict"


@contextlib.contextmanager
def own_rules() -> Iterator[None]:
    """Suspends the switches, and remembers what `caller_is_strict` asks for."""
    token = _STRICT.set(caller_is_strict())
    try:
        with (
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
            jax.transfer_guard("allow"),
        ):
            yield
    finally:
        _STRICT.reset(token)


def under_own_rules(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """The transformation, with `init` and `update` under `own_rules`."""

    def init(params: Any) -> Any:
        with own_rules():
            return tx.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        with own_rules():
            return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
