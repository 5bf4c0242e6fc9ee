"""A whole model in torch and in Flax, from the same weights on the same batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from automagic_optax import automagic_8bit
from automagic_torch import AutomagicCameAMP8bit
from parity.checks import Check
from parity.transformer import batches, flax_model, torch_model

SUITE = "Model"
SEEDS = (0, 1, 2)
LAST = 20
"""Steps that a final loss is the mean of."""
FIXED_RATE: dict[str, Any] = {"lr": 1e-3, "search_gain": 0.0, "warmup_steps": 20, "force_8bit": True}
FOUND_RATE: dict[str, Any] = {"lr": 1e-4, "max_lr": 1e-1, "warmup_steps": 150, "force_8bit": True}


def torch_losses(seed: int, steps: int, device: str, fields: dict[str, Any]) -> np.ndarray:
    """The loss before each step, float64 (steps,)."""
    model = torch_model(seed).to(device)
    optimizer = AutomagicCameAMP8bit(model.parameters(), compiled=False, **fields)
    losses = []
    for batch in batches(seed, steps):
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return np.array([float(loss) for loss in losses])


@nnx.jit
def _train_step(model: Any, optimizer: Any, batch: Any) -> Any:
    loss, grads = nnx.value_and_grad(lambda model: model.loss(batch))(model)
    optimizer.update(model, grads)
    return loss


def flax_losses(seeds: Iterable[int], steps: int, fields: dict[str, Any]) -> list[np.ndarray]:
    """The same in Flax, in Flax's layout, inside one jitted step: one array of losses for each seed."""
    others = {name: value for name, value in fields.items() if name != "lr"}
    # One transformation for all seeds, so that their steps compile once.
    tx = automagic_8bit(fields["lr"], layout="flax", embedding=_is_embedding, **others)
    curves = []
    for seed in seeds:
        model = flax_model(torch_model(seed))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        losses = [_train_step(model, optimizer, jnp.asarray(batch)) for batch in batches(seed, steps)]
        curves.append(np.array([float(loss) for loss in losses]))
    return curves


def suite(device: str, steps: int = 300) -> Iterable[Check]:
    """The checks of the report."""
    for bits, bound in ((32, 1e-4), (8, 1e-2)):
        fields = {**FIXED_RATE, "optim_bits": bits}
        theirs, ours = torch_losses(0, steps, device, fields), flax_losses([0], steps, fields)[0]
        kind = f"{bits}-bit states, {steps} steps"
        yield Check(SUITE, f"{kind}: largest distance of the loss curves", float(np.abs(ours - theirs).max()), bound)
        yield Check(SUITE, f"{kind}: fall of the loss", float(ours[0] - ours[-LAST:].mean()), 1.0, at_least=True)

    theirs_final = [float(torch_losses(seed, steps, device, FOUND_RATE)[-LAST:].mean()) for seed in SEEDS]
    ours_final = [float(curve[-LAST:].mean()) for curve in flax_losses(SEEDS, steps, FOUND_RATE)]
    spread = max(theirs_final) - min(theirs_final)
    apart = max(abs(a - b) for a, b in zip(ours_final, theirs_final, strict=True))
    finals = ", ".join(f"{a:.3f} / {b:.3f}" for a, b in zip(theirs_final, ours_final, strict=True))
    yield Check(
        SUITE, f"mask on, torch / JAX final losses {finals}: distance, within the spread of seeds", apart, spread
    )


def _is_embedding(path: tuple[Any, ...], leaf: Any) -> bool:
    del leaf
    return any("embedding" in str(part) for part in path)
