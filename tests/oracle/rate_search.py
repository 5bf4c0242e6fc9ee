"""Sections 5.6 and 5.8 of ALGORITHM.md in float64: rates and their search."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.oracle.codec import random_unit
from tests.oracle.stages import Array


def rise_after_climb(cfg: Any, rho: float, growth: float, agreement: float | None, peak: float) -> float:
    """What the walk adds to ell in a step that is long enough; an `agreement` of None is not asked for."""
    straightness = cfg.straightness * min(1.0, max(0.5, growth))
    beyond = min(0.5, math.log(rho / straightness)) if rho > straightness else 0.0
    rise = cfg.search_gain * beyond * min(1.0, max(0.0, 2.0 - growth))
    if agreement is None:
        return rise
    if agreement < 0 and rho <= cfg.straightness:
        agreement = 2 * agreement
    return min(rise, 0.75 * max(0.0, agreement - max(cfg.agreement_floor, -abs(peak) / 2)), 0.15)


def random_rises(count: int = 300) -> list[tuple[float, float, float, float]]:
    """Arguments of `rise_after_climb` with which no climb goes on."""
    rng = np.random.default_rng(0)
    rho, growth = rng.uniform(0.5, 2.5, count), rng.uniform(0.3, 2.2, count)
    agreement, peak = rng.uniform(-0.15, 0.09, count), rng.uniform(-0.4, -0.01, count)
    return list(zip(*(x.tolist() for x in (rho, growth, agreement, peak)), strict=True))


class RateSearch:
    """What `CameampOracle` is for the rates of its group.  It gives `cfg`, `disable`, `step`, `state` and the rows."""

    cfg: SimpleNamespace
    disable: frozenset[str]
    step: int
    state: list[dict[str, Any]]
    absent: set[int]

    def _row_axis(self, i: int) -> int:
        raise NotImplementedError

    def _row_mean(self, i: int, x: Array) -> Array:
        raise NotImplementedError

    def _begin_search(self) -> None:
        self.use_search: bool = self.cfg.search_gain > 0 < self.cfg.warmup_steps and "search" not in self.disable
        asks = self.cfg.agreement_floor > -1 and "agreement" not in self.disable
        self.use_agreement: bool = self.use_search and asks
        self.use_mask: bool = self.cfg.lr_mask_gain > 0 and "lr_mask" not in self.disable
        self.log_rate_scale = self.walk_energy = self.agreement = self.peak_agreement = 0.0
        self.first_norm = self.gradient_norm = 0.0
        self.signs: dict[int, Array] = {}

    def _start(self, base_lr: float) -> None:
        """The first rate of a search is the lower of 1e-5 and the one asked for."""
        if self.step == 1 and self.use_search and base_lr > 0:
            self.log_rate_scale = min(0.0, math.log(1e-5 / base_lr))

    def _rates(self, state: dict[str, Any], base_lr: float, kappa: Array | float) -> tuple[Any, Any]:
        """The array's rate and the row's (the same where there are no rows)."""
        eta = self._ramped(base_lr)
        delta = 0.0 if state["lr_mask"] is None else state["lr_mask"]
        return self._limited(eta, self.log_rate_scale), self._limited(eta * kappa, self.log_rate_scale + delta)

    def _limited(self, rate: Any, found: Any) -> Any:
        """The limits bound what is found, never the rate that was asked for."""
        if "max_lr" in self.disable:
            return rate * np.exp(found)
        return np.clip(rate * np.exp(found), np.minimum(self.cfg.min_lr, rate), np.maximum(self.cfg.max_lr, rate))

    def _ramped(self, base_lr: float) -> float:
        ramp = 0 if self.use_search else math.ceil(self.cfg.warmup_steps / 4)
        return base_lr if ramp == 0 or "warmup_ramp" in self.disable else base_lr * min(1.0, self.step / ramp)

    def _walked(self, i: int, x: Array) -> Array:
        """Sum of x times its signs over each row, or over an array without rows."""
        # The top bit of the random word is the sign.
        signed = np.where(random_unit(0, 5, x.size) < 0.5, 1.0, -1.0).reshape(x.shape) * x
        rows = self._row_axis(i) % x.ndim if x.ndim >= 2 else None
        return signed.sum(axis=tuple(axis for axis in range(x.ndim) if axis != rows), keepdims=True)

    def _kept(self) -> float:
        """In the climb a walk is that of the step alone."""
        return 0.0 if self.use_agreement and self.peak_agreement >= 0 else 1.0

    def _lengthened(self, norm: float) -> float:
        """The gradients' norm over that of the first four steps."""
        if self.step < 5:
            self.first_norm += (norm - self.first_norm) / (self.step if self.first_norm > 0 else 1)
            self.gradient_norm = self.first_norm
        else:
            self.gradient_norm = 0.5 * self.gradient_norm + 0.5 * norm
        return self.gradient_norm / self.first_norm if self.first_norm > 0 else 0.0

    def _search(self, taking_part: dict[int, Array], base_lr: float) -> None:
        """The rate climbs while gradients agree; then it rises while the path is straighter than a random walk."""
        if not self.use_search:
            return
        elements = sum(g.size for g in taking_part.values() if np.any(g != 0))
        norm = math.sqrt(sum(float((g**2).sum()) for g in taking_part.values()))
        growth = 0.0 if elements == 0 else self._lengthened(norm)
        array_rate, _ = self._rates({"lr_mask": None}, base_lr, 1.0)
        kept, energy = self._kept(), float(array_rate) ** 2 * elements
        if len(self.absent) < len(self.state):
            self.walk_energy = kept * self.walk_energy + energy
        # An array that is not here today has travelled all the same.
        walks = [state["walk"] if i in taking_part else kept * state["walk"] for i, state in enumerate(self.state)]
        for i in self.absent:
            self.state[i]["walk"] = walks[i]
        walked = sum(float((walk**2).sum()) for walk in walks)
        if energy == 0:
            return
        rise = 0.0
        to_start = math.log(1e-5 / float(array_rate))
        if kept == 0 and self.step >= 5:
            self.peak_agreement = max(self.peak_agreement, self.agreement)
        peak = max(abs(self.peak_agreement), 1e-3)
        back = min(0.8, 2 * peak)
        agrees = self.agreement > 0 and self.agreement >= peak / 2
        is_long = 4 * self.step * energy >= self.walk_energy
        again = self.step >= 5 and self.agreement >= 0.1 and is_long
        if kept == 0 and self.step < 5:
            rise = max(0.4, to_start)
        elif self.use_agreement and agrees and (kept == 0 or again):
            # The climb goes on, slower where agreement fades, or goes on again with what was taken back.
            self.peak_agreement = peak
            rise = 0.4 * min(1.0, 2 * self.agreement / peak - 1) + (0.0 if kept == 0 else back)
            rise = max(rise, to_start)
        elif kept == 0:
            if self.agreement != 0:
                self.peak_agreement = -peak
                # Back by two steps of the climb, or less after a low peak, but not below 1e-5.
                rise = min(0.0, max(-back, to_start))
        elif is_long:
            growth = 1.0 if "calm" in self.disable else growth
            asked = self.agreement if self.use_agreement else None
            rise = rise_after_climb(self.cfg, math.sqrt(walked / self.walk_energy), growth, asked, peak)
        room = math.log(self.cfg.max_lr / max(base_lr, self.cfg.min_lr)) - self.log_rate_scale
        self.log_rate_scale += min(rise, max(0.0, room))

    def _vote(self, taking_part: dict[int, Array]) -> None:
        """Pool the votes into agreement and move each row's lr_mask; `self.signs` are those of the momentum before."""
        if not (self.use_agreement or self.use_mask):
            return
        sum_of_votes = sum_of_sizes = 0.0
        voters: list[tuple[int, Array, Array]] = []
        for i, g in taking_part.items():
            state = self.state[i]
            vote = np.sign(g) * self.signs[i]
            weight = np.abs(g)
            # At an array's first step there is no momentum.
            if state["age"] < 2 or weight.sum() == 0:
                continue
            sum_of_votes += g.size * float((weight * vote).sum() / weight.sum())
            sum_of_sizes += g.size
            voters.append((i, weight, vote))
        if not voters:
            return  # agreement stays
        mean_vote = sum_of_votes / sum_of_sizes
        # The first vote enters whole.
        self.agreement = 0.5 * self.agreement + 0.5 * mean_vote if self.agreement != 0 else mean_vote
        for i, weight, vote in voters:
            delta = self.state[i]["lr_mask"]
            if delta is None:
                continue
            columns = weight.size // delta.size
            row_weight = self._row_mean(i, weight)
            seen = row_weight > 0  # lr_mask stays where the row has no gradient
            row_vote = self._row_mean(i, weight * vote) / np.where(seen, row_weight, 1.0)
            moved = delta + self.cfg.lr_mask_gain * (row_vote - mean_vote) * columns / (columns + 256)
            self.state[i]["lr_mask"] = np.where(seen, np.clip(moved, -math.log(3), math.log(3)), delta)
