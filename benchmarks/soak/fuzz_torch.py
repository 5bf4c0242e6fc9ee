"""A random run in PyTorch, eager or compiled."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch

from automagic_core.arrays.state_forms import COMPANDED, moment_of
from automagic_core.codec.numpy_codec import decode
from automagic_torch import AutomagicCameAMP8bit
from benchmarks.soak.fuzz_cases import Case, as_float

DTYPES = ("float32", "bfloat16", "float16", "float64")
NEAR = 0.02
"""The most that ‖compiled − eager‖ may be: of a parameter by ‖eager − before‖, of a state by ‖eager‖.  On a CPU the
eager codec is bitsandbytes', which rounds by a grid, so codes of small values are one apart (section 3.8)."""


class TorchRunner:
    """The optimizer of a case."""

    flushes = False
    everywhere = False
    counts_from_first_gradient = True

    def __init__(self, case: Case) -> None:
        self.params = [torch.nn.Parameter(_tensor(w)) for w in case.weights()]
        for p, array in zip(self.params, case.arrays, strict=True):
            p._is_embedding, p._is_lora_layer = array.embedding, array.lora  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer = make(case.fields, self.params, case.layout)
        self.updates: dict[torch.Tensor, np.ndarray] = {}
        self.optimizer._on_update = self._keep

    def _keep(self, p: torch.Tensor, update: torch.Tensor) -> None:
        self.updates[p] = update.numpy().copy()

    def step(self, gradients: list[Any]) -> list[np.ndarray | None]:
        """As `Runner.step`."""
        self.updates.clear()
        for p, g in zip(self.params, gradients, strict=True):
            p.grad = None if g is None else _tensor(g)
        with warnings.catch_warnings():
            # Without force_8bit it says that states have 32 bits on a CPU.
            warnings.simplefilter("ignore")
            self.optimizer.step()
        return [self.updates.get(p) for p in self.params]

    def weights(self) -> list[np.ndarray]:
        """As `Runner.weights`."""
        return [_array(p.detach()) for p in self.params]

    def states(self, i: int) -> dict[str, np.ndarray]:
        """As `Runner.states`."""
        return {name: x.numpy().copy() for name, x in self.optimizer.state.get(self.params[i], {}).items()}


class CompiledRunner(TorchRunner):
    """Compiled steps, each beside an eager one from the same parameters and states."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.optimizer.compiled = True
        self.eager = TorchRunner(case)

    def step(self, gradients: list[Any]) -> list[np.ndarray | None]:
        """As `Runner.step`.

        Raises:
            AssertionError: the two steps differ.
        """
        eager, before = self.eager, self.weights()
        with torch.no_grad():
            for p, q in zip(eager.params, self.params, strict=True):
                p.copy_(q)
        eager.optimizer.load_state_dict(self._copied_state())
        expected = eager.step(gradients)
        updates = super().step(gradients)
        for i, (x, y) in enumerate(zip(eager.weights(), self.weights(), strict=True)):
            _assert_near(as_float(y), as_float(x), as_float(before[i]), f"array {i}: the compiled step")
            # What cancels: signed sums of the update, variances of constants, and votes.
            walked = 0.0 if (update := expected[i]) is None else float(np.linalg.norm(update))
            least = {"walk": NEAR * walked, "spatial_variance": 1e-9, "exp_avg_res": 1e-9, "lr_mask": 1e-6}
            states, others = (self._decoded(run.states(i)) for run in (eager, self))
            assert states.keys() == others.keys(), f"array {i}: the compiled step has other states"
            for name, value in states.items():
                what = f"array {i}: {name} of the compiled step"
                _assert_near(others[name], value, 0.0, what, least.get(moment_of(name), 0.0))
        return updates

    def _copied_state(self) -> dict[str, Any]:
        """What `state_dict` gives, which would give each state memory of its own: then no step had them stacked."""
        (group,) = self.optimizer.param_groups
        held = {i: self.optimizer.state[p] for i, p in enumerate(self.params) if p in self.optimizer.state}
        return copy.deepcopy({"state": held, "param_groups": [{**group, "params": list(range(len(self.params)))}]})

    def _decoded(self, states: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """States as numbers; of companded ones the square roots."""
        block_size = self.optimizer.config.block_size if self.optimizer.config.block_wise else None
        return {
            name: as_float(
                decode(value, states[f"{name}_absmax"], moment_of(name) not in COMPANDED, block_size)
                if f"{name}_absmax" in states
                else value
            )
            for name, value in states.items()
        }


def _assert_near(found: np.ndarray, expected: np.ndarray, origin: Any, what: str, least: float = 0.0) -> None:
    allowed = least + float(NEAR * np.linalg.norm(expected - origin) + 1e-6 * np.linalg.norm(expected))
    apart = float(np.linalg.norm(found - expected))
    assert apart <= allowed, f"{what} is {apart:.2g} from the eager one, more than {allowed:.2g}"


def make(fields: dict[str, Any], params: Any, layout: str = "torch") -> AutomagicCameAMP8bit:
    """The optimizer; raises what it raises."""
    return AutomagicCameAMP8bit(params, layout=layout, **fields)


def refuses(fields: dict[str, Any]) -> str:
    """The error's text, or an empty one where the fields are taken."""
    try:
        make(fields, [torch.nn.Parameter(torch.zeros(2))])
    except ValueError as error:
        return str(error)
    return ""


def _tensor(x: np.ndarray) -> torch.Tensor:
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(x.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(x))


def _array(p: torch.Tensor) -> np.ndarray:
    if p.dtype == torch.bfloat16:
        import ml_dtypes

        return p.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return p.numpy().copy()
