"""Means over arrays that are split along axis 0 (docs/algorithm.md, section 9.1)."""

from __future__ import annotations

import math

from torch import Tensor

from automagic_core import StatePlan
from automagic_torch.arrays.means import Means
from automagic_torch.arrays.stacked import square_norm
from automagic_torch.sharding.exchange import summed
from automagic_torch.sharding.split import Split


class ShardedMeans(Means):
    """Means of the whole arrays, from this process's pieces and one exchange each.

    Where axis 0 is the row axis, row statistics are split like the array, and column statistics are whole in every
    process.  Where axis 0 is a column axis, it is the other way round.
    """

    def __init__(self, plan: StatePlan, split: Split) -> None:
        super().__init__(plan)
        self.split = split
        self._rows_are_split = plan.row_axis == 0

    def rows(self, x: Tensor) -> Tensor:
        if self._rows_are_split:
            return super().rows(x)
        (total,) = self.row_sums(x)
        return total / self.plan.columns

    def columns(self, x: Tensor) -> Tensor:
        if not self._rows_are_split:
            return super().columns(x)
        (total,) = summed([x.sum(dim=self._row_axis, keepdim=True)], self.split)
        return total / self.plan.shape[0]

    def arrays(self, x: Tensor) -> Tensor:
        (total,) = summed([_sum(x)], self.split)
        return total / self.plan.size

    def of_rows(self, **statistics: Tensor) -> list[Tensor]:
        if not self._rows_are_split:
            return super().of_rows(**statistics)
        sums = summed([_sum(R) for R in statistics.values()], self.split)
        return [total / self.plan.shape[0] for total in sums]

    def of_columns(self, C: Tensor) -> Tensor:
        if self._rows_are_split:
            return super().of_columns(C)
        (total,) = summed([_sum(C)], self.split)
        return total / math.prod(self.plan.column_shape)

    def row_sums(self, *xs: Tensor) -> list[Tensor]:
        here = super().row_sums(*xs)
        return here if self._rows_are_split else summed(here, self.split)

    def sums(self, *xs: Tensor, of_rows: bool) -> list[Tensor]:
        here = [_sum(x).view(-1) for x in xs]
        return here if of_rows and not self._rows_are_split else summed(here, self.split)

    def square_norm(self, g: Tensor) -> Tensor:
        return summed([square_norm(g)], self.split)[0]


def _sum(x: Tensor) -> Tensor:
    """Sum over this process's piece of each array, (arrays, 1, …, 1)."""
    return x.sum(dim=tuple(range(1, x.ndim)), keepdim=True)
