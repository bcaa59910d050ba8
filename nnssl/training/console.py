"""What the console says: one block at the start and one line per epoch. nnU-Net's own lines, which say the
same at greater length, go into the log file alone."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def start_block(known: Mapping[str, Any]) -> str:
    """From the facts of `nnssl.training.record`."""
    cases, changed = known["cases"], []
    for name in known["changed"]:
        section, _, key = name.rpartition(".")
        changed.append(f"{name} {known['config'][section][key]}")
    counts = [f"{cases[kind]} {kind}" for kind in ("labeled", "unlabeled", "validation")]
    edges = " x ".join(map(str, known["patch_size"]))
    lines = [
        f"{known['dataset']}, {known['configuration']}, fold {known['fold']}, {known['trainer']}",
        f"cases: {', '.join(counts)}; structures: {', '.join(known['classes'])}",
        f"{known['network']}, patch {edges}, batch {known['batch_size']}, {known['num_epochs']} epochs",
        f"device: {known['device']}, {known['precision']}",
        *([f"memory: {known['predicted_memory']}"] if known.get("predicted_memory") else []),
        f"not the default: {', '.join(changed) or 'nothing'}",
    ]
    return "\n".join(f"  {line}" for line in ["", *lines, ""])


class FirstSteps:
    """Says once, as soon as it is known, what an epoch takes and how long the training will last.

    Args:
        steps: of an epoch; epochs: that are left. An epoch as short as `WATCHED` steps tells it by itself.
        memory: bytes at the peak so far, 0 where that is unknown.
    """

    WATCHED = 10  # after the first one, which allocates and compiles

    def __init__(self, steps: int, epochs: int, memory: Callable[[], int]) -> None:
        self.steps, self.epochs, self.memory = steps, epochs, memory
        self._ends: list[float] = []
        self._told = steps <= self.WATCHED

    def after_step(self) -> str | None:
        if self._told:
            return None
        self._ends.append(time.perf_counter())
        if len(self._ends) <= self.WATCHED:
            return None
        self._told = True
        took = [after - before for before, after in zip(self._ends, self._ends[1:], strict=False)]
        epoch = self.steps * statistics.median(took)
        peak = self.memory()
        memory = f"; memory so far {peak / 2**30:.2f} GiB" if peak else ""
        return (
            f"By the first steps: {duration(epoch)} per epoch, {duration(epoch * self.epochs)} to the end, "
            f"validation on top{memory}"
        )


def epoch_line(
    epoch: int,
    epochs: int,
    row: Mapping[str, Any],
    validation_loss: float,
    dice: Mapping[str, float],
    seconds: Sequence[float],
) -> str:
    """One epoch in one line.

    Args:
        row: of the history; validation_loss: supervised, as the term `supervised` is.
        dice: by structure; seconds: of all epochs so far.
    """
    terms = [key.removeprefix("loss/") for key in row if key.startswith("loss/")]
    losses = []
    for term in terms:
        weight = row[f"weight/{term}"]
        times = "" if weight == 1 else f" x {weight:.3g}"
        losses.append(f"{term} {row[f'loss/{term}']:.4f}{times}")
        if term == "supervised":
            losses.append(f"in validation {validation_loss:.4f}")
    if "supervised" not in terms:
        losses.append(f"validation {validation_loss:.4f}")
    parts = [", ".join(losses)]
    share = accepted_share(row)
    if share is not None:
        parts.append(f"accepted {100 * share:.0f} %")
    parts.append("Dice " + ", ".join(f"{name} {value:.3f}" for name, value in dice.items()))
    left = (epochs - epoch - 1) * statistics.median(seconds[-10:]) if seconds else math.nan
    parts.append(f"{seconds[-1]:.1f} s, {duration(left)} left" if seconds else "")
    return f"Epoch {epoch} ({epoch + 1} of {epochs}): {'; '.join(parts)}"


def accepted_share(row: Mapping[str, Any]) -> float | None:
    """Of the unlabeled voxels called any structure, the share that teaches; None where nothing is counted."""
    names = [key.removeprefix("accepted/") for key in row if key.startswith("accepted/")]
    structures = [name for name in names if name != "background"]
    accepted, called = (sum(row[f"{kind}/{name}"] for name in structures) for kind in ("accepted", "called"))
    return accepted / called if called else None


def duration(seconds: float) -> str:
    """1 h 05 min, 12 min, 40 s."""
    if not math.isfinite(seconds):
        return "unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
