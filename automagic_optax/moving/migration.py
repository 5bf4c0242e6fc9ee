"""`from_adam_state`: starts this optimizer from the moments of an Adam run (`docs/algorithm.md`, section 10.2)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from automagic_core import MAX_STEP, Config, Slot
from automagic_core.arrays.bias import stored_confidence, weight_seen
from automagic_core.arrays.parts import in_parts
from automagic_core.config.constants import SQUARE_FLOOR
from automagic_core.moving.notes import Notes
from automagic_optax.arrays.containers import held_like, pure
from automagic_optax.cameamp.find_states import parts_of, refuse_several
from automagic_optax.cameamp.states import ArrayState, Search
from automagic_optax.cameamp.verbose import LOGGER
from automagic_optax.codec.stored import StoredMoment, Writer, moment_from, tensors_of
from automagic_optax.moments.quantized_moment import QuantizedMoment
from automagic_optax.moving.edge_histories import ESTIMATED, estimated
from automagic_optax.moving.filled_chain import Template, match

f32 = np.float32


def from_adam_state(
    opt_state: Any,
    params: Any,
    tx: optax.GradientTransformation,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    config: Config | None = None,
    restart_warmup: bool = True,
) -> tuple[Any, list[str]]:
    """A state of `tx` that takes over the moments of an Adam run.

    m̂ and v̂ are Adam's bias-corrected moments after a steps.  The βs are this optimizer's own.

        exp_avg     ← clip(m̂ / (√v̂ + eps), ± update_clip) · (1 − β₁ᵃ)     the first step goes on in Adam's direction
        exp_avg_sq  ← v̂ · (1 − β₂ᵃ), or its row and column means
        exp_avg_res ← 1 − β₃ᵃ                                             reads as r̂ = 1: no confidence yet
        age         ← a

    `background_scale` gets the mean of √v̂, and `edge_history` is estimated from v̂.  All else begins as in a new run,
    also the other stages and whatever is chained with `tx`.  States are rounded with the random bits of the new state's
    step.  Call it outside ``jax.jit``.

    Args:
        opt_state: holds one ``optax.ScaleByAdamState``, however it is wrapped, such as the state of ``optax.adamw``.
        params: the parameters.
        tx: ``automagic_8bit(...)``, alone or in a chain.
        b1, b2, eps: Adam's.
        config: the hyperparameters that `tx` was made with; `betas`, `update_clip` and `stochastic_rounding` matter.
        restart_warmup: begin at step 0, so that ramp, rate search and schedule begin again.  False goes on at Adam's
            count.  ℓ is 0 in both cases.

    Returns:
        The state, and what was not taken over or begins anew, one sentence each; also logged by
        ``automagic_optax``.  In ``nnx.Optimizer`` put it in place by
        ``nnx.update(optimizer.opt_state, nnx.state(state))``.

    Raises:
        ValueError: there is not exactly one state of Adam, it is of several members (``jax.vmap``), or its arrays are
            not those of `params`.

    Example:
        >>> tx = automagic_8bit(1e-4, warmup_steps=200)
        >>> opt_state, told = from_adam_state(adamw_state, params, tx)
    """
    config = Config() if config is None else config
    notes = Notes()
    template = Template(params, tx)
    adam = _only_adam(pure(opt_state))
    mu, nu = match(template.tree, adam.mu, "Adam's mu"), match(template.tree, adam.nu, "Adam's nu")
    for name, m, v in zip(template.names, mu, nu, strict=True):
        if not bool(jnp.all(jnp.isfinite(m)) & jnp.all(jnp.isfinite(v)) & jnp.all(v >= 0)):
            raise ValueError(f"Adam's state of {name} has values that are not finite, or negative second moments")
    age = min(int(adam.count), MAX_STEP)
    if age < 1:
        raise ValueError("Adam's state took no step; begin with tx.init(params)")
    step = jnp.asarray(0 if restart_warmup else age, jnp.int32)
    writer = Writer(step, config.stochastic_rounding)

    v_hats = [v.astype(jnp.float32) / f32(weight_seen(b2, age)) for v in nu]

    def one(m: jax.Array, v_hat: jax.Array, like: ArrayState) -> ArrayState:
        m_hat = m.astype(jnp.float32) / f32(weight_seen(b1, age))
        root = jnp.sqrt(jnp.maximum(v_hat, f32(SQUARE_FLOOR)))
        # Adam's eps held some elements back.  Without it they would jump.
        u = jnp.clip(m_hat / (root + f32(eps)), -f32(config.update_clip), f32(config.update_clip))
        beta1, beta2, beta3 = config.betas
        confidence = jnp.full(m.shape, stored_confidence(1.0, beta3, age), jnp.float32)
        return like._replace(
            age=jnp.asarray(age, jnp.int32),
            background_scale=None if like.background_scale is None else jnp.mean(root),
            exp_avg=writer.signed(u * f32(weight_seen(beta1, age)), like.exp_avg, Slot.exp_avg),
            exp_avg_sq=in_form(v_hat * f32(weight_seen(beta2, age)), like.exp_avg_sq, writer, Slot.exp_avg_sq),
            exp_avg_res=in_form(confidence, like.exp_avg_res, writer, Slot.exp_avg_res),
        )

    arrays = [one(m, v, like) if m.size else like for m, v, like in zip(mu, v_hats, template.arrays, strict=True)]
    search = Search.of(template.state)
    # In mid-run the climb counts as over.
    search = search if restart_warmup else search._replace(peak_agreement=jnp.full_like(search.peak_agreement, -1))
    histories = [
        like if like.history is None else estimated(v_hat, like.history, age)
        for v_hat, like in zip(v_hats, template.histories, strict=True)
    ]
    filled = template.filled(step, search, arrays, histories, template.state.learning_rate)
    _note_new_states(template, restart_warmup, notes)
    return held_like(template.fresh, filled), notes.tell(LOGGER)


def in_form(value: jax.Array, like: StoredMoment, writer: Writer, slot: Slot) -> StoredMoment:
    """A non-negative elementwise statistic in the form of `like`."""
    wanted = tensors_of(like, slot.name)
    values = in_parts({slot.name: value}, slot.name, {part: x.shape for part, x in wanted.items()}, value)
    return moment_from({part: writer.root(values[part], x, slot) for part, x in wanted.items()}, slot.name)


def _only_adam(opt_state: Any) -> optax.ScaleByAdamState:
    found: list[optax.ScaleByAdamState] = parts_of(opt_state, optax.ScaleByAdamState)
    if len(found) != 1:
        raise ValueError(f"expected one ScaleByAdamState in the optimizer state, found {len(found)}")
    refuse_several(found[0].count)
    read: optax.ScaleByAdamState = jax.tree.map(
        lambda x: x.read() if isinstance(x, QuantizedMoment) else x,
        found[0],
        is_leaf=lambda x: isinstance(x, QuantizedMoment),
    )
    return read


def _note_new_states(template: Template, restart_warmup: bool, notes: Notes) -> None:
    how = {
        "walk": "walk begins at zero, and the search measures from here on",
        "s": "s begins at zero, as in a new run",
        "lr_mask": "lr_mask begins at zero, as in a new run",
        "spatial_variance": "spatial_variance begins at zero, as in a new run",
    }
    for name, array, edges in zip(template.names, template.arrays, template.histories, strict=True):
        if edges.history is not None:
            notes.changed(ESTIMATED, name)
        for state, sentence in how.items():
            if getattr(array, state) is not None:
                notes.changed(sentence, name)
    notes.changed(
        "Adam's hyperparameters, and states of transformations around it, are not taken over: those of tx hold"
    )
    notes.changed(
        "step and log_rate_scale begin at 0: warm-up, schedule and search for the rate start again"
        if restart_warmup
        else "log_rate_scale begins at 0: Adam has no search"
    )
