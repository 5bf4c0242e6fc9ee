"""One array of more than 2²⁴ elements, where an index no longer fits into a float32."""

from __future__ import annotations

import time
from typing import Any

import ml_dtypes
import numpy as np

from automagic_core import Slot
from tests.oracle.cameamp import CameampOracle
from tests.oracle.codec import random_unit

SIZE = 2**24 + 77
_LAST = 5_000
FIELDS: dict[str, Any] = {"lr": 1e-3, "max_lr": 1e-2, "warmup_steps": 0, "force_8bit": True, "weight_decay": 0.0}


def run(framework: str, size: int = SIZE) -> dict[str, Any]:
    """The record of one step on (size,) bfloat16 weights of 1 with 8-bit states; gradients are all 1.

    Then every element gets the same update, and only its random number decides whether it moves by one unit.
    """
    begin = time.perf_counter()
    after, states_of_8_bits = (_torch if framework == "torch" else _jax)(size)
    failures = []
    moved = after < 1.0
    if not np.isin(after, [np.float32(1.0), np.float32(1.0 - 2.0**-8)]).all():
        failures.append("an element is neither where it was nor one unit below")
    # The update of one such element is that of all.
    config = {name: value for name, value in FIELDS.items() if name != "force_8bit"}
    update = -CameampOracle([(1,)], **config).step_([np.ones(1)], [np.ones(1)])[0].item()
    # Just below 1 the spacing is 2⁻⁸; the page takes the neighbour farther from zero with probability 1 − update · 2⁸.
    index = np.r_[0:_LAST, size - _LAST : size]
    r = random_unit(1, int(Slot.parameters), size, index)
    stay = 1 - update * 2.0**8
    # Float32 roundings of the update move the threshold by less than 10⁻⁴.
    sure = np.abs(r - stay) > 1e-4
    wrong = (moved[index] == (r < stay)) & sure
    if wrong.any():
        failures.append(f"{int(wrong.sum())} of {len(index)} elements at both ends were not rounded by the page's bits")
    share = float(moved.mean())
    # 2²⁴ draws: five standard deviations are 6 · 10⁻⁴.
    if abs(share - (1 - stay)) > 1e-3:
        failures.append(f"{share:.4%} of the elements moved instead of {1 - stay:.4%}")
    if not states_of_8_bits:
        failures.append("the states have 32 bits")
    return {"size": size, "seconds": time.perf_counter() - begin, "compared": len(index), "failures": failures}


def _torch(size: int) -> tuple[np.ndarray, bool]:
    import torch

    from automagic_torch import AutomagicCameAMP8bit

    p = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
    optimizer = AutomagicCameAMP8bit([p], **FIELDS)
    p.grad = torch.ones_like(p)
    optimizer.step()
    return p.detach().float().numpy(), "exp_avg_absmax" in optimizer.state[p]


def _jax(size: int) -> tuple[np.ndarray, bool]:
    import jax
    import jax.numpy as jnp
    import optax

    from automagic_optax import automagic_8bit, memory_report

    fields = {name: value for name, value in FIELDS.items() if name != "lr"}
    tx = automagic_8bit(FIELDS["lr"], **fields)
    w = jnp.ones(size, ml_dtypes.bfloat16)
    update, state = jax.jit(tx.update)(w, tx.init(w), w)
    return np.asarray(optax.apply_updates(w, update), np.float32), memory_report(state)["8bit_parameters"] == size
