"""Charts of the histories of trainings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nnssl.report.charts import Chart, Series
from nnssl.report.runs import Run, number

Styles = Mapping[str, int]  # of models


def named(run: Run, runs: Sequence[Run]) -> str:
    """The model, and its fold where there are several."""
    several = len({other.fold for other in runs if other.model == run.model}) > 1
    return f"{run.model}, fold {run.fold}" if several else run.model


def series(run: Run, runs: Sequence[Run], styles: Styles, values: Sequence[Any], name: str = "") -> Series:
    """A value per epoch."""
    return Series(
        name or named(run, runs), list(range(len(values))), [number(v) for v in values], styles[run.model]
    )


def validation_charts(runs: Sequence[Run], styles: Styles) -> list[Chart]:
    """Dice of every structure over the epochs."""
    charts = []
    for structure in dict.fromkeys(name for run in runs for name in run.dice):
        lines = [series(run, runs, styles, run.dice[structure]) for run in runs if run.dice.get(structure)]
        if lines:
            charts.append(Chart(f"Dice: {structure}", lines, "Dice", limits=(0, 1)))
    return charts


def loss_charts(runs: Sequence[Run], styles: Styles) -> list[Chart]:
    """Supervised loss in training and validation, of every model: the gap is what it learnt by heart."""
    charts = []
    for model in dict.fromkeys(run.model for run in runs):
        lines = []
        for run in (r for r in runs if r.model == model):
            train = [row["loss/supervised"] for row in run.rows if "loss/supervised" in row]
            train = train or [number(v) for v in run.logging.get("train_losses") or []]
            val = run.logging.get("val_losses") or []
            fold = named(run, runs).removeprefix(model)
            lines += [
                Series(f"training{fold}", list(range(len(train))), train, 0),
                Series(f"validation{fold}", list(range(len(val))), [number(v) for v in val], 1),
            ]
        if any(s.y for s in lines):
            note = (
                "Supervised loss on labeled patches; a growing gap is what the network has learnt by heart."
            )
            charts.append(Chart(f"{model}: training and validation", lines, "loss", note=note))
    return charts


def columns(run: Run, kind: str) -> list[str]:
    """Names under a kind of losses.csv, `loss` or `diagnostic`."""
    names = dict.fromkeys(key for row in run.rows for key in row)
    return [key.removeprefix(f"{kind}/") for key in names if key.startswith(f"{kind}/")]


def column(run: Run, key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of a column of losses.csv."""
    return [row["epoch"] for row in run.rows], [row.get(key, math.nan) for row in run.rows]


def term_charts(runs: Sequence[Run], model: str, kind: str) -> list[Chart]:
    """Every term or diagnostic of a model, with its sentence; terms with the weight at the end."""
    mine = [run for run in runs if run.model == model]
    charts = []
    for name in dict.fromkeys(n for run in mine for n in columns(run, kind)):
        lines = []
        for i, run in enumerate(mine):
            x, y = column(run, f"{kind}/{name}")
            if any(math.isfinite(v) for v in y):
                lines.append(Series(named(run, runs), x, y, i))
        if lines:
            note = next((n for run in mine if (n := run.record.get("meaning", {}).get(name))), "")
            charts.append(Chart(name, lines, "unweighted loss" if kind == "loss" else "value", note=note))
    return charts


def weight_chart(runs: Sequence[Run], model: str) -> list[Chart]:
    """lambda of every term of a model, of its first fold: all folds have the same."""
    run = next(run for run in runs if run.model == model)
    lines = []
    for i, name in enumerate(columns(run, "weight")):
        x, y = column(run, f"weight/{name}")
        lines.append(Series(name, x, y, i))
    if len(lines) < 2:
        return []
    note = "What each term is multiplied with; the sum of all is minimised."
    return [Chart("weights of the terms", lines, "weight", note=note)]


def acceptance_charts(runs: Sequence[Run], styles: Styles) -> list[Chart]:
    """Per class: share of accepted pseudo-labels, and share of all voxels that are called so."""
    charts = []
    names = dict.fromkeys(name for run in runs for name in columns(run, "accepted"))
    for kind, title, note in (
        ("accepted", "accepted", "Of the unlabeled voxels called {}, the share whose pseudo-label teaches."),
        ("called", "called", "Share of the unlabeled voxels that are called {}."),
    ):
        for name in names:
            lines = []
            for run in (r for r in runs if name in columns(r, kind)):
                x, y = column(run, f"{kind}/{name}")
                if kind == "accepted":
                    called = column(run, f"called/{name}")[1]
                    y = [a / c if c else math.nan for a, c in zip(y, called, strict=True)]
                lines.append(Series(named(run, runs), x, y, styles[run.model]))
            limits = (0.0, 1.0) if kind == "accepted" else None
            if lines:
                charts.append(
                    Chart(f"{title}: {name}", lines, "share", note=note.format(name), limits=limits)
                )
    return charts
