"""What the demo prints: the classifier's counts, the runs side by side, the optimizer's memory."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.digits_diffusion.data import NEW_CLASSES
from examples.digits_diffusion.judge import Verdict
from examples.digits_diffusion.settings import Settings
from examples.digits_diffusion.training import Run

# Wide enough that no table is folded where the output is a file.
console = Console() if Console().is_terminal else Console(width=110)


def show_counts(before: Verdict, after: Verdict, accuracy: float) -> None:
    table = Table(title=f"What a classifier of real digits ({accuracy:.1%} right) calls the samples")
    table.add_column("samples")
    for digit in range(10):
        table.add_column(str(digit), justify="right", style="bold" if digit in NEW_CLASSES else "")
    table.add_column("5 to 9", justify="right")
    for name, verdict in (("before the fine-tuning", before), ("after it", after)):
        table.add_row(name, *map(str, verdict.counts), f"{verdict.new_share:.1%}")
    console.print(table)


def show_runs(ours: Run, adamw: Sequence[Run], starting_rate: float) -> None:
    best = min(adamw, key=lambda run: run.final_loss)
    table = Table(title="Fine-tuning the adapters: one run of ours, a grid of rates for AdamW")
    for name in ("optimizer", "highest learning rate", "training loss", "held-out loss", "ms a step"):
        table.add_column(name, justify="left" if name == "optimizer" else "right")
    for run in (ours, *adamw):
        tail = run.losses[-50:]
        table.add_row(
            run.name + (" (best of the grid)" if run is best else ""),
            f"found {max(run.rates):.2g}, from {starting_rate:g}" if run is ours else f"given {max(run.rates):g}",
            f"{sum(tail) / len(tail):.4f}",
            f"{run.final_loss:.4f}",
            f"{run.step_seconds * 1e3:.0f}",
            style="bold" if run in (ours, best) else "",
        )
    console.print(table)
    console.print("Same start, same batches, one seed.")


def show_memory(warming_up: dict[str, Any], afterwards: dict[str, Any]) -> None:
    table = Table(title="Optimizer state")
    for name in ("", "bytes", "bytes a parameter", "of Adam's"):
        table.add_column(name, justify="left" if not name else "right")
    adam = afterwards["adam_state_bytes"]
    parameters = afterwards["total_parameters"]
    table.add_row("Adam, 32-bit", f"{adam:,}", f"{adam / parameters:.2f}", "100%")
    for name, report in (("ours, while warming up", warming_up), ("ours, afterwards", afterwards)):
        size = report["state_bytes"]
        table.add_row(name, f"{size:,}", f"{report['state_bytes_per_parameter']:.2f}", f"{size / adam:.0%}")
    console.print(table)
    console.print(
        f"{parameters:,} adapter parameters: {afterwards['8bit_parameters']:,} with 8-bit states, "
        f"{afterwards['32bit_parameters']:,} in arrays too small for them."
    )


def seen(
    ours: Run, adamw: Sequence[Run], settings: Settings, memory: dict[str, Any], before: Verdict, after: Verdict
) -> tuple[str, str, str]:
    """Three sentences that say what the demo has shown, good or bad."""
    best = min(adamw, key=lambda run: run.final_loss)
    apart = ours.final_loss / best.final_loss - 1
    return (
        f"From a rate of {settings.starting_rate:g} the search went up to {max(ours.rates):.2g}, and the loss on "
        f"held-out digits ended at {ours.final_loss:.4f}: {abs(apart):.1%} {'above' if apart > 0 else 'below'} the "
        f"{best.final_loss:.4f} of AdamW at {max(best.rates):g}, the best of its {len(adamw)} rates.",
        f"After its warm-up the optimizer held {memory['state_bytes']:,} bytes, "
        f"{memory['state_bytes'] / memory['adam_state_bytes']:.0%} of what Adam's states would take.",
        f"Of {after.counts.sum()} samples a classifier called {before.new_share:.1%} one of the new digits before the "
        f"fine-tuning and {after.new_share:.1%} after it.",
    )
