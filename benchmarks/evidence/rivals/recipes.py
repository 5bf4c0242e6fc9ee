"""The others, each as its authors recommend.  What a recipe takes from where stands beside it.

`start` is a peak rate where a method needs one, else the number that its users begin with.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from torch.nn import Parameter

from benchmarks.evidence.rivals.automagic_v3 import AutomagicV3
from benchmarks.evidence.rivals.cautious import CautiousAdamW
from benchmarks.evidence.rivals.method import Averaged, Method, ScheduleFree
from benchmarks.evidence.settings import RAMP_SHARE, WEIGHT_DECAY

Recipe = Callable[[list[Parameter], float, int], Method]
"""(parameters, start, steps) → method."""


def _ramp(steps: int) -> int:
    return round(RAMP_SHARE * steps)


def _tuned(optimizer: torch.optim.Optimizer, start: float, steps: int) -> Method:
    """A peak rate behind a ramp, and a cosine to 0."""
    return Method(optimizer, steps, rate=start, ramp=_ramp(steps))


def adamw(parameters: list[Parameter], start: float, steps: int) -> Method:
    """torch's defaults."""
    return _tuned(torch.optim.AdamW(parameters, lr=start, weight_decay=WEIGHT_DECAY), start, steps)


def cautious_adamw(parameters: list[Parameter], start: float, steps: int) -> Method:
    """AdamW's settings, as in the paper (arXiv 2411.16085): the mask is meant as a change of one line."""
    return _tuned(CautiousAdamW(parameters, lr=start, weight_decay=WEIGHT_DECAY), start, steps)


def adamw8bit(parameters: list[Parameter], start: float, steps: int) -> Method:
    """bitsandbytes' defaults."""
    return _tuned(bnb.optim.AdamW8bit(parameters, lr=start, weight_decay=WEIGHT_DECAY), start, steps)


def came(parameters: list[Parameter], start: float, steps: int) -> Method:
    """The package's defaults, which are the paper's (arXiv 2307.02047)."""
    from came_pytorch import CAME

    return _tuned(CAME(parameters, lr=start, weight_decay=WEIGHT_DECAY), start, steps)


def prodigy(parameters: list[Parameter], start: float, steps: int) -> Method:
    """README of prodigyopt: lr 1, decoupled weight decay, a cosine over all steps and no warm-up; of what it says on
    diffusion models, which LoRA trainers follow, `safeguard_warmup` and β₂ 0.99: the best of its settings here."""
    return _prodigy(parameters, start, steps)


def prodigy_corrected(parameters: list[Parameter], start: float, steps: int) -> Method:
    """The same with `use_bias_correction`, which the README recommends for diffusion models too."""
    return _prodigy(parameters, start, steps, use_bias_correction=True)


def _prodigy(parameters: list[Parameter], start: float, steps: int, **settings: bool) -> Method:
    from prodigyopt import Prodigy

    common: dict[str, Any] = {"betas": (0.9, 0.99), "safeguard_warmup": True, "weight_decay": WEIGHT_DECAY}
    optimizer = _quiet(lambda: Prodigy(parameters, lr=1.0, d0=start, **common, **settings))
    return Method(optimizer, steps, rate=1.0, found="d")


def prodigy_schedule_free(parameters: list[Parameter], start: float, steps: int) -> Method:
    """README of prodigy-plus-schedule-free: lr 1, a constant schedule, the defaults "should just work"; weight decay as
    all others here have it."""
    from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree

    settings = {"lr": 1.0, "d0": start, "weight_decay": WEIGHT_DECAY}
    return ScheduleFree(_quiet(lambda: ProdigyPlusScheduleFree(parameters, **settings)), steps, "d")


def d_adaptation(parameters: list[Parameter], start: float, steps: int) -> Method:
    """README of dadaptation: lr 1, the schedule that one would use otherwise, `decouple` for AdamW's weight decay."""
    from dadaptation import DAdaptAdam

    optimizer = _quiet(lambda: DAdaptAdam(parameters, lr=1.0, d0=start, decouple=True, weight_decay=WEIGHT_DECAY))
    return Method(optimizer, steps, rate=1.0, ramp=_ramp(steps), found="d")


def schedule_free(parameters: list[Parameter], start: float, steps: int) -> Method:
    """README of schedulefree: no schedule but a warm-up, β₁ 0.9, a tuned rate, judged in eval mode."""
    from schedulefree import AdamWScheduleFree

    settings = {"weight_decay": WEIGHT_DECAY, "warmup_steps": _ramp(steps)}
    return ScheduleFree(AdamWScheduleFree(parameters, lr=start, **settings), steps)


class _Mechanized(Method):
    """Its rate is the sum of the scales, times a base rate of 1."""

    def found_rate(self) -> float | None:
        state: Any = self.optimizer.state
        return float(state["_mechanic"]["s"].sum())


def mechanic(parameters: list[Parameter], start: float, steps: int) -> Method:
    """README of mechanic-pytorch: around AdamW with rate 1 and its schedule, all other defaults; the differences are
    kept (`store_delta`), as in optax, rather than computed anew: the README calls that slightly more accurate.  Without
    it the state holds 150 % of Adam's, not 200."""
    from mechanic_pytorch import mechanize

    kind = mechanize(torch.optim.AdamW, s_init=start, store_delta=True)
    optimizer = kind(parameters, lr=1.0, weight_decay=WEIGHT_DECAY)
    return _Mechanized(optimizer, steps, rate=1.0, ramp=_ramp(steps))


def dog(parameters: list[Parameter], start: float, steps: int) -> Method:
    """README of dog-optimizer: no schedule, no weight decay, polynomial averaging, which "must be combined"; by layers
    (L-DoG), which the paper (arXiv 2302.12022) found nearest to Adam."""
    from dog import LDoG, PolynomialDecayAverager

    averager = PolynomialDecayAverager(nn.ParameterList(parameters))
    return Averaged(LDoG(parameters, reps_rel=start), steps, averager, parameters)


def automagic_v3(parameters: list[Parameter], start: float, steps: int) -> Method:
    """ai-toolkit's defaults: a window of 8, no schedule, since the rate falls by itself; weight decay as all others."""
    return Method(AutomagicV3(parameters, lr=start, weight_decay=WEIGHT_DECAY), steps, found="lr")


RECIPES: Mapping[str, Recipe] = {
    "adamw": adamw,
    "cautious-adamw": cautious_adamw,
    "adamw8bit": adamw8bit,
    "came": came,
    "prodigy": prodigy,
    "prodigy-corrected": prodigy_corrected,
    "prodigy-schedule-free": prodigy_schedule_free,
    "d-adaptation": d_adaptation,
    "schedule-free": schedule_free,
    "mechanic": mechanic,
    "dog": dog,
    "automagic-v3": automagic_v3,
}


def _quiet(build: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Without what some packages print when they are built."""
    with contextlib.redirect_stdout(io.StringIO()):
        return build()
