"""`automagic_8bit`: the whole optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optax

from automagic_core import Config, Layout
from automagic_optax.cameamp import scale_by_cameamp
from automagic_optax.marks import Mark
from automagic_optax.round_to_parameters import round_to_parameters


def automagic_8bit(
    learning_rate: Any,
    *,
    weight_decay: Any = 5e-4,
    profile: str | None = None,
    layout: Layout = "flax",
    lora: Mark = None,
    embedding: Mark = None,
    weight_decay_mask: Any | Callable[[Any], Any] | None = None,
    **overrides: Any,
) -> optax.GradientTransformationExtraArgs:
    """CAME-like moments in 8 bits with a learning rate that finds itself.

    Args:
        learning_rate: where the search for the rate starts: a number in [min_lr, max_lr], a traced scalar or a
            schedule of the step.
        weight_decay: decoupled, times the learning rate; a number ≥ 0 or a traced scalar.
        profile: ``"memory_optimized"`` (13 % of Adam's state), ``"balanced"`` (25 %) or ``"quality_optimized"`` (38 %).
        layout: what the parameters' axes mean: ``"flax"`` (..., in, out) or ``"torch"`` (out, in, ...).
        lora: which arrays are adapters: a predicate on (path, leaf), a tree of booleans, or None to find them by their
            types and names (`default_marks`; `found_marks` lists them).  Reserved for the low-rank stage of section 4,
            which this version does not have yet.
        embedding: which arrays are embeddings, (num, features) in both layouts; given like `lora`.
        weight_decay_mask: which arrays are decayed, as in ``optax.add_decayed_weights``.
        **overrides: any other field of `automagic_core.Config`; they win over the profile.  A mapping passed as
            ``overrides=`` is merged, which is how ``optax.inject_hyperparams`` passes them.

    Returns:
        ``optax.chain(scale_by_cameamp(...), round_to_parameters(...))``.  Its update needs `params`.

    Raises:
        ValueError: an unknown name or a value outside its range, naming the field, the value and the range.

    Example:
        >>> tx = optax.chain(optax.clip_by_global_norm(1.0), automagic_8bit(1e-4, warmup_steps=200))
        >>> state = tx.init(params)
        >>> updates, state = tx.update(grads, state, params)
    """
    nested = overrides.pop("overrides", {})
    if not isinstance(nested, Mapping):
        raise ValueError(f"overrides = {nested!r} is not a mapping of field names to values")
    overrides = {**nested, **overrides}
    if "lr" in overrides:
        raise ValueError(f"lr = {overrides['lr']!r}: the learning rate is automagic_8bit's first argument")
    config = Config(lr=learning_rate, weight_decay=weight_decay, profile=profile, **overrides)
    # Stages 1 to 4 of section 2 go in front of these.
    del lora
    return optax.chain(
        scale_by_cameamp(config=config, layout=layout, embedding=embedding, weight_decay_mask=weight_decay_mask),
        round_to_parameters(config.stochastic_rounding_params),
    )
