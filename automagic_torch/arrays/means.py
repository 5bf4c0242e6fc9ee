"""Means over rows, columns and all of each array, for stacked arrays (docs/algorithm.md, section 1.2).

Statistics keep their reduced axes with length 1, so that they broadcast against the arrays.
"""

from __future__ import annotations

from torch import Tensor

from automagic_core import StatePlan
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

    def of_rows(self, *statistics: Tensor) -> list[Tensor]:
        """Mean of row statistics over each array."""
        return [_over_all(R) for R in statistics]

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


def _over_all(x: Tensor) -> Tensor:
    return x.mean(dim=tuple(range(1, x.ndim)), keepdim=True) if x.ndim > 1 else x.clone()
