"""A run that changes its framework, and its layout with it, halfway: beside a run that stays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from automagic_optax import automagic_8bit, from_torch_state, to_torch_state
from automagic_torch import AutomagicCameAMP8bit, mark_lora
from parity.checks import Check
from parity.convnet import NAMES, digit_batches, flax_loss, flax_parameters, torch_convnet, torch_weights

SUITE = "Carried runs"
FIELDS: dict[str, Any] = {
    "lr": 1e-3,
    "max_lr": 1e-2,
    "search_gain": 0.0,
    "warmup_steps": 20,
    "min_8bit_size": 512,
    "force_8bit": True,
}
"""Convolution and dense kernels are above `min_8bit_size`; the adapter, the first kernel and biases have 32 bits."""
LAST = 20
"""Steps that a final loss is the mean of."""

Batches = list[tuple[np.ndarray, np.ndarray]]


class TorchRun:
    """The classifier in torch, in torch's layout."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.model = torch_convnet(0)
        mark_lora(self.model)
        self.optimizer = AutomagicCameAMP8bit(self.model.named_parameters(), layout="torch", compiled=False, **fields)

    def train(self, batches: Batches) -> list[float]:
        """The loss before each step."""
        losses = []
        for images, labels in batches:
            loss = self.model.loss(images, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def to_flax(self, fields: dict[str, Any]) -> FlaxRun:
        """Goes on in Flax."""
        run = FlaxRun(fields, flax_parameters(self.model))
        run.state = from_torch_state(self.optimizer.state_dict(), run.params, names=NAMES.__getitem__, layout="flax")
        return run


class FlaxRun:
    """The classifier in JAX, in Flax's layout, one jitted step."""

    def __init__(self, fields: dict[str, Any], params: Any) -> None:
        self.fields, self.params = fields, params
        others = {name: value for name, value in fields.items() if name != "lr"}
        tx = automagic_8bit(fields["lr"], layout="flax", **others)
        self.state = tx.init(params)

        def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
            loss, gradients = jax.value_and_grad(flax_loss)(params, images, labels)
            updates, state = tx.update(gradients, state, params)
            return loss, optax.apply_updates(params, updates), state

        self._step = jax.jit(step)

    def train(self, batches: Batches) -> list[float]:
        """The loss before each step."""
        losses = []
        for images, labels in batches:
            loss, self.params, self.state = self._step(
                self.params, self.state, jnp.asarray(images), jnp.asarray(labels)
            )
            losses.append(float(loss))
        return losses

    def to_torch(self) -> TorchRun:
        """Goes on in torch."""
        run = TorchRun(self.fields)
        run.model.load_state_dict(torch_weights(self.params))
        like = run.optimizer.state_dict()
        state = to_torch_state(self.state, self.params, like, names=NAMES.__getitem__, layout="flax")
        run.optimizer.load_state_dict(state)
        return run


def curves(fields: dict[str, Any], half: int) -> dict[str, np.ndarray]:
    """Losses of 2 · half steps on the same batches in torch, in JAX, and in each after the other."""
    batches = digit_batches(1, 2 * half)
    first, second = batches[:half], batches[half:]
    in_torch, in_jax = TorchRun(fields), FlaxRun(fields, flax_parameters(torch_convnet(0)))
    torch_first, jax_first = in_torch.train(first), in_jax.train(first)
    carried_to_jax, carried_to_torch = in_torch.to_flax(fields), in_jax.to_torch()
    found = {
        "torch": torch_first + in_torch.train(second),
        "jax": jax_first + in_jax.train(second),
        "torch, then jax": torch_first + carried_to_jax.train(second),
        "jax, then torch": jax_first + carried_to_torch.train(second),
    }
    return {name: np.array(losses) for name, losses in found.items()}


def suite(device: str, half: int = 200) -> Iterable[Check]:
    """The checks of the report; the torch side runs on the CPU whatever the device."""
    del device
    for bits, bound in ((32, 1e-4), (8, 1e-2)):
        found = curves({**FIELDS, "optim_bits": bits}, half)
        for carried in ("torch, then jax", "jax, then torch"):
            for whole in ("torch", "jax"):
                apart = float(np.abs(found[carried] - found[whole]).max())
                name = f"{bits}-bit states, {half} + {half} steps, {carried}: largest distance of losses from {whole}"
                yield Check(SUITE, name, apart, bound)
        fall = float(found["torch"][0] - found["torch"][-LAST:].mean())
        yield Check(SUITE, f"{bits}-bit states: fall of the loss", fall, 1.5, at_least=True)
