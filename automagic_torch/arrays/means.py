"""Means over rows, columns and all of each array, for stacked arrays (docs/algorithm.md, section 1.2).

Statistics keep their reduced axes with length 1, so that they broadcast against the arrays.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from automagic_core import Decay, StatePlan
from automagic_torch.arrays.averages import ema
from automagic_torch.arrays.stacked import square_norm


class Means:
    """Forms means of arrays that are whole in this process.

    Methods that take several tensors treat each alike.  In `ShardedMeans` they then need a single exchange.
    """

    def __init__(self, plan: StatePlan) -> None:
        self.plan = plan
        self._columns = tuple(axis + 1 for axis in plan.column_axes)

    def rows(self, x: Tensor) -> Tensor:
        """Mean of every row: `StatePlan.row_shape` for each array."""
        return x.mean(dim=self._columns, keepdim=True)

    def columns(self, x: Tensor) -> Tensor:
        """Mean of every column: `StatePlan.column_shape` for each array."""
        return x.mean(dim=self._row_axis, keepdim=True)

    def arrays(self, x: Tensor) -> Tensor:
        """Mean of each array, (arrays, 1, …, 1); a new tensor."""
        return _over_all(x)

    def of_elements(self, **elements: Tensor) -> list[Tensor]:
        """Mean over each array of what has one value per element, named after its state."""
        return [self.arrays(x) for x in elements.values()]

    def squares(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Means of every row and of every column of squared gradients."""
        return self.rows(q), self.columns(q)

    def averaged(self, name: str, decay: Decay, old: Tensor, value: Tensor) -> Tensor:
        """The moving average of a statistic that only the next step uses."""
        return ema(decay, old, value)

    def of_rows(self, **statistics: Tensor) -> list[Tensor]:
        """Mean of row statistics over each array, which are named after their states."""
        return [_over_all(R) for R in statistics.values()]

    def of_columns(self, C: Tensor) -> Tensor:
        """Mean of a column statistic over each array."""
        return _over_all(C)

    def row_variances(self, x: Tensor) -> Tensor:
        """Population variance of every row."""
        # `torch.var` takes ten times as long on a CPU.
        return self.rows((x - self.rows(x)).square_())

    def row_sums(self, *xs: Tensor) -> list[Tensor]:
        """Sum of every row."""
        return [x.sum(dim=self._columns, keepdim=True) for x in xs]

    def sums(self, *xs: Tensor, of_rows: bool) -> list[Tensor]:
        """Sums over each array, (arrays,); `of_rows` says whether xs are row statistics."""
        return [x.view(len(x), -1).sum(1) for x in xs]

    def square_norm(self, g: Tensor) -> Tensor:
        """Σ g² over all arrays, 0-d."""
        return square_norm(g)

    @property
    def _row_axis(self) -> int:
        assert self.plan.row_axis is not None, "only arrays with rows are factored"
        return self.plan.row_axis + 1


class SlabMeans(Means):
    """Means of arrays of which a slab of rows is at hand.

    Means over rows are whole.  Means over columns and arrays are the slab's share of them: shares are to be added up.
    """

    def __init__(self, plan: StatePlan, share: float, known: Mapping[str, Tensor]) -> None:
        """Of a slab with a plan, which is a share in (0, 1) of an array, whose means are known."""
        super().__init__(plan)
        self._share = share
        self._known = known

    def columns(self, x: Tensor) -> Tensor:
        return super().columns(x) * self._share

    def arrays(self, x: Tensor) -> Tensor:
        return _over_all(x) * self._share

    def squares(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows(q), self._known["columns"]

    def of_elements(self, **elements: Tensor) -> list[Tensor]:
        return [self._known[name] for name in elements]

    def averaged(self, name: str, decay: Decay, old: Tensor, value: Tensor) -> Tensor:
        return value if name.endswith("_col") else ema(decay, old, value)

    def of_rows(self, **statistics: Tensor) -> list[Tensor]:
        return [self._known[name] for name in statistics]


def _over_all(x: Tensor) -> Tensor:
    if x.ndim > 2 and torch.compiler.is_compiling():
        # A compiled loop over rows can compute x and its sums at once; one over the array reads what is stored.
        x = x.mean(-1, keepdim=True)
    return x.mean(dim=tuple(range(1, x.ndim)), keepdim=True) if x.ndim > 1 else x.clone()
