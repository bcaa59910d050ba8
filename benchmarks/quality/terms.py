"""Which terms of a training act? Value, weight and weighted gradient on the student, per term and fifth of
the training, from its losses.csv.

    python -m benchmarks.quality.terms RUN_FOLDER ...

RUN_FOLDER is nnU-Net's folder of a fold, `.../fold_0`, of a finished training. Gradients are there if it ran
with the general key `term_gradients`, for instance `"nnssl": {"term_gradients": 50}` in the plans file. A
term acts in a fifth where the norm of its weighted gradient is at least 1 % of that of `supervised`.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FIFTHS = 5
ACTS, ENOUGH = 0.01, 2  # share of the gradient of `supervised`; fifths
REFERENCE = "supervised"

Values = list[float | None]


def read_losses(folder: Path) -> list[dict[str, float]]:
    """Rows of losses.csv, one per epoch."""
    with open(folder / "losses.csv", encoding="utf-8", newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def fifths(values: Sequence[float]) -> Values:
    """Mean of one value per epoch in each fifth of the training: an epoch counts as far as it lies in there,
    NaN does not. None where nothing is left."""
    epochs, means = len(values), []
    for k in range(FIFTHS):
        first, last = k * epochs, (k + 1) * epochs  # an epoch is FIFTHS long
        shares = [max(0, min(FIFTHS * (e + 1), last) - max(FIFTHS * e, first)) for e in range(epochs)]
        kept = [(share, v) for share, v in zip(shares, values, strict=True) if share and math.isfinite(v)]
        total = sum(share for share, _ in kept)
        means.append(sum(share * v for share, v in kept) / total if total else None)
    return means


def term_table(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Per term: `value` and `weight` (at the ends of the epochs) in each fifth and, where they were logged,
    `gradient` relative to that of `supervised`.

    Where `supervised` has no weight, its gradient in the nearest fifth with one stands in, a later one rather
    than an earlier one. None: no weight in the measured steps, or a term that does not reach the student.
    """
    terms = [c.removeprefix("loss/") for c in rows[0] if c.startswith("loss/")]
    column = lambda name: fifths([row.get(name, math.nan) for row in rows])  # noqa: E731
    reference = column(f"gradient/{REFERENCE}")
    there = {k: norm for k, norm in enumerate(reference) if norm}
    nearest = [there[min(there, key=lambda i: (abs(i - k), -i))] for k in range(FIFTHS)] if there else []
    table: dict[str, dict[str, Any]] = {}
    for term in terms:
        table[term] = {"value": column(f"loss/{term}"), "weight": column(f"weight/{term}")}
        if nearest:
            table[term]["gradient"] = [
                None if norm is None else norm / by
                for norm, by in zip(column(f"gradient/{term}"), nearest, strict=True)
            ]
    return table


def acting(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Fifths in which a term acts, and those in which it has a gradient on the student at all."""
    there = [share for share in entry["gradient"] if share is not None]
    return sum(share >= ACTS for share in there), len(there)


def markdown(table: Mapping[str, Mapping[str, Any]]) -> str:
    """The table, and what it says."""
    spans = [f"{100 * k // FIFTHS}-{100 * (k + 1) // FIFTHS} %" for k in range(FIFTHS)]
    lines = [f"| term | | {' | '.join(spans)} | acts |", "|---|---|" + "---|" * (FIFTHS + 1)]
    idle, elsewhere = [], []
    for term, entry in table.items():
        verdict = ""
        if "gradient" in entry:
            act, there = acting(entry)
            verdict = f"{act} of {there}" if there else "no gradient"
            if not there:
                elsewhere.append(term)
            elif act < min(ENOUGH, there):
                idle.append(term)
        for i, (kind, values) in enumerate(entry.items()):
            cells = [
                "" if v is None else f"{100 * v:.3g} %" if kind == "gradient" else f"{v:.3g}" for v in values
            ]
            lines.append(
                f"| {term if i == 0 else ''} | {kind} | {' | '.join(cells)} | {verdict if i == 0 else ''} |"
            )
    lines.append("")
    if not any("gradient" in entry for entry in table.values()):
        return "\n".join(
            [*lines, 'No gradients: train with "term_gradients" under "nnssl" in the plans file.']
        )
    if idle:
        lines.append(
            f"Idle, below {ACTS:.0%} of {REFERENCE} in all fifths but one or in all: {', '.join(idle)}."
        )
    else:
        lines.append(
            f"Every term with a gradient on the student acts in {ENOUGH} fifths or more, or its only one."
        )
    if None in table[REFERENCE]["gradient"]:
        lines.append(
            f"Where {REFERENCE} has no weight, its gradient in the nearest fifth with one stands in."
        )
    if elsewhere:
        lines.append(f"Without weight, or training other networks only: {', '.join(elsewhere)}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN_FOLDER")
    for folder in parser.parse_args().folders:
        if not (folder / "checkpoint_final.pth").is_file():
            parser.error(
                f"{folder} has no checkpoint_final.pth: expected nnU-Net's folder of a fold whose training "
                "has ended; continue it with --c"
            )
        rows = read_losses(folder)
        print(f"{folder}\n\n{markdown(term_table(rows))}\n")
        if len(rows) < FIFTHS:
            print(f"{len(rows)} epochs make {FIFTHS} fifths: neighbors share the mean of an epoch.\n")


if __name__ == "__main__":
    main()
