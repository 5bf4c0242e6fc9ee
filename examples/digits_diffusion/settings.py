"""Every number of the demo that one may want to change."""

from pathlib import Path
from typing import NamedTuple


class Settings(NamedTuple):
    """Chosen so that everything, compilation included, takes minutes on two CPU cores."""

    output: Path = Path("out/demo")
    seed: int = 0

    width: int = 512
    depth: int = 3
    rank: int = 16  # 512 · 16 = 8,192 elements an adapter array, above the 1,024 from which states are 8-bit
    batch: int = 256

    base_steps: int = 800
    base_rate: float = 2e-3

    tuning_steps: int = 400
    warmup_steps: int = 40  # of AdamW
    search_steps: int = 160  # of this optimizer: 40 % of the run
    weight_decay: float = 5e-4
    starting_rate: float = 1e-6  # the default of `lr`, far too low: the search has to find the rate
    max_rate: float = 1.0  # far above any good rate, so that it is not the limit that stops the search
    adamw_rates: tuple[float, ...] = (4e-3, 8e-3, 1.6e-2)  # the best one between two worse

    held_out_share: float = 0.2
    held_out_noises: int = 4  # times that each held-out image is seen, each time with noise of its own
    held_out_every: int = 25

    samples: int = 400
    sampling_steps: int = 64

    least_after: float = 0.8  # share of the samples that the classifier must call 5 to 9 after the fine-tuning
    most_before: float = 0.2  # and may call so before it
