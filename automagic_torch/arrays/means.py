"""Means over the rows, the columns and the whole of stacked arrays (section 1).

Statistics keep the axes that they are reduced over with length 1, so that they broadcast against the arrays.
"""

from __future__ import annotations

from torch import Tensor

from automagic_core import StatePlan
from automagic_torch.arrays.stacked import square_norm


class Means:
    """Of arrays of which every element is in this process.

    Methods that take several tensors treat each alike; where arrays are spread over processes
    (`automagic_torch.sharding`) that costs one exchange instead of several.
    """

    def __init__(self, plan: StatePlan) -> None:
        self.plan = plan
        self._columns = tuple(axis + 1 for axis in plan.column_axes)

    def rows(self, x: Tensor) -> Tensor:
        """Mean over the columns: `StatePlan.row_shape` for every array."""
        return x.mean(dim=self._columns, keepdim=True)

    def columns(self, x: Tensor) -> Tensor:
        """Mean over the row axis: `StatePlan.column_shape` for every array."""
        return x.mean(dim=self._row_axis, keepdim=True)

    def arrays(self, x: Tensor) -> Tensor:
        """Mean over each array, (arrays, 1, …, 1); a new tensor."""
        return _over_all(x)

    def of_rows(self, *statistics: Tensor) -> list[Tensor]:
        """Mean over each array of row statistics."""
        return [_over_all(R) for R in statistics]

    def of_columns(self, C: Tensor) -> Tensor:
        """Mean over each array of a column statistic."""
        return _over_all(C)

    def row_variances(self, x: Tensor) -> Tensor:
        """Population variance over the columns."""
        # torch's own takes ten times as long on a CPU.
        return self.rows((x - self.rows(x)).square_())

    def row_sums(self, *xs: Tensor) -> list[Tensor]:
        """Sums over the columns."""
        return [x.sum(dim=self._columns, keepdim=True) for x in xs]

    def sums(self, *xs: Tensor, of_rows: bool) -> list[Tensor]:
        """Sums over each array, (arrays,): of row statistics, or of elements."""
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
