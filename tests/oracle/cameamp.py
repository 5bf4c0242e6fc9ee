"""Sections 1, 2 and 4 to 7 of ALGORITHM.md in float64 with 32-bit states: everything but the codec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.oracle.chain import GradientStages
from tests.oracle.rate_search import RateSearch
from tests.oracle.settings import FEATURES, STAGES, settings
from tests.oracle.stages import Array, row_axis

EPS = 1e-30
LARGEST_GRADIENT = 1e15
NARROW = 64


class CameampOracle(RateSearch):
    """One parameter group. `disable` switches single features off, to show that a parity test notices.

    `of_torch`: the first step is that of the first gradient, as with a group in PyTorch; else it is the first call.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        *,
        layout: str = "torch",
        embedding: Sequence[bool] | None = None,
        decay_mask: Sequence[bool] | None = None,
        lora: Sequence[bool] | None = None,
        disable: frozenset[str] | set[str] = frozenset(),
        of_torch: bool = False,
        **fields: Any,
    ) -> None:
        self.of_torch = of_torch
        if set(disable) - FEATURES - STAGES or layout not in ("torch", "flax"):
            raise ValueError(f"unknown feature or layout: {disable}, {layout}")
        self.cfg = settings(fields)
        self.shapes = [tuple(shape) for shape in shapes]
        self.layout = layout
        self.embedding = list(embedding or [False] * len(self.shapes))
        self.decay_mask = list(decay_mask or [True] * len(self.shapes))
        self.lora = list(lora or [False] * len(self.shapes))
        self.disable = frozenset(disable)
        self.stages = GradientStages(
            self.cfg, layout=layout, embedding=self.embedding, lora=self.lora, disable=self.disable
        )
        self.use_torque: bool = self.cfg.torque and "torque" not in disable
        self._begin_search()
        self.use_spatial: bool = self.cfg.spatial_awareness and "spatial" not in disable
        self.use_background: bool = self.cfg.background_regularization and "background" not in disable
        self.step = 0
        self.state = [self._initial_state(i) for i in range(len(self.shapes))]

    # -------------------------------------------------------------- layout

    def _row_axis(self, i: int) -> int:
        return row_axis(len(self.shapes[i]), self.layout, self.embedding[i])

    def _row_mean(self, i: int, x: Array) -> Array:
        """One value per row, kept dims: e.g. (out, 1, 1, 1)."""
        columns = tuple(axis for axis in range(x.ndim) if axis != self._row_axis(i))
        return x.mean(axis=columns, keepdims=True)

    def _column_mean(self, i: int, x: Array) -> Array:
        """The mean over the row axis, kept dims."""
        return x.mean(axis=self._row_axis(i), keepdims=True)

    def _row_shape(self, i: int) -> tuple[int, ...]:
        return tuple(n if axis == self._row_axis(i) else 1 for axis, n in enumerate(self.shapes[i]))

    def _column_shape(self, i: int) -> tuple[int, ...]:
        return tuple(1 if axis == self._row_axis(i) else n for axis, n in enumerate(self.shapes[i]))

    # -------------------------------------------------------------- state

    def _initial_state(self, i: int) -> dict[str, Any]:
        shape = self.shapes[i]
        has_rows = len(shape) >= 2
        pair: Any = has_rows and (np.zeros(self._row_shape(i)), np.zeros(self._column_shape(i)))
        rows, columns = (pair[0].size, pair[1].size) if has_rows else (0, 0)
        narrow = has_rows and min(rows, columns) <= NARROW
        # Of a narrow array only the statistic along the shorter side is kept of the residuals.
        pair_res = ((None, pair[1]) if rows > columns else (pair[0], None)) if narrow else pair
        factored_sq = has_rows and self.cfg.factored in ("second_moment", "all")
        factored_res = factored_sq and (narrow or self.cfg.factored == "all")
        warming = self.cfg.warmup_steps > 0
        return {
            "age": 0,
            "skipped_steps": 0,
            "exp_avg": np.zeros(shape),
            "exp_avg_sq": pair if factored_sq else np.zeros(shape),
            "exp_avg_res": pair_res if factored_res else np.zeros(shape),
            "s": np.zeros(shape) if self.use_torque and self.cfg.torque_decay > 0 and warming else None,
            "walk": np.zeros_like(self._walked(i, np.zeros(shape))) if self.use_search and warming else None,
            "lr_mask": np.zeros(self._row_shape(i)) if self.use_mask and has_rows else None,
            "spatial_variance": np.zeros(self._row_shape(i)) if self.use_spatial and columns > NARROW else None,
            "torque_mean": 1.0,
            "background_scale": 0.0 if self.use_background and not factored_sq else None,
            **self.stages.initial_state(i, shape),
        }

    def step_(self, grads: Sequence[Any], params: Sequence[Any]) -> list[Array]:
        """Advance by one call; the updates are to be ADDED to the parameters."""
        updates = [np.zeros(shape) for shape in self.shapes]
        no_gradient = any(u.size for u in updates) and all(g is None or np.size(g) == 0 for g in grads)
        if self.of_torch and self.step == 0 and no_gradient:
            return updates
        self.step = t = min(self.step + 1, 2**31 - 1)
        base_lr = float(self.cfg.lr(t - 1)) if callable(self.cfg.lr) else float(self.cfg.lr)
        base_lr = base_lr if 0 <= base_lr < np.inf else 0.0
        self._start(base_lr)
        self._drop_warmup_states()
        taking_part: dict[int, Array] = {}
        skipped = [False] * len(self.shapes)
        self.absent = {i for i, grad in enumerate(grads) if grad is None or np.size(grad) == 0}
        for i, grad in enumerate(grads):
            # An empty array takes no part: it does not age, and of its state only the walk may change.
            if i in self.absent:
                continue
            g = np.asarray(grad).astype(np.float64)
            assert g.shape == self.shapes[i]
            if not np.all(np.isfinite(g)) or np.any(np.abs(g) > LARGEST_GRADIENT):
                if "nonfinite" not in self.disable:
                    skipped[i] = True
                    self.state[i]["skipped_steps"] += 1  # it does not age, the global t has grown
                    continue
                g = np.zeros_like(g)
            taking_part[i] = g
        taking_part = self.stages(taking_part, skipped, self.state, params)
        for i, g in taking_part.items():
            # Rates use log_rate_scale and lr_mask of before this step; what is found below enters the next one.
            updates[i] = self._update(i, g, np.asarray(params[i]).astype(np.float64), base_lr)
        if t <= self.cfg.warmup_steps:
            self._vote(taking_part)
            self._search(taking_part, base_lr)
        return updates

    def _drop_warmup_states(self) -> None:
        """At the first t > warmup_steps, for every array, whether or not it takes part."""
        if self.step > self.cfg.warmup_steps:
            for state in self.state:
                state["s"] = state["walk"] = None

    def _beta_power(self, beta: float, exponent: int) -> float:
        """beta ** exponent (0 ** 0 is 1); 0, its limit, without bias correction."""
        return 0.0 if "bias_correction" in self.disable else float(beta) ** exponent

    def _update(self, i: int, g: Array, w: Array, base_lr: float) -> Array:
        state = self.state[i]
        beta1 = self.cfg.betas[0]
        # Bias corrections and every "1 at t = 1" mean the array's own first step, hence its age.
        state["age"] = age = state["age"] + 1

        v_hat, decay_factor, growth = self._second_moment(i, g)
        u = g / np.sqrt(v_hat) / growth
        if "update_clip" not in self.disable:
            u = np.clip(u, -self.cfg.update_clip, self.cfg.update_clip)

        self.signs[i] = np.sign(state["exp_avg"])
        state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * u
        m_hat = state["exp_avg"] / (1 - self._beta_power(beta1, age))

        e = (u - m_hat) ** 2
        if age == 1 and "bias_correction" not in self.disable:
            e = np.zeros_like(e)  # m-hat is u itself at an array's first step; what is left is rounding
        r_hat = self._residual(i, e)
        d = m_hat if "confidence" in self.disable else m_hat / np.sqrt(r_hat + self.cfg.confidence_floor)
        if self.use_torque:
            d = self._apply_torque(state, d, u)
        kappa = self._spatial_factor(i, d)
        array_rate, row_rate = self._rates(state, base_lr, kappa)
        if state["walk"] is not None:
            state["walk"] = self._kept() * state["walk"] + self._walked(i, row_rate * d)
        update = -(row_rate * d)
        if self.decay_mask[i] and "weight_decay" not in self.disable:
            update -= array_rate * self.cfg.weight_decay * decay_factor * w
        return np.asarray(update)

    def _second_moment(self, i: int, g: Array) -> tuple[Array, Array | float, float]:
        """v-hat, the background factor b of the weight decay, and by how much this gradient exceeds those so far."""
        state = self.state[i]
        beta2 = self.cfg.betas[1]
        q = g**2 + EPS
        correction = 1 - self._beta_power(beta2, state["age"])
        if isinstance(state["exp_avg_sq"], tuple):
            row, column = state["exp_avg_sq"]
            row = beta2 * row + (1 - beta2) * self._row_mean(i, q)
            column = beta2 * column + (1 - beta2) * self._column_mean(i, q)
            state["exp_avg_sq"] = (row, column)
            v = row / row.mean() * column
            root_mean = np.sqrt(row).mean() * np.sqrt(column).mean() / np.sqrt(row.mean())
            # Neither v nor its mean is bias-corrected here (it cancels), so the floor does not apply.
            b = self._background(np.sqrt(v), root_mean)
            return np.maximum(v / correction, EPS), b, self._growth(q, row.mean() / correction)
        state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * q
        v_hat = np.maximum(state["exp_avg_sq"] / correction, EPS)
        b = 1.0 if state["age"] == 1 else self._background(np.sqrt(v_hat), state["background_scale"])
        if self.use_background:
            state["background_scale"] = float(np.sqrt(v_hat).mean())  # for the next step, decay or not
        return v_hat, b, self._growth(q, state["exp_avg_sq"].mean() / correction)

    def _growth(self, q: Array, usual: float) -> float:
        return 1.0 if "growth" in self.disable else max(1.0, float(np.sqrt(q.mean() / usual)))

    def _background(self, root: Array, root_mean: float) -> Array | float:
        if not self.use_background:
            return 1.0
        with np.errstate(over="ignore"):  # exp overflows to inf, and b is rightly 0
            return 2 / (1 + np.exp(4 * (root / root_mean - 1)))

    def _residual(self, i: int, e: Array) -> Array:
        """r-hat. Elementwise it uses the r of this step, factored the EMAs of the step before."""
        state = self.state[i]
        beta3, age = self.cfg.betas[2], state["age"]
        if isinstance(state["exp_avg_res"], tuple):
            row, column = state["exp_avg_res"]
            r = row if column is None else column if row is None else row / max(row.mean(), EPS) * column
            state["exp_avg_res"] = (
                None if row is None else beta3 * row + (1 - beta3) * self._row_mean(i, e),
                None if column is None else beta3 * column + (1 - beta3) * self._column_mean(i, e),
            )
            return (r + 1 - beta3) / (2 - beta3 - self._beta_power(beta3, age - 1))
        r = state["exp_avg_res"] = beta3 * state["exp_avg_res"] + (1 - beta3) * e
        return (r + 1 - beta3) / (2 - beta3 - self._beta_power(beta3, age))

    def _apply_torque(self, state: dict[str, Any], d: Array, u: Array) -> Array:
        x = d * u
        s = x / (np.abs(x) + 0.01)
        if state["s"] is not None:  # only while t <= warmup_steps and torque_decay > 0
            s = state["s"] = self.cfg.torque_decay * state["s"] + (1 - self.cfg.torque_decay) * s
        tau = (1 + s) / 2
        last_mean = 1.0 if "torque_mean" in self.disable else max(state["torque_mean"], 0.05)
        state["torque_mean"] = float(tau.mean())  # stored as it is, floored when used
        return d * tau / last_mean

    def _spatial_factor(self, i: int, d: Array) -> Array | float:
        """kappa of the variances of the step before; then this step's variance of d joins the EMA."""
        state = self.state[i]
        last = state["spatial_variance"]
        if last is None:
            return 1.0
        variance = self._row_mean(i, (d - self._row_mean(i, d)) ** 2)
        state["spatial_variance"] = 0.99 * last + 0.01 * variance
        if state["age"] == 1 or last.mean() <= 1e-12:  # which is rounding
            return 1.0
        return np.clip(np.sqrt(last.mean() / np.maximum(last, EPS)), 0.5, 2.0)
