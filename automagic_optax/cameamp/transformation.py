"""`scale_by_cameamp`: the update as an optax transformation (`docs/algorithm.md`, section 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from automagic_core import MAX_STEP, Config, Layout, StatePlan, check_layout, state_plan
from automagic_core.config.constants import GRADIENT_LIMIT
from automagic_optax.arrays.batches import Batched, enter, unstack
from automagic_optax.arrays.checks import check_dtypes, check_gradients, check_params, check_shapes
from automagic_optax.arrays.in_chunks import after
from automagic_optax.arrays.marks import Mark, check_not_called, found_marks, resolve_decay_mask, resolve_mark
from automagic_optax.arrays.with_types import with_types
from automagic_optax.cameamp.batch_step import BatchStep, step_batch
from automagic_optax.cameamp.known_before import Shared
from automagic_optax.cameamp.learning_rate import kept, new_masks, rates, searched, walk_square
from automagic_optax.cameamp.states import (
    ArrayState,
    ScaleByCameampState,
    Search,
    absent_states,
    gather_states,
    initial_state,
    scatter_states,
)
from automagic_optax.cameamp.verbose import start_line, tell_step
from automagic_optax.codec.quantized_array import RoundingRule, exact_rule
from automagic_optax.codec.stored import Writer
from automagic_optax.sharding.placement import scalar_like


class Kind(NamedTuple):
    """What the arrays of one batch share besides shape and dtype (section 8)."""

    plan: StatePlan
    decayed: bool
    param_dtype: Any
    states: Any


def scale_by_cameamp(
    learning_rate: Any = None,
    *,
    weight_decay: Any = None,
    config: Config | None = None,
    layout: Layout = "flax",
    lora: Mark = None,
    embedding: Mark = None,
    weight_decay_mask: Any | Callable[[Any], Any] | None = None,
    rule: RoundingRule | None = None,
    gradient_limit: float | jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Moments, confidence, torque, spatial factor, rate search and weight decay.

    m̂ is the momentum of the normalized gradients u = clip(g / √v̂, ± 3), and r̂ the moving average of (u − m̂)².  Then

        d = m̂ / √(r̂ + 0.01),    d ← d · τ / τ̄,    update = −(ηᵢ · d + η̂ · weight_decay · b · w)

    The torque τ favours elements whose momentum and gradient agree.  During the warm-up the rate rises while the
    weights travel straighter than a random walk, or gradients have shrunk, and gradients agree with the momentum.
    b relaxes the decay of informed weights.

    Args:
        learning_rate: η₀, a number, a traced scalar or a schedule of the step; by default ``config.lr``.
        weight_decay: a number or a traced scalar; by default ``config.weight_decay``.
        config: all other hyperparameters.
        layout: what the parameters' axes mean, ``"flax"`` or ``"torch"`` (section 1.1).
        lora: which arrays are adapters, given like `embedding`; only `config.verbose` uses it.
        embedding: which arrays are embeddings: a predicate on (path, leaf), a tree of booleans, or None to find them
            by name (`default_marks`).
        weight_decay_mask: which arrays are decayed, as in ``optax.add_decayed_weights``.
        rule: how the codec rounds, as in `quantize`; None for `exact_rule`.
        gradient_limit: an array with a gradient element above this in magnitude is skipped; None for 10¹⁵.  It does not
            hold for what comes from the stages of `automagic_8bit`, which looks at the gradients before them.

    Returns:
        A transformation whose update needs `params`.  Its state is a `ScaleByCameampState`.  Updates are float32 and
        not yet rounded to the dtype of the parameters (`round_to_parameters` does that).  They contain the learning
        rate and its sign.

    Raises:
        ValueError: a hyperparameter outside its range; a parameter that is not floating; in update, params
            missing, or a parameter of another shape than in init or than its gradient.

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
    injected = any(isinstance(x, jax.Array) for x in (learning_rate, weight_decay))
    check_not_called(weight_decay_mask, "weight_decay_mask", injected)
    # Not in the signature: optax.inject_hyperparams calls functions as schedules, and makes arrays of numbers.
    rule = exact_rule if rule is None else rule
    gradient_limit = GRADIENT_LIMIT if gradient_limit is None else gradient_limit

    def plans_of(params: Any) -> list[StatePlan]:
        marks = resolve_mark(embedding, params, "embedding")
        leaves = jax.tree.leaves(params)
        return [
            state_plan(leaf.shape, config, layout, embedding=mark) for leaf, mark in zip(leaves, marks, strict=True)
        ]

    def start(params: Any, state: ScaleByCameampState) -> str:
        found = found_marks(params, lora, embedding)
        return start_line(config, state, len(found["lora"]), len(found["embedding"]))

    def init(params: Any) -> ScaleByCameampState:
        check_dtypes(params)
        leaves = jax.tree.leaves(params)
        arrays = [initial_state(plan, leaf) for plan, leaf in zip(plans_of(params), leaves, strict=True)]
        step, rate = scalar_like(params, 0, jnp.int32), scalar_like(params, 0, jnp.float32)
        search = Search(*(scalar_like(params, 0, jnp.float32) for _ in Search._fields))
        return gather_states(params, step, search, arrays, absent_states(config), rate)

    def update(
        updates: Any, state: ScaleByCameampState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ScaleByCameampState]:
        del extra_args
        check_params(params)
        if not isinstance(updates, Batched):
            check_gradients(params, updates)
        step = jnp.minimum(state.step, MAX_STEP - 1) + 1
        warming = step <= config.warmup_steps
        now = rates(learning_rate, state.log_rate_scale, step, config)
        writer = Writer(step, config.stochastic_rounding, rule)
        keep = kept(Search.of(state), config)
        # Batches come from `refuse_unusable`, which has looked at them; the stages may enlarge them a little.
        limit = np.inf if isinstance(updates, Batched) else gradient_limit
        shared = Shared(config, weight_decay, warming, now, keep, writer, limit)

        plans, weights = plans_of(params), jax.tree.leaves(params)
        decayed = resolve_decay_mask(weight_decay_mask, params)
        arrays = scatter_states(params, state)
        check_shapes(params, [array.exp_avg for array in arrays], "exp_avg")
        kinds = [
            Kind(plan, is_decayed, w.dtype, jax.tree.structure(old))
            for w, old, plan, is_decayed in zip(weights, arrays, plans, decayed, strict=True)
        ]
        batched, leave = enter(updates, params, kinds)
        steps: list[BatchStep] = []
        # Always 0, but the compiler cannot know that: otherwise it removes the branches that save memory.
        skipped = jnp.minimum(state.step, 0)
        for positions, g, kind in zip(batched.positions, batched.arrays, batched.kinds, strict=True):
            members = [(weights[position], arrays[position]) for position in positions]
            if steps and len(members) == 1:
                g = after(skipped, g)
            steps.append(step_batch(g, members, kind.plan, kind.decayed, shared, skipped))
            skipped = steps[-1].skipped
        # The count is never negative, but the compiler cannot know that: used here, it keeps the arrays in their order.
        step = jnp.where(skipped < 0, 0, step)

        found = [stepped.evidence for stepped in steps]
        squares = [stepped.walk_squares for stepped in steps if stepped.walk_squares is not None]
        # An array that takes no part today has travelled all the same.
        present = {position for positions in batched.positions for position in positions}
        for position, a in enumerate(arrays):
            if position not in present and a.walk is not None:
                walk = jnp.where(warming, a.walk * keep, a.walk)
                arrays[position] = a._replace(walk=walk)
                squares.append(walk_square(walk))
        search, pooled = searched(Search.of(state), found, squares, now, step, config)
        old_masks = [stepped.masks for stepped in steps]
        masks = new_masks(old_masks, found, [kind.plan for kind in batched.kinds], pooled, step, config)
        new_updates = [_no_step(g) for g in batched.others]
        for positions, stepped, mask in zip(batched.positions, steps, masks, strict=True):
            of_each = [mask] if len(positions) == 1 or mask is None else unstack(mask, len(positions))
            for i, position in enumerate(positions):
                new_updates[position] = stepped.updates[i]
                arrays[position] = stepped.states[i]._replace(lr_mask=of_each[min(i, len(of_each) - 1)])
        absent = frozenset(name for name in ArrayState._fields if getattr(state, name) is None)
        new_state = gather_states(params, step, search, arrays, absent, now.array(), state.last_polarity)
        tell_step(
            config,
            step,
            search.log_rate_scale,
            new_state.skipped_steps,
            rate=new_state.learning_rate,
            peak_agreement=search.peak_agreement,
            start=lambda: start(params, new_state),
        )
        return leave(batched.taken_apart(new_updates)), new_state

    return with_types(optax.GradientTransformationExtraArgs(init, update))


def _no_step(g: jax.Array | None) -> jax.Array | None:
    return None if g is None else jnp.zeros(g.shape, jnp.float32)
