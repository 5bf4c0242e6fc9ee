"""`automagic_8bit`: the whole optimizer, a chain (`docs/algorithm.md`, section 2)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from automagic_core import Config, Layout, picture_axes
from automagic_core.config.config import PROFILES, check_field
from automagic_optax.arrays.marks import Mark, resolve_decay_mask, resolve_mark
from automagic_optax.arrays.usable import refuse_unusable
from automagic_optax.arrays.with_types import with_types
from automagic_optax.cameamp.round_to_parameters import round_to_parameters
from automagic_optax.cameamp.transformation import scale_by_cameamp
from automagic_optax.codec.quantized_array import RoundingRule, exact_rule
from automagic_optax.stages.clip_by_percentile import clip_by_percentile
from automagic_optax.stages.encourage_low_rank import encourage_low_rank
from automagic_optax.stages.suppress_edges import suppress_edges
from automagic_optax.stages.suppress_high_frequencies import suppress_high_frequencies

# An object of its own, so that `is` tells it from the same number given by the caller.
_WEIGHT_DECAY: float = float(repr(Config.weight_decay))


def automagic_8bit(
    learning_rate: Any = None,
    *,
    weight_decay: Any = _WEIGHT_DECAY,
    profile: str | None = None,
    lr: Any = None,
    config: Config | None = None,
    layout: Layout = "flax",
    lora: Mark = None,
    embedding: Mark = None,
    weight_decay_mask: Any | Callable[[Any], Any] | None = None,
    **overrides: Any,
) -> optax.GradientTransformationExtraArgs:
    """CAME-like moments in 8 bits with a learning rate that finds itself.

    Args:
        learning_rate: where the rate search begins: a number in [min_lr, max_lr], a traced scalar or a schedule of the
            step; or a `Config`, as for `config`.  `learning_rate` the function gives the rate that the search found.
        weight_decay: decoupled and multiplied by the learning rate; a number ≥ 0 or a traced scalar.
        profile: ``"memory_optimized"`` (13 % of Adam's state), ``"balanced"`` (26 %) or ``"quality_optimized"`` (38 %).
        lr: another name of `learning_rate`.
        config: hyperparameters by `Config`; arguments given beside it win over it.
        layout: what the parameters' axes mean: ``"flax"`` (..., in, out) or ``"torch"`` (out, in, ...).
        lora: which arrays are adapters: a predicate on (path, leaf), a tree of booleans, or None to find them by type
            and name (`default_marks`; `found_marks` lists them).
        embedding: which arrays are embeddings, (num, features) in both layouts; given like `lora`.
        weight_decay_mask: which arrays are decayed, as in ``optax.add_decayed_weights``.
        **overrides: any other field of `automagic_core.Config`; they win over the profile.  A mapping passed as
            ``overrides=`` is merged, since ``optax.inject_hyperparams`` passes them so.  There only `learning_rate` and
            `weight_decay` become hyperparameters of the state.  All other fields are constants of the compiled step.
            A function given as `lora`, `embedding` or `weight_decay_mask` must be named in its ``static_args``, or it
            calls the function as a schedule of the step.

    Returns:
        ``optax.chain`` of the stages of section 4 that are on, `scale_by_cameamp` and `round_to_parameters`.  Its
        update needs `params`.

    Raises:
        ValueError: an unknown name or a value outside its range, naming the field, the value and the range; no
            learning rate, or two.

    Example:
        >>> tx = optax.chain(optax.clip_by_global_norm(1.0), automagic_8bit(1e-4, warmup_steps=200))
        >>> state = tx.init(params)
        >>> updates, state = tx.update(grads, state, params)
    """
    # optax.inject_hyperparams passes all of them as one mapping, which may contain the caller's own mapping.
    while "overrides" in overrides:
        nested = overrides.pop("overrides")
        if not isinstance(nested, Mapping):
            raise ValueError(f"overrides = {nested!r} is not a mapping of field names to values")
        if named := [name for name in ("lr", "learning_rate", "weight_decay", "profile", "config") if name in nested]:
            raise ValueError(f"overrides has {', '.join(named)}, which automagic_8bit takes as arguments of their own")
        overrides = {**nested, **overrides}
    if isinstance(learning_rate, Config):
        if config is not None:
            raise ValueError("two configs: give it as the first argument or as config=")
        learning_rate, config = None, learning_rate
    if learning_rate is not None and lr is not None:
        raise ValueError(f"lr = {lr!r} and learning_rate = {learning_rate!r} are two names of one argument: give one")
    learning_rate = lr if learning_rate is None else learning_rate
    if config is not None:
        learning_rate = config.lr if learning_rate is None else learning_rate
        weight_decay = _decay_beside(config, weight_decay)
        check_field("profile", profile)
        own = {name: value for name, value in config.__dict__.items() if name not in ("lr", "weight_decay", "profile")}
        overrides = {**own, **PROFILES.get(profile or "", {}), **overrides}
    elif learning_rate is None:
        raise ValueError("no learning rate: automagic_8bit(1e-4), lr=1e-4 or a Config says where the search begins")
    config = Config(lr=learning_rate, weight_decay=weight_decay, profile=profile, **overrides)
    for _, sentence in config.advice():
        warnings.warn(sentence, stacklevel=2)
    rounding = round_to_parameters(config.stochastic_rounding_params)
    before = up_to_rounding(config, layout, lora=lora, embedding=embedding, weight_decay_mask=weight_decay_mask)

    def anew(values: Any) -> optax.GradientTransformationExtraArgs:
        return automagic_8bit(
            **values,
            layout=layout,
            lora=lora,
            embedding=embedding,
            weight_decay_mask=weight_decay_mask,
        )

    # As the config has them: arrays go into the function `anew` as traced ones, which not all fields may be.
    fields = {name: getattr(config, name) for name in overrides}
    values = {"learning_rate": learning_rate, "weight_decay": weight_decay, "profile": profile, **fields}
    return with_types(optax.chain(*before, rounding), anew, values)


def _decay_beside(config: Config, weight_decay: Any) -> Any:
    """The weight decay that was given beside a config, or that of the config."""
    if isinstance(weight_decay, (int, float)):
        return config.weight_decay if weight_decay is _WEIGHT_DECAY else weight_decay
    if config.weight_decay != _WEIGHT_DECAY:
        # optax.inject_hyperparams passes an array also where nothing was given.
        raise ValueError(
            f"weight_decay is an array, and the config has {config.weight_decay!r}: under inject_hyperparams give "
            "weight_decay= beside the config, and leave it out of the config"
        )
    return weight_decay


def up_to_rounding(
    config: Config,
    layout: Layout,
    *,
    lora: Mark = None,
    embedding: Mark = None,
    weight_decay_mask: Any | Callable[[Any], Any] | None = None,
    rule: RoundingRule = exact_rule,
) -> list[optax.GradientTransformationExtraArgs]:
    """The transformations of `automagic_8bit` before `round_to_parameters`, for the same arguments.

    Args:
        rule: how the codec rounds, as in `quantize`.
    """

    def kinds_of(params: Any) -> list[tuple[bool, ...]]:
        return list(
            zip(
                resolve_mark(lora, params, "lora"),
                resolve_mark(embedding, params, "embedding"),
                resolve_decay_mask(weight_decay_mask, params),
                strict=True,
            )
        )

    scale = functools.partial(
        scale_by_cameamp,
        config=config,
        layout=layout,
        lora=lora,
        embedding=embedding,
        weight_decay_mask=weight_decay_mask,
        rule=rule,
    )
    stages = _gradient_stages(config, layout, lora, embedding)
    if not stages:
        return [scale()]

    def changed(params: Any) -> bool:
        if config.clips_by_percentile or config.encourages_low_rank:
            return True
        return any(picture_axes(x.shape, layout, config.spatial_scope) is not None for x in jax.tree.leaves(params))

    return [refuse_unusable(kinds_of, changed), *stages, scale()]


def _gradient_stages(
    config: Config, layout: Layout, lora: Mark, embedding: Mark
) -> list[optax.GradientTransformationExtraArgs]:
    """The stages that are on, in the order of the chain."""
    stages = []
    if config.clips_by_percentile:
        stages.append(clip_by_percentile(config.percentile_clipping))
    if config.suppresses_edges:
        strengths = (config.edge_penalty, config.edge_threshold)
        stages.append(
            suppress_edges(*strengths, layout=layout, embedding=embedding, spatial_scope=config.spatial_scope)
        )
    if config.suppresses_frequencies:
        stages.append(
            suppress_high_frequencies(config.frequency_penalty, layout=layout, spatial_scope=config.spatial_scope)
        )
    if config.encourages_low_rank:
        stages.append(
            encourage_low_rank(config.rank_penalty_strength, config.low_rank_emphasis, layout=layout, lora=lora)
        )
    return stages
