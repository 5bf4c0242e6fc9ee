"""The messages of `verbose=True`, and a log handler for those who set up none."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from automagic_core.config.config import Config

EVERY = 100
"""Steps between two lines of progress."""
HARDLY = 0.2
"""A highest agreement below this is told: what a search finds on noise says little."""


def tell(logger_name: str, message: str) -> None:
    """Logs a message at INFO and makes sure that it is seen, since Python drops INFO unless logging is set up.

    A logger without a level gets the level INFO; a level that was set is obeyed.  If there is no handler, the message
    goes to standard error.  No handler is installed, so logging can be set up later.

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
    """The message at the start of a run.

    Args:
        config: its hyperparameters.
        report: `automagic_core.memory_report` of its states.
        lora, embeddings: numbers of adapters and of embeddings.
        device: the device of the arrays.
    """
    percent = 100 * report["state_bytes"] / max(report["adam_state_bytes"], 1)
    return (
        f"profile {config.profile or 'none'}, factored {config.factored!r}, on {device}; "
        f"{report['total_parameters']:,} parameters, {report['8bit_parameters']:,} of them with 8-bit states; "
        f"states hold {report['state_bytes'] / 1e6:.2f} MB, {percent:.0f} % of Adam's; "
        f"found {lora} LoRA and {embeddings} embedding arrays"
    )


def progress_message(step: int, rate: float | None, factor: float, skipped: int) -> str:
    """The message after every `EVERY` steps.

    Args:
        step: t.
        rate: η̂, the rate of the arrays, or None where it is not known.
        factor: exp ℓ, by which the search multiplied the given rate.
        skipped: how many steps of single arrays were skipped so far.
    """
    told = "" if rate is None else f"rate {rate:.3g}, "
    return f"step {step:,}: {told}{factor:.3g} times the given one; {skipped:,} steps of single arrays skipped"


def search_message(step: int, rate: float | None, max_lr: float, peak_agreement: float | None) -> str:
    """The message at the end of the rate search.

    Args:
        step: t, the last of the warm-up.
        rate: η̂, or None where it is not known.
        max_lr: where the search must stop.
        peak_agreement: P, or None where agreement is not asked for.
    """
    told = f"step {step:,}: the search has ended" + ("" if rate is None else f" at the rate {rate:.3g}")
    if rate is not None and max_lr <= 1.001 * rate:
        return f"{told}, which is max_lr; with a higher max_lr it may go on"
    if peak_agreement is not None and peak_agreement >= 0:
        return f"{told} while it climbed; with more warmup_steps it may go on"
    if peak_agreement is not None and -peak_agreement < HARDLY:
        return f"{told}; gradients hardly agreed with the momentum ({-peak_agreement:.2g} at most), so it says little"
    return told
