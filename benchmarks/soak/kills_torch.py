"""The run that is killed, in PyTorch: one file, replaced as a whole after every step."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from automagic_core.arrays.group_keys import group_key
from automagic_core.arrays.state_forms import SHARED_STATES
from automagic_torch import AutomagicCameAMP8bit
from benchmarks.soak.digest import digest

NAME = "checkpoint.pt"


class TorchTraining:
    """A layer with 8-bit states in float32 and one in bfloat16, trained on batches of a generator."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.generator = torch.Generator().manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(0.2 * torch.randn(p.shape, generator=self.generator))
        self.model[2].to(torch.bfloat16)
        self.optimizer = AutomagicCameAMP8bit(
            self.model.parameters(),
            lr=1e-4,
            max_lr=1e-2,
            warmup_steps=150,
            torque_decay=0.5,
            percentile_clipping=90,
            min_8bit_size=1024,
            force_8bit=True,
        )

    def step(self) -> None:
        """One batch."""
        x = torch.randn(8, 32, generator=self.generator)
        hidden = self.model[1](self.model[0](x))
        loss = (self.model[2](hidden.bfloat16()).float() - x.sin()).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def save(self, folder: Path, step: int) -> None:
        """The file gets its name when it is whole and on the disk."""
        folder.mkdir(exist_ok=True)
        whole = {
            "step": step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        part = folder / f"{NAME}.part"
        with part.open("wb") as file:
            torch.save(whole, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, folder / NAME)

    def restore(self, folder: Path) -> int:
        """From the file, if there is one; what a killed process left behind unfinished is never read."""
        path = folder / NAME
        if not path.exists():
            return 0
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.generator.set_state(saved["generator"])
        step: int = saved["step"]
        return step

    def digest(self) -> str:
        """Of parameters, states, shared states and the generator."""
        named = [(f"p{i}", _bits(p)) for i, p in enumerate(self.model.parameters())]
        for i, p in enumerate(self.model.parameters()):
            named += [(f"{i}.{name}", _bits(x)) for name, x in sorted(self.optimizer.state.get(p, {}).items())]
        group = self.optimizer.param_groups[0]
        named += [(name, group[group_key(name)].numpy()) for name in SHARED_STATES]
        return digest([*named, ("step", group["automagic_step"]), ("generator", self.generator.get_state().numpy())])

    def close(self) -> None:
        """Nothing is written behind the run's back."""


def _bits(x: torch.Tensor) -> object:
    x = x.detach()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
