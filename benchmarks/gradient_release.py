"""Peak memory of a training step with and without `release_gradients`: ``python -m benchmarks.gradient_release``

Transformers with 50 M parameters and more in float32 take three steps, each contestant in a process of its own; the
third is measured.  On a CPU the storages of all live tensors are counted as torch makes them; on CUDA the allocator
counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from automagic_torch import AutomagicCameAMP8bit, mark_embeddings, release_gradients
from benchmarks import results

LAYERS, WIDTH, BATCH, CONTEXT = 16, 512, 2, 64
VOCABULARIES = (256, 8192)
"""A small and a large embedding: the largest array decides how much temporary memory an update takes."""
STEPS = 3
CONTESTANTS = ("AdamW", "ours", "ours, released")


class Model(nn.Module):
    """A decoder of pre-norm blocks with a tied head."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return x @ self.embedding.weight.T


class LiveStorage(TorchDispatchMode):
    """Counts the bytes of all storages that torch makes, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.now -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return out


@contextmanager
def peak_memory(device: str) -> Iterator[Callable[[], tuple[int, int]]]:
    """Gives a function that returns the bytes in use now, and the most since its last call."""
    if device == "cuda":

        def read() -> tuple[int, int]:
            torch.cuda.synchronize()
            most = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated(), most

        yield read
    else:
        with LiveStorage() as live:

            def read() -> tuple[int, int]:
                most, live.most = live.most, live.now
                return live.now, most

            yield read


def measured(name: str, vocabulary: int, device: str) -> dict[str, Any]:
    """Bytes and seconds of one contestant."""
    with peak_memory(device) as read:
        torch.manual_seed(0)
        model = Model(vocabulary).to(device)
        mark_embeddings(model)
        named = list(model.named_parameters())
        optimizer: torch.optim.Optimizer
        if name == "AdamW":
            optimizer = torch.optim.AdamW(named, lr=1e-5)
        else:
            optimizer = ours = AutomagicCameAMP8bit(named, lr=1e-5, warmup_steps=100, force_8bit=True)
            if name == "ours, released":
                release_gradients(ours)
        parameter_bytes, _ = read()
        tokens = torch.randint(vocabulary, (BATCH, CONTEXT), device=device)
        seconds = []
        for _ in range(STEPS):
            held, _ = read()
            started = time.perf_counter()
            loss = F.cross_entropy(model(tokens).view(-1, vocabulary), tokens.view(-1).roll(-1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss
            _, most = read()
            seconds.append(time.perf_counter() - started)
    return {
        "name": name,
        "vocabulary": vocabulary,
        "parameters": sum(p.numel() for _, p in named),
        "largest_array": max(p.numel() for _, p in named),
        "parameter_bytes": parameter_bytes,
        "state_bytes": held - parameter_bytes,
        "peak_bytes": most,
        "peak_beside_both_bytes": most - held,
        "most_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "seconds": statistics.median(seconds[1:]),
    }


def main() -> None:
    """Runs every contestant, prints the table and writes gradient_release.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", nargs=2, metavar=("CONTESTANT", "VOCABULARY"), help="measure one in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.one[0], int(options.one[1]), options.device)))
        return
    command = [sys.executable, "-m", "benchmarks.gradient_release", "--device", options.device, "--one"]
    rows = []
    table = Table(title=f"One step, {options.device}, MB", title_justify="left")
    for column in ("", "parameters", "largest array", "states", "peak", "peak beside both", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for vocabulary in VOCABULARIES:
        for name in CONTESTANTS:
            done = subprocess.run([*command, name, str(vocabulary)], check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            sizes = (4 * row["largest_array"], row["state_bytes"], row["peak_bytes"], row["peak_beside_both_bytes"])
            megabytes = (f"{size / 1e6:,.0f}" for size in (row["parameter_bytes"], *sizes))
            table.add_row(f"{name}, {row['parameters'] / 1e6:.1f} M", *megabytes, f"{row['seconds']:.1f}")
    results.console().print(table)
    file = "gradient_release.json" if options.device == "cpu" else f"gradient_release_{options.device}.json"
    results.write(results.FOLDER / file, {"batch": [BATCH, CONTEXT], "contestants": rows})


if __name__ == "__main__":
    main()
