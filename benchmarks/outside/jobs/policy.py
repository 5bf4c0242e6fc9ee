"""A policy gradient on a cart that balances a pole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.evidence.jobs.job import Base, Training
from benchmarks.outside.jobs.common import FromFunctions, OutsideJob, fixed, seeded

VALUE_SCALE = 10.0
"""The network gives values in tens, so that all its outputs are of one size."""


class Settings(NamedTuple):
    """The sizes of the job; `batch` is of episodes, `steps` of updates."""

    width: int = 64
    longest: int = 200
    discount: float = 0.98
    clip: float = 0.5
    batch: int = 16
    steps: int = 150
    held_out_episodes: int = 64


class Episodes(NamedTuple):
    """What happened, by time and cart; `running` tells which carts were still up."""

    states: Tensor
    actions: Tensor
    running: Tensor

    def returns(self, discount: float) -> Tensor:
        """The discounted steps that each cart still stood from each time on."""
        steps = self.running.float()
        found, ahead = torch.zeros_like(steps), torch.zeros(steps.shape[1])
        for time in range(len(steps) - 1, -1, -1):
            found[time] = ahead = steps[time] + discount * ahead
        return found


def after(states: Tensor, actions: Tensor) -> Tensor:
    """States (n, 4) a fiftieth of a second later: the cart-pole of Barto, Sutton and Anderson."""
    _, speed, angle, turn = states.unbind(1)
    force = 20.0 * actions - 10.0
    pushed = (force + 0.05 * turn**2 * angle.sin()) / 1.1
    turning = (9.8 * angle.sin() - angle.cos() * pushed) / (0.5 * (4 / 3 - 0.1 * angle.cos() ** 2 / 1.1))
    speeding = pushed - 0.05 * turning * angle.cos() / 1.1
    return states + 0.02 * torch.stack([speed, speeding, turn, turning], dim=1)


def fallen(states: Tensor) -> Tensor:
    """Which carts have left the track or lost the pole."""
    return (states[:, 0].abs() > 2.4) | (states[:, 2].abs() > 0.2095)


@torch.no_grad()
def play(model: nn.Module, carts: int, longest: int, generator: torch.Generator) -> Episodes:
    """Plays until every cart has fallen, or `longest` steps."""
    states = 0.1 * torch.rand(carts, 4, generator=generator) - 0.05
    running = torch.ones(carts, dtype=torch.bool)
    seen = []
    for _ in range(longest):
        chances = model(states)[:, :2].softmax(1)
        actions = (torch.rand(carts, generator=generator) < chances[:, 1]).long()
        seen.append((states, actions, running))
        states = after(states, actions)
        running = running & ~fallen(states)
        if not running.any():
            break
    return Episodes(*map(torch.stack, zip(*seen, strict=True)))


class CartPole(OutsideJob):
    """REINFORCE with a learned baseline; judged by how far the mean return is from the longest."""

    family = "policy"
    heading = "Policy gradient on cart-pole, gradients clipped; the loss is 201 − mean return"
    unit = "201 − mean return"
    rate = 1e-2
    defaults = Settings()

    def start(self, base: Base, seed: int) -> Training:
        del base
        sizes, generator = self.sizes, seeded(seed)
        width = sizes.width
        model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))

        def next_loss() -> Tensor:
            episodes = play(model, sizes.batch, sizes.longest, generator)
            running, returns = episodes.running, episodes.returns(sizes.discount)
            outputs = model(episodes.states)
            values = outputs[..., 2]
            advantages = (returns - VALUE_SCALE * values.detach())[running]
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
            log_chances = functional.log_softmax(outputs[..., :2], dim=-1)
            chosen = log_chances.gather(-1, episodes.actions[..., None])[..., 0][running]
            return -(chosen * advantages).mean() + 0.5 * ((values - returns / VALUE_SCALE)[running] ** 2).mean()

        def held_out_loss() -> Tensor:
            episodes = play(model, sizes.held_out_episodes, sizes.longest, fixed())
            # Never 0, so that losses can be divided by one another.
            return 1 + sizes.longest - episodes.running.float().sum(0).mean()

        return FromFunctions(model, [], generator, next_loss, held_out_loss, clip=sizes.clip)
