"""`analyze_memory_usage`: a table of the memory that an optimizer state holds."""

from __future__ import annotations

from collections import Counter
from typing import Any

from automagic_core import Config
from automagic_core.watching.memory_table import HeldStates, memory_table
from automagic_optax.cameamp.find_states import find_states, opt_state_of
from automagic_optax.cameamp.memory_report import bytes_of, memory_report

OTHERS = "other transformations"


def analyze_memory_usage(optimizer: Any, show: bool = False, *, config: Config | None = None) -> str:
    """A table of what an optimizer state holds, compared with Adam's, with a verdict.

    The verdict warns below 30 % of parameters with 8-bit states, and praises above 80 %.  If no state has 8 bits, it
    says why; without `config` it names both possible reasons.

    Args:
        optimizer: an optimizer state that contains a `ScaleByCameampState`, however it is wrapped, or an
            ``nnx.Optimizer`` or a ``TrainState``.
        show: print the table too.
        config: the hyperparameters in use.

    Returns:
        The table as plain text.

    Raises:
        ValueError: the state holds none of this optimizer's states.
    """
    table = memory_table(held_states(opt_state_of(optimizer), config))
    if show:
        print(table)
    return table


def held_states(opt_state: Any, config: Config | None = None) -> HeldStates:
    """What an optimizer state holds, counted from its arrays."""
    report = memory_report(opt_state)
    by_name: Counter[str] = Counter()
    for state in find_states(opt_state):
        for name, tree in state._asdict().items():
            by_name[name] += bytes_of(tree)
    by_name[OTHERS] = report["state_bytes"] - sum(by_name.values())
    kept_in_32 = None
    if config is None:
        kept_in_32 = "optim_bits=32 asks for it, or every array is smaller than min_8bit_size"
    elif config.optim_bits == 32:
        kept_in_32 = "optim_bits=32 asks for it"
    return HeldStates(
        eight_bit=report["8bit_parameters"],
        thirty_two_bit=report["32bit_parameters"],
        without=0,
        bytes_by_name={name: size for name, size in by_name.items() if size},
        kept_in_32=kept_in_32,
    )
