"""The two optimizers side by side: the same parameters, gradients and hyperparameters in."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from automagic_core import Config
from automagic_optax import from_torch_state, round_to_parameters
from automagic_optax.arrays.batches import Batched
from automagic_optax.optimizer import up_to_rounding
from automagic_torch import AutomagicCameAMP8bit
from parity.rules import rounding_rule

Arrays = list[np.ndarray]

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchSide:
    """`AutomagicCameAMP8bit` over a list of arrays.

    Args:
        weights: float32 arrays; rounded to `dtype`.
        fields: hyperparameters, `lr` among them.
        device, dtype: of the parameters.
        layout: what their axes mean.
        lora: which are adapters; by default none.
    """

    def __init__(
        self,
        weights: Sequence[np.ndarray],
        fields: dict[str, Any],
        device: str,
        dtype: str,
        layout: Any = "torch",
        lora: list[bool] | None = None,
    ) -> None:
        self.dtype = TORCH_DTYPES[dtype]
        self.params = [torch.nn.Parameter(torch.tensor(w).to(device, self.dtype)) for w in weights]
        for p, is_lora in zip(self.params, lora or [False] * len(self.params), strict=True):
            p._is_lora_layer = is_lora  # type: ignore[attr-defined]
        self.optimizer = AutomagicCameAMP8bit(self.params, layout=layout, compiled=False, **fields)
        self.optimizer._on_update = self._keep
        self._updates: dict[int, np.ndarray] = {}

    def _keep(self, p: torch.Tensor, update: torch.Tensor) -> None:
        self._updates[id(p)] = update.detach().cpu().numpy()

    def step(self, gradients: Sequence[np.ndarray]) -> Arrays:
        """One step; returns the updates in float32, before any rounding to the parameters' dtype."""
        for p, g in zip(self.params, gradients, strict=True):
            p.grad = torch.tensor(g).to(p.device, p.dtype)
        self.optimizer.step()
        return [self._updates[id(p)] for p in self.params]

    def weights(self) -> Arrays:
        """The parameters in float32."""
        return [p.detach().float().cpu().numpy().copy() for p in self.params]

    def state_dict(self) -> dict[str, Any]:
        """A copy of the optimizer's state, on the CPU."""
        saved = copy.deepcopy(self.optimizer.state_dict())
        for state in saved["state"].values():
            for name, value in state.items():
                state[name] = value.cpu()
        for group in saved["param_groups"]:
            group |= {name: value.cpu() for name, value in group.items() if isinstance(value, torch.Tensor)}
        return saved


class JaxStep(NamedTuple):
    """What one step of the JAX side gives: float32 updates, the new states, the new parameters in float32."""

    updates: Arrays
    state: Any
    weights: Arrays


class JaxSide:
    """``automagic_8bit`` over a list of arrays, its updates seen before ``round_to_parameters``.

    Args:
        fields: hyperparameters, `lr` among them.
        device: whose rounding rule bitsandbytes uses on the other side.
        dtype: of the parameters.
        layout: what their axes mean.
        lora: which are adapters; by default none.
    """

    def __init__(
        self,
        fields: dict[str, Any],
        device: str,
        dtype: str,
        layout: Any = "torch",
        lora: list[bool] | None = None,
    ) -> None:
        self.config = config = Config(**fields)
        self.dtype = jnp.dtype(dtype)
        self.lora = _none if lora is None else lora
        rule = rounding_rule(device, config.block_wise)
        self.scale = optax.chain(*up_to_rounding(config, layout, lora=self.lora, embedding=_none, rule=rule))
        self.round = round_to_parameters(config.stochastic_rounding_params)
        self._step = jax.jit(self._one_step)

    def _one_step(self, gradients: Any, state: Any, params: Any) -> Any:
        updates, scale_state = self.scale.update(gradients, state[:-1], params)
        rounded, round_state = self.round.update(updates, state[-1], params)
        seen = updates.flat() if isinstance(updates, Batched) else updates
        return seen, (*scale_state, round_state), optax.apply_updates(params, rounded)

    def init(self, weights: Sequence[np.ndarray]) -> Any:
        """The first states."""
        params = self._params(weights)
        return (*self.scale.init(params), self.round.init(params))

    def step(self, gradients: Sequence[np.ndarray], state: Any, weights: Sequence[np.ndarray]) -> JaxStep:
        """One step from the given states and parameters."""
        updates, state, params = self._step(self._params(gradients), state, self._params(weights))
        return JaxStep([np.asarray(u) for u in updates], state, [np.asarray(p, np.float32) for p in params])

    def from_torch(self, state_dict: dict[str, Any], weights: Sequence[np.ndarray]) -> Any:
        """The other side's states, through the public conversion."""
        return from_torch_state(state_dict, self._params(weights), lora=self.lora, embedding=_none)

    def _params(self, arrays: Sequence[np.ndarray]) -> list[jax.Array]:
        return [jnp.asarray(a).astype(self.dtype) for a in arrays]


def _none(path: tuple[Any, ...], leaf: Any) -> bool:
    """No array is marked."""
    del path, leaf
    return False
