"""`scale_by_cameamp`: section 5 of the page as an optax transformation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from automagic_core import MAX_STEP, Config, Layout, StatePlan, check_layout, state_plan
from automagic_optax import codec
from automagic_optax.array_step import ArrayStep, Shared, step_array
from automagic_optax.cameamp_state import (
    ArrayState,
    ScaleByCameampState,
    gather_states,
    initial_state,
    scatter_states,
)
from automagic_optax.checks import check_dtypes, check_params
from automagic_optax.lr_mask import Votes, count_votes, rates
from automagic_optax.marks import Mark, flatten_like, resolve_decay_mask, resolve_mark, unflatten_like
from automagic_optax.stored import Writer


def scale_by_cameamp(
    learning_rate: Any = None,
    *,
    weight_decay: Any = None,
    config: Config | None = None,
    layout: Layout = "flax",
    embedding: Mark = None,
    weight_decay_mask: Any | Callable[[Any], Any] | None = None,
    rule: codec.RoundingRule = codec.exact_rule,
) -> optax.GradientTransformationExtraArgs:
    """Moments, confidence, torque, learning-rate mask, spatial factor and weight decay (section 5).

    With m̂ the momentum of the normalized gradients u = clip(g / √v̂, ± 3) and r̂ the running mean of (u − m̂)²,

        d = m̂ / √(r̂ + 0.01),    d ← d · τ / τ̄,    update = −(ηᵢ · d + η̂ · weight_decay · b · w)

    where the torque τ favours elements whose momentum and gradient agree, the row's rate ηᵢ and the array's rate η̂ are
    found while warming up by a vote of gradient polarities, and b relaxes the decay of informed weights.

    Args:
        learning_rate: η₀, a number, a traced scalar or a schedule of the step; by default ``config.lr``.
        weight_decay: a number or a traced scalar; by default ``config.weight_decay``.
        config: all other hyperparameters.
        layout: what the parameters' axes mean, ``"flax"`` or ``"torch"`` (section 1).
        embedding: which arrays are embeddings: a predicate on (path, leaf), a tree of booleans, or None to find them
            (`default_marks`).
        weight_decay_mask: which arrays are decayed, as in ``optax.add_decayed_weights``.
        rule: how the codec rounds, as in `quantize`.

    Returns:
        A transformation whose update needs `params`.  Its state is a `ScaleByCameampState`.  Updates are float32 and
        not yet rounded to a parameter's dtype (`round_to_parameters` does that); they contain the learning rate and
        its sign.

    Raises:
        ValueError: a hyperparameter outside its range; params missing in update; a parameter that is not floating.

    References:
        Luo et al., *CAME*, arXiv 2307.02047; Shazeer and Stern, *Adafactor*, arXiv 1804.04235; *Torque-Aware
        Momentum*, arXiv 2412.18790; Dettmers et al., *8-bit Optimizers*, arXiv 2110.02861.

    Example:
        >>> tx = optax.chain(optax.clip_by_global_norm(1.0), scale_by_cameamp(1e-4))
    """
    config = Config() if config is None else config
    config.validate()
    check_layout(layout)
    learning_rate = config.lr if learning_rate is None else learning_rate
    weight_decay = config.weight_decay if weight_decay is None else weight_decay

    def plans_of(params: Any) -> list[StatePlan]:
        marks = resolve_mark(embedding, params, "embedding")
        leaves = jax.tree.leaves(params)
        return [
            state_plan(leaf.shape, config, layout, embedding=mark) for leaf, mark in zip(leaves, marks, strict=True)
        ]

    def init(params: Any) -> ScaleByCameampState:
        check_dtypes(params)
        arrays = [initial_state(plan) for plan in plans_of(params)]
        return gather_states(
            params, jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32), arrays, _absent_states(config)
        )

    def update(
        updates: Any, state: ScaleByCameampState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ScaleByCameampState]:
        del extra_args
        check_params(params)
        step = jnp.minimum(state.step, MAX_STEP - 1) + 1
        warming = step <= config.warmup_steps
        now = rates(learning_rate, state.lr_scale, step, config)
        writer = Writer(step, config.stochastic_rounding, rule)
        shared = Shared(config, weight_decay, warming, now, writer)

        plans, weights = plans_of(params), jax.tree.leaves(params)
        gradients = flatten_like(params, updates)
        decayed = resolve_decay_mask(weight_decay_mask, params)
        olds = scatter_states(params, state, config.absmax_block_size)
        new_updates: list[jax.Array | None] = []
        arrays: list[ArrayState] = []
        votes: list[Votes | None] = []
        skipped = jnp.zeros([], jnp.int32)
        for g, w, old, plan, is_decayed in zip(gradients, weights, olds, plans, decayed, strict=True):
            if g is None or plan.size == 0:
                stepped = ArrayStep(_no_step(g), old, None, skipped)
            else:
                stepped = step_array(g, w, old, plan, is_decayed, shared, skipped)
            new_updates.append(stepped.update)
            arrays.append(stepped.state)
            votes.append(stepped.vote)
            skipped = stepped.skipped
        # The count is never negative, which the compiler cannot know: using it here keeps the arrays in their order.
        step = jnp.where(skipped < 0, 0, step)

        masks = [array.lr_mask for array in arrays]
        lr_scale, masks = count_votes(votes, masks, plans, now, warming & (step >= 2), config)
        arrays = [array._replace(lr_mask=mask) for array, mask in zip(arrays, masks, strict=True)]
        absent = frozenset(name for name in ArrayState._fields if getattr(state, name) is None)
        return unflatten_like(params, new_updates), gather_states(params, step, lr_scale, arrays, absent)

    return optax.GradientTransformationExtraArgs(init, update)


def _absent_states(config: Config) -> frozenset[str]:
    # An array of two axes and any size has every state that some array has.
    plan = state_plan((1, 1), config, "flax")
    present = {
        "s": plan.has_s,
        "last_polarity": plan.has_last_polarity,
        "lr_mask": plan.has_lr_mask,
        "spatial_variance": plan.has_spatial_variance,
    }
    return frozenset(name for name, has in present.items() if not has)


def _no_step(g: jax.Array | None) -> jax.Array | None:
    return None if g is None else jnp.zeros(g.shape, jnp.float32)
