"""Numbers in tables, on a graph and over a plane, all made here."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.evidence.jobs.job import Base, Training
from benchmarks.outside.jobs.common import FromFunctions, OutsideJob, fixed, from_rows, seeded


class TableSettings(NamedTuple):
    """The sizes of the job."""

    rows: int = 4000
    known_rows: int = 3000
    columns: int = 24
    width: int = 128
    batch: int = 64
    steps: int = 300


@cache
def table(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Features (rows, columns) as they come, the largest 10,000 times the smallest, and a target of mean 0, spread 1.

    Half of the columns are normal, half log-normal; the target depends on seven of them and on noise.
    """
    generator = torch.Generator().manual_seed(5)
    half = columns // 2
    z = torch.randn(rows, columns, generator=generator)
    z[:, half:] = z[:, half:].exp()
    target = 2 * (2 * z[:, 0]).sin() + z[:, 1] * z[:, 2] + 2 * (z[:, 3] > 0) * z[:, 4]
    target += (z[:, half] + 0.1).log() * z[:, 5] + 0.3 * torch.randn(rows, generator=generator)
    scales = 10 ** torch.linspace(-2, 2, columns)[torch.randperm(columns, generator=generator)]
    return z * scales, (target - target.mean()) / target.std()


class Tabular(OutsideJob):
    """An MLP on features that nobody has scaled."""

    family = "tabular"
    heading = "MLP on a table of unscaled features"
    unit = "squared error"
    rate = 3e-3
    normalized = False
    defaults = TableSettings()

    def start(self, base: Base, seed: int) -> Training:
        del base
        sizes, generator = self.sizes, seeded(seed)
        features, target = table(sizes.rows, sizes.columns)
        model = self._model()

        def loss(rows: Tensor | slice) -> Tensor:
            return functional.mse_loss(model(features[rows])[:, 0], target[rows])

        return from_rows(model, generator, loss, sizes.known_rows, sizes.batch)

    def _model(self) -> nn.Module:
        columns, width = self.sizes.columns, self.sizes.width
        layers: list[nn.Module] = [self._norm(columns)]
        for inputs in (columns, width):
            layers += [nn.Linear(inputs, width), self._norm(width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(width, 1))

    def _norm(self, width: int) -> nn.Module:
        return nn.BatchNorm1d(width) if self.normalized else nn.Identity()


class TabularBatchNorm(Tabular):
    """The same, normalized in the model."""

    family = "tabular-batchnorm"
    heading = "The same table, MLP with batch norm"
    rate = 3e-2
    normalized = True


class GraphSettings(NamedTuple):
    """The sizes of the job."""

    nodes: int = 600
    known_nodes: int = 200
    kinds: int = 6
    features: int = 64
    width: int = 64
    dropout: float = 0.5
    steps: int = 200


class Graph(NamedTuple):
    """Nodes of several kinds; `neighbours` is the normalized adjacency (nodes, nodes)."""

    neighbours: Tensor
    features: Tensor
    kinds: Tensor


@cache
def graph(sizes: GraphSettings) -> Graph:
    """Nodes of one kind are linked four times as often; each node's features are its kind's and noise."""
    generator = torch.Generator().manual_seed(4)
    kinds = torch.randint(sizes.kinds, (sizes.nodes,), generator=generator)
    chance = torch.where(kinds[:, None] == kinds, 0.02, 0.005)
    links = (torch.rand(sizes.nodes, sizes.nodes, generator=generator) < chance).float().triu(1)
    links = links + links.T + torch.eye(sizes.nodes)
    scale = links.sum(1).rsqrt()
    typical = torch.randn(sizes.kinds, sizes.features, generator=generator)
    features = 0.4 * typical[kinds] + torch.randn(sizes.nodes, sizes.features, generator=generator)
    return Graph(scale[:, None] * links * scale, features, kinds)


class GraphNetwork(nn.Module):
    """Two graph convolutions with dropout before each."""

    def __init__(self, sizes: GraphSettings) -> None:
        super().__init__()
        self.dropout = nn.Dropout(sizes.dropout)
        self.inner = nn.Linear(sizes.features, sizes.width)
        self.outer = nn.Linear(sizes.width, sizes.kinds)

    def forward(self, neighbours: Tensor, features: Tensor) -> Tensor:
        hidden = functional.relu(neighbours @ self.inner(self.dropout(features)))
        return neighbours @ self.outer(self.dropout(hidden))


class NodeKinds(OutsideJob):
    """The kind of each node, learned from a third of them in one batch."""

    family = "graph"
    heading = "Graph network that tells the kinds of nodes, one full batch, dropout"
    unit = "nats per node"
    rate = 3e-3
    defaults = GraphSettings()

    def start(self, base: Base, seed: int) -> Training:
        del base
        sizes, generator = self.sizes, seeded(seed)
        whole, model = graph(sizes), GraphNetwork(sizes)

        def loss(nodes: slice) -> Tensor:
            return functional.cross_entropy(model(whole.neighbours, whole.features)[nodes], whole.kinds[nodes])

        known = sizes.known_nodes
        return FromFunctions(model, [], generator, lambda: loss(slice(known)), lambda: loss(slice(known, None)))


class CoordinatesSettings(NamedTuple):
    """The sizes of the job."""

    frequencies: int = 32
    frequency_spread: float = 4.0
    width: int = 128
    batch: int = 512
    steps: int = 300
    held_out_points: int = 3000


def picture(points: Tensor) -> Tensor:
    """Three colours (n, 3) at points (n, 2): waves, stripes with hard edges, and rings."""
    x, y = points.unbind(1)
    waves = (12 * x + 3 * (9 * y).sin()).sin()
    return torch.stack([waves, (7 * (x + y)).sin().sign(), (20 * (x**2 + y**2)).cos()], dim=1)


class Coordinates(OutsideJob):
    """An implicit neural representation: points through fixed random waves into an MLP."""

    family = "coordinates"
    heading = "MLP that learns one picture from its coordinates"
    unit = "squared error"
    rate = 1e-2
    defaults = CoordinatesSettings()

    def start(self, base: Base, seed: int) -> Training:
        del base
        sizes, generator = self.sizes, seeded(seed)
        width = sizes.width
        model = nn.Sequential(
            nn.Linear(2 * sizes.frequencies, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
        )
        waves = 2 * math.pi * sizes.frequency_spread * torch.randn(2, sizes.frequencies, generator=fixed())
        held_out = torch.rand(sizes.held_out_points, 2, generator=fixed())

        def loss(points: Tensor) -> Tensor:
            angles = points @ waves
            return functional.mse_loss(model(torch.cat([angles.sin(), angles.cos()], dim=1)), picture(points))

        return FromFunctions(
            model,
            [],
            generator,
            lambda: loss(torch.rand(sizes.batch, 2, generator=generator)),
            lambda: loss(held_out),
        )
