"""A model that a small device holds only with gradient release: ``python -m examples.gradient_release``

The device is simulated: torch's live storages are counted as they come and go, and a line is drawn at its size.
"""

import weakref
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from automagic_torch import AutomagicCameAMP8bit, release_gradients

DEVICE = 160e6  # bytes
LAYERS, WIDTH, BATCH, CONTEXT, VOCABULARY, STEPS = 10, 384, 2, 32, 256, 3
PICTURE = Path("out/examples/gradient_release.png")


class Model(nn.Module):
    """A small transformer; predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(WIDTH, 6, 4 * WIDTH, dropout=0.0, batch_first=True) for _ in range(LAYERS))
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(tokens)))


class LiveStorage(TorchDispatchMode):
    """Counts the bytes of all storages that torch makes inside, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.curve: list[int] = []
        self._seen: set[int] = set()

    def _gone(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.now -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage())._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.curve.append(self.now)
        return out


def measured(name: str) -> tuple[int, list[int], float]:
    """Peak bytes, bytes after every operation of the last step, and the loss of the last step."""
    torch.manual_seed(0)
    with LiveStorage() as live:
        model = Model()
        optimizer: torch.optim.Optimizer
        if name == "AdamW":
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        else:
            fields: dict[str, Any] = {"lr": 1e-4, "search_gain": 0, "warmup_steps": 0, "force_8bit": True}
            optimizer = ours = AutomagicCameAMP8bit(model.named_parameters(), profile="memory_optimized", **fields)
            if "release" in name:
                release_gradients(ours)
        tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT))
        for _ in range(STEPS):
            live.curve = []
            scores = model(tokens)[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(scores, tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return live.most, live.curve, loss.item()


def main() -> None:
    """Measures, prints and draws."""
    print(f"Takes {STEPS} steps of a transformer of {LAYERS} layers, in three ways: less than a minute.", flush=True)
    found = {name: measured(name) for name in ("AdamW", "ours", "ours, gradients released")}

    figure, (bars, curves) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(2, 3), layout="constrained")
    for (name, (most, curve, _)), colour in zip(found.items(), ("#9aa5b1", "#2b5fa5", "#c8452d"), strict=True):
        bars.bar_label(bars.bar(name, most / 1e6, color=colour), fmt="%.0f")
        curves.plot([i / len(curve) for i in range(len(curve))], [x / 1e6 for x in curve], color=colour, label=name)
    for axes in (bars, curves):
        axes.axhline(DEVICE / 1e6, color="black", linestyle=":", label=f"a device of {DEVICE / 1e6:.0f} MB")
    bars.set(title="Most memory at once, MB", xticks=[])
    bars.margins(y=0.12)
    curves.set(
        title="Memory in the course of the last step, MB", xlabel="part of the step's operations", ylim=(0, None)
    )
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=85)
    fits = ", ".join(
        f"{name}: {most / 1e6:.0f} MB, {'fits' if most <= DEVICE else 'does not fit'}"
        for name, (most, _, _) in found.items()
    )
    (_, _, plain), (_, _, released) = list(found.values())[1:]
    print(
        f"Seen: on a device of {DEVICE / 1e6:.0f} MB ({fits}). The loss of the last step is {plain:.4f} without and "
        f"{released:.4f} with the release. Picture: {PICTURE}"
    )


if __name__ == "__main__":
    main()
