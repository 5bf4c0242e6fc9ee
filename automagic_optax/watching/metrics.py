"""`metrics`: statistics of an optimizer state for dashboards (`docs/algorithm.md`, section 13)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from automagic_core import Config
from automagic_core.watching import metrics as core
from automagic_core.watching.metrics import ArrayFacts, NextStep
from automagic_optax.arrays.containers import pure
from automagic_optax.arrays.leaves import leaf_name, leaves_of
from automagic_optax.arrays.marks import Mark, resolve_mark
from automagic_optax.cameamp.find_states import find_states, opt_state_of, parts_of, refuse_several
from automagic_optax.cameamp.memory_report import memory_report
from automagic_optax.cameamp.states import scatter_states
from automagic_optax.sharding.explicit_mesh import untyped
from automagic_optax.sharding.placement import has_explicit_axes
from automagic_optax.stages.clip_by_percentile import ClipByPercentileState
from automagic_optax.stages.encourage_low_rank import EncourageLowRankState
from automagic_optax.stages.spectrum import effective_rank, gram, scaled, wide_numbers
from automagic_optax.stages.suppress_edges import SuppressEdgesState
from automagic_optax.stages.suppress_high_frequencies import SuppressHighFrequenciesState

_STAGES: Mapping[str, type[Any]] = dict(
    zip(
        core.STAGES,
        (ClipByPercentileState, SuppressEdgesState, SuppressHighFrequenciesState, EncourageLowRankState),
        strict=True,
    )
)
_READ = ("lr_mask", "spatial_variance", "torque_mean", "skipped_steps")


def metrics(
    opt_state: Any,
    learning_rate: Any = None,
    *,
    config: Config | None = None,
    params: Any = None,
    lora: Mark = None,
) -> dict[str, float]:
    """Rates, torque, energy removed by the stages, effective ranks, skipped steps and bytes, as floats.

    ``learning_rate`` is the absolute rate of the last step.  `learning_rate` the function gives it inside jit.
    Call it outside jit, and before a step that donates the state.  It waits for the device once.

    Args:
        opt_state: any state that contains a `ScaleByCameampState`, however it is wrapped, an ``nnx.Optimizer`` or a
            ``TrainState``.
        learning_rate: η₀, a number or a schedule; by default ``config.lr``.
        config: the hyperparameters in use, which a state does not know.  Without them there is ``learning_rate`` and
            ``rate_factor/…``, but no ``rate/…``, the rates of the next step.
        params: the current parameters.  With them the effective ranks are theirs, also where stage 4 is off.  Without
            them the ranks are those that stage 4 saw in the last step, before the update.
        lora: which arrays are adapters, as for `automagic_8bit`; used with `params` only.

    Returns:
        The names of `automagic_core.watching.metrics.metrics`.  Rates are those of the next step.  Before the first
        step there is no torque and no energy, and without `params` no rank.  ``effective_rank/<name>`` has the
        parameter's path, such as ``layer.lora_a``.  If several transformations have a stage (``optax.partition``), its
        energy is the mean of theirs.

    Raises:
        ValueError: the state holds none of this optimizer's states, or those of several members (``jax.vmap``);
            `learning_rate` without `config`; a state that is still being traced.

    Example:
        >>> fields = dict(warmup_steps=200, max_lr=1e-2)
        >>> tx = automagic_8bit(1e-5, **fields)
        >>> metrics(opt_state, config=Config(lr=1e-5, **fields))["rate/mean"]
    """
    if learning_rate is not None and config is None:
        raise ValueError("a learning_rate alone gives no rates; give config= too, for warmup_steps, min_lr and max_lr")
    opt_state = opt_state_of(opt_state)
    states = find_states(opt_state)
    for state in states:
        refuse_several(state.step)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((opt_state, params))):
        raise ValueError("a state inside jit has no values yet; return it from the step and pass it here")
    shared = [(pure(state.step), pure(state.log_rate_scale), pure(state.learning_rate)) for state in states]
    arrays = [(position, array) for position, state in enumerate(states) for array in scatter_states(state.age, state)]
    read = jax.device_get(
        {
            "shared": shared,
            "arrays": [{name: getattr(array, name) for name in _READ} for _, array in arrays],
            "energy": {
                name: [pure(s.energy_removed) for s in parts_of(opt_state, kind)] for name, kind in _STAGES.items()
            },
            "ranks": _seen_ranks(opt_state) if params is None else _ranks_now(params, lora),
        }
    )
    lr: Any = learning_rate if learning_rate is not None or config is None else config.lr
    facts = []
    for (position, array), values in zip(arrays, read["arrays"], strict=True):
        step, log_rate_scale, _ = read["shared"][position]
        size = int(jax.tree.leaves(array.exp_avg)[0].size)
        if size > 0:
            next_step = None if config is None else NextStep.of(config, lr, int(step))
            values |= {"torque_mean": float(values["torque_mean"]), "skipped_steps": int(values["skipped_steps"])}
            facts.append(ArrayFacts(size, float(log_rate_scale), next_step=next_step, **values))
    started = any(int(step) > 0 for step, _, _ in read["shared"])
    rate = max(float(rate) for _, _, rate in read["shared"]) if started else None
    energy = {stage: float(np.mean(shares)) for stage, shares in read["energy"].items() if shares and started}
    ranks = read["ranks"] if started or params is not None else {}
    return core.metrics(facts, energy, ranks, memory_report(opt_state)["state_bytes"], rate)


def _seen_ranks(opt_state: Any) -> dict[str, Any]:
    """The ranks that stage 4 saw last, by the parameter's path."""
    states = parts_of(opt_state, EncourageLowRankState)
    return {leaf_name(leaf.path): leaf.value for state in states for leaf in leaves_of(state.effective_rank)}


def _ranks_now(params: Any, lora: Mark) -> dict[str, Any]:
    named = zip(leaves_of(params), resolve_mark(lora, params, "lora"), strict=True)
    adapters = [leaf for leaf, mark in named if mark and leaf.value.ndim == 2 and leaf.value.size > 0]
    return {leaf_name(leaf.path): _rank_anywhere(jnp.asarray(leaf.value)) for leaf in adapters}


def _rank_anywhere(w: jax.Array) -> jax.Array:
    rank: Any = _rank
    if has_explicit_axes(w):
        rank = untyped(_rank, NamedSharding(jax.typeof(w).sharding.mesh, PartitionSpec()))
    found: jax.Array = rank(w)
    return found


@jax.jit
def _rank(w: jax.Array) -> jax.Array:
    """The effective rank of a matrix; 0 where it is zero or not finite."""
    W = w.astype(jnp.float32)
    W, usable = scaled(W.T if W.shape[0] > W.shape[1] else W)
    with wide_numbers():
        return jnp.where(usable, effective_rank(gram(W)), np.float32(0))
