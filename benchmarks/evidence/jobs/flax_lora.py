"""The demo's model in Flax NNX the other way round: a diffusion model of 5 to 9 gets `nnx.LoRA` and learns 0 to 4."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.evidence.jobs.job import Base, Job


class Settings(NamedTuple):
    """The sizes of the job."""

    width: int = 192
    depth: int = 2
    rank: int = 8
    batch: int = 128
    steps: int = 400
    base_batch: int = 256
    base_steps: int = 600
    base_rate: float = 2e-3
    held_out_noises: int = 4


class FlaxDiffusion(Job):
    """LoRA on all linear layers of the demo's denoiser, in JAX."""

    family = "flax"
    heading = "Diffusion model of digits in Flax NNX"
    unit = "denoising loss"
    rate = 1e-2
    framework = "jax"

    def __init__(self, sizes: Settings = Settings(), variation: str = "") -> None:  # noqa: B008  # an immutable tuple
        super().__init__(sizes, variation)

    @property
    def description(self) -> str:
        sizes = self.sizes
        return (
            f"The denoiser of the demo, width {sizes.width}, trained on the digits 5 to 9, gets `nnx.LoRA` of rank "
            f"{sizes.rank} on every linear layer and learns 0 to 4, in JAX: {sizes.steps} steps of {sizes.batch}."
        )

    def build_base(self) -> Base:
        from benchmarks.evidence import flax_session

        return flax_session.build_base(self.sizes)

    def start(self, base: Base, seed: int) -> Any:
        from benchmarks.evidence import flax_session

        return flax_session.start(base, self.sizes, seed)
