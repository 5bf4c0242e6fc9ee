"""What `verbose=True` says, and how it reaches a person who has not set up logging."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from automagic_core.config.config import Config

EVERY = 100
"""Steps between two lines of progress."""


def tell(logger_name: str, message: str) -> None:
    """Logs at INFO so that it is seen.

    Python drops INFO unless logging is set up.  A logger whose level is unset gets INFO, its own only: the root logger
    stays as it is.  Where no handler would take the message it goes to standard error, as warnings do; no handler is
    installed, so logging that is set up later takes over.  A level set on the logger is obeyed.

    Args:
        logger_name: ``"automagic_torch"`` or ``"automagic_optax"``.
        message: one line.
    """
    logger = logging.getLogger(logger_name)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if logger.hasHandlers():
        logger.info(message)
    elif logger.isEnabledFor(logging.INFO):
        fallback = logging.StreamHandler()
        fallback.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        fallback.handle(logger.makeRecord(logger_name, logging.INFO, __file__, 0, message, (), None))


def start_message(config: Config, report: Mapping[str, Any], lora: int, embeddings: int, device: str) -> str:
    """What is said once, when a run starts.

    Args:
        config: its hyperparameters.
        report: `automagic_core.memory_report` of the states held.
        lora, embeddings: how many arrays count as adapters and as embeddings.
        device: where the arrays are.
    """
    percent = 100 * report["state_bytes"] / max(report["adam_state_bytes"], 1)
    return (
        f"profile {config.profile or 'none'}, factored {config.factored!r}, on {device}; "
        f"{report['total_parameters']:,} parameters, {report['8bit_parameters']:,} of them with 8-bit states; "
        f"states hold {report['state_bytes'] / 1e6:.2f} MB, {percent:.0f} % of Adam's; "
        f"found {lora} LoRA and {embeddings} embedding arrays"
    )


def progress_message(step: int, rate: float | None, factor: float, skipped: int) -> str:
    """What is said every `EVERY` steps.

    Args:
        step: t.
        rate: η̂, the rate of the arrays, or None where it is not known.
        factor: exp ℓ, what the search made of the given rate.
        skipped: steps of single arrays skipped so far.
    """
    told = "" if rate is None else f"rate {rate:.3g}, "
    return f"step {step:,}: {told}{factor:.3g} times the given one; {skipped:,} steps of single arrays skipped"
