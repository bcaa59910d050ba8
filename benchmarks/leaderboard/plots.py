"""The pictures of a report: bars, label-budget curves, training curves, overlay panel. Nothing in them
depends on when they are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from benchmarks.leaderboard.suite import Suite
from nnssl.files import replacing

PLAIN, STARTED, BOUND, BASE = "#4878a8", "#5fa68a", "#9aa0a6", "#e39c37"
NAMES = {
    "supervised": "supervised only",
    "supervised_all": "supervised, all labels",
    "self_training": "self-training",
}


def write_pictures(
    suite: Suite, table: Sequence[Mapping[str, Any]], finished: Sequence[Mapping[str, Any]], results: Path
) -> dict[str, str]:
    """All pictures of a suite, as PNG and, but for the overlay, SVG; returns what there is: the end of its
    name and what it shows.

    Curves and overlay are of the smallest budget with a finished row; no overlay where no row has its panel.
    """
    budget = min(
        e["budget"] for e in table if e["method"] != "supervised_all" or all(f["bound"] for f in finished)
    )
    chosen: dict[str, Mapping[str, Any]] = {}
    for row in finished:
        if row["bound"] or row["labeled"] == budget:
            chosen.setdefault(row["method"], row)  # the first seed
    panels = {
        method: results / suite.name / "panels" / f"{row['name']}.png" for method, row in chosen.items()
    }
    shown = {method: row for method, row in chosen.items() if panels[method].is_file()}
    with matplotlib.rc_context({"svg.hashsalt": "leaderboard", "font.family": "DejaVu Sans"}):
        save(draw_bars(suite, table), results / f"{suite.name}_bars")
        save(draw_budgets(suite, table), results / f"{suite.name}_budgets")
        save(draw_curves(suite, chosen, budget), results / f"{suite.name}_curves")
        if shown:
            save(draw_overlay(shown, panels, budget), results / f"{suite.name}_overlay", svg=False)
    names = {
        "bars": "Dice",
        "budgets": "Dice over labels",
        "overlay": "the same slice for every method",
        "curves": "training",
    }
    return {name: text for name, text in names.items() if shown or name != "overlay"}


def colour(suite: Suite, method: str) -> str:
    if method.lower().startswith("supervised"):
        return BOUND
    own = suite.method.get(method, {})
    if method == "self_training" or own.get("trainer") == "self_training":
        return BASE
    return STARTED if suite.started(method) else PLAIN


def draw_bars(suite: Suite, table: Sequence[Mapping[str, Any]]) -> Figure:
    """Dice of every method, a panel per budget; apart by colour what starts from another row's network."""
    shown = [b for b in suite.budgets if any(e["budget"] == b for e in table)]
    most = max(len([e for e in table if e["budget"] == b]) for b in shown)
    figure = Figure(figsize=(4.6 * len(shown) + 0.6, 0.32 * most + 1.4), layout="constrained")
    lowest = min(100 * e["dice"] for e in table)
    for axis, budget in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        entries = sorted((e for e in table if e["budget"] == budget), key=lambda e: (e["dice"], e["method"]))
        values = [100 * e["dice"] for e in entries]
        errors = [100 * (e["dice_sd"] or 0) for e in entries]
        axis.barh(
            range(len(entries)),
            values,
            xerr=errors,
            color=[colour(suite, e["method"]) for e in entries],
            height=0.7,
        )
        ends = [value + error for value, error in zip(values, errors, strict=True)]
        for k, (value, end) in enumerate(zip(values, ends, strict=True)):
            axis.text(end, k, f" {value:.1f}", va="center", fontsize=8)
        axis.set_yticks(
            range(len(entries)), [NAMES.get(e["method"], e["method"]) for e in entries], fontsize=9
        )
        axis.set(
            title=f"{budget} labeled",
            xlabel="Dice % (axis does not start at 0)",
            xlim=(max(0, lowest - 3), max(ends) + 2),
        )
        axis.spines[["top", "right"]].set_visible(False)
    used = {colour(suite, e["method"]) for e in table}
    if {PLAIN, STARTED} <= used:
        kinds = {
            STARTED: "from a finished network",
            PLAIN: "from scratch",
            BASE: "self-training",
            BOUND: "labels alone",
        }
        handles = [Patch(color=c, label=kind) for c, kind in kinds.items() if c in used]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False
        )
    return figure


def draw_budgets(suite: Suite, table: Sequence[Mapping[str, Any]]) -> Figure:
    """Dice over the number of labeled cases."""
    figure = Figure(figsize=(6.8, 4.6), layout="constrained")
    axis = figure.subplots()
    colours = matplotlib.colormaps["tab20"]
    for k, method in enumerate(dict.fromkeys(e["method"] for e in table)):
        entries = [e for e in table if e["method"] == method]
        if method == "supervised_all":
            axis.axhline(
                100 * entries[0]["dice"],
                color="black",
                linestyle="--",
                linewidth=1,
                label=f"all {entries[0]['labeled']} labels",
            )
            continue
        style = {"color": "black", "linewidth": 2} if method == "supervised" else {"color": colours(k % 20)}
        errors = [100 * (e["dice_sd"] or 0) for e in entries]
        axis.errorbar(
            [e["labeled"] for e in entries],
            [100 * e["dice"] for e in entries],
            errors,
            marker="o",
            label=NAMES.get(method, method),
            **style,
        )
    axis.set(xlabel="labeled cases", ylabel="Dice %", xticks=suite.budgets)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def draw_curves(suite: Suite, chosen: Mapping[str, Mapping[str, Any]], budget: int) -> Figure:
    """nnU-Net's validation loss and pseudo Dice over the epochs of a row per method."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    colours = matplotlib.colormaps["tab20"]
    for k, (method, row) in enumerate(chosen.items()):
        for axis, key in zip(axes, ("val_loss", "pseudo_dice"), strict=True):
            values = [np.nan if v is None else v for v in row["curve"][key]]
            axis.plot(
                range(1, len(values) + 1),
                values,
                color=colours(k % 20),
                label=NAMES.get(method, method) if key == "val_loss" else None,
            )
    axes[0].set_ylabel("nnU-Net's loss, validation patches")
    axes[1].set(
        ylabel="pseudo Dice, validation patches",
        xlabel=f"epoch of {suite.schedule['num_iterations_per_epoch']} iterations",
    )
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(f"{budget} labeled; self-training: two rounds one after the other", fontsize=10)
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def draw_overlay(chosen: Mapping[str, Mapping[str, Any]], panels: Mapping[str, Path], budget: int) -> Figure:
    """The strips of a row per method under each other: image, labels, prediction, error on the same slice."""
    strips = {method: matplotlib.image.imread(panels[method]) for method in chosen}
    height, width = next(iter(strips.values())).shape[:2]
    aspect = next(iter(chosen.values()))["panel"]["aspect"]
    columns = 1 if len(strips) < 5 else 2
    lines = -(-len(strips) // columns)
    figure = Figure(
        figsize=(6.6 * columns, (5.2 * height * aspect / width + 0.06) * lines + 0.4), layout="constrained"
    )
    axes = figure.subplots(lines, columns, squeeze=False).T.ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (method, strip) in zip(axes, strips.items(), strict=False):
        axis.imshow(strip, aspect=aspect, interpolation="nearest")
        dice = np.nanmean([v if v is not None else np.nan for v in case_dice(chosen[method])])
        name = NAMES.get(method, method).replace(", ", ",\n")
        axis.text(
            -0.01,
            0.5,
            f"{name}\n{100 * dice:.1f}",
            transform=axis.transAxes,
            ha="right",
            va="center",
            fontsize=8,
        )
    case = next(iter(chosen.values()))["panel"]["case"]
    figure.suptitle(
        f"{case}, {budget} labeled: image, labels, prediction, error; Dice % of the case", fontsize=9
    )
    return figure


def case_dice(row: Mapping[str, Any]) -> list[float | None]:
    return row["per_case"]["dice"][row["cases"].index(row["panel"]["case"])]


def save(figure: Figure, stem: Path, svg: bool = True) -> None:
    with replacing(stem.with_suffix(".png")) as partial:
        # strips keep their aspect, so their labels may end outside of the figure
        bounds = None if svg else "tight"
        figure.savefig(partial, dpi=110, metadata={"Software": None}, bbox_inches=bounds)
        if not svg:  # scans: with 256 colors half of the size
            with Image.open(partial) as picture:
                fewer = picture.convert("RGB").quantize(dither=Image.Dither.NONE)
            fewer.save(partial, "png", optimize=True)
    if svg:
        with replacing(stem.with_suffix(".svg")) as partial:
            figure.savefig(partial, metadata={"Date": None, "Creator": None})
