"""Pictures of results: overlays of predictions, and what a training's losses and Dice did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from nnssl.files import replacing

ERROR = "#e0263c"
PALETTE = ["#1fb4c4", "#f5a623", "#8bc34a", "#ba68c8", "#fff176", "#f48fb1"]  # structures, in turn


def draw_overlay(
    cases: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], structures: Sequence[str], path: Path
) -> None:
    """One row per case: image, truth, prediction, error, on the slice with most of the case's smallest
    structure.

    Args:
        cases: title -> image, truth, prediction, each (D, H, W); labels 1, 2, ... are `structures`, 0 is
            background.
        path: of the picture.
    """
    palette = [PALETTE[i % len(PALETTE)] for i in range(len(structures))]
    figure = Figure(figsize=(10, 2.7 * len(cases) + 0.3), layout="constrained")
    for row, (title, (image, truth, prediction)) in zip(
        figure.subplots(len(cases), 4, squeeze=False), cases.items(), strict=True
    ):
        values, counts = np.unique(truth[truth > 0], return_counts=True)
        z = int((truth == values[counts.argmin()]).sum((1, 2)).argmax()) if len(values) else len(truth) // 2
        error = (truth[z] != prediction[z]).astype(np.uint8)
        layers = {f"{title}, slice {z}": None, "truth": truth[z], "prediction": prediction[z], "error": error}
        for axis, (name, layer) in zip(row, layers.items(), strict=True):
            axis.imshow(
                image[z],
                cmap="gray",
                interpolation="nearest",
                vmin=image.min(),
                vmax=np.percentile(image, 99.8),
            )
            if layer is not None:
                colours = ListedColormap([ERROR] if name == "error" else palette)
                axis.imshow(
                    np.ma.masked_equal(layer, 0),
                    cmap=colours,
                    vmin=1,
                    vmax=max(2, colours.N),
                    alpha=0.6,
                    interpolation="nearest",
                )
            axis.set_title(name, fontsize=9)
            axis.set_axis_off()
    legend = [
        Patch(color=c, label=name) for c, name in zip([*palette, ERROR], [*structures, "error"], strict=True)
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend))
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)


def draw_curve(
    rows: Sequence[Mapping[str, float]],
    dice: Sequence[Sequence[float]],
    structures: Sequence[str],
    path: Path,
) -> None:
    """Raw loss terms per epoch (`rows` of losses.csv) above, nnU-Net's pseudo Dice per epoch and structure
    below."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    losses, scores = figure.subplots(2, 1, sharex=True)
    for column in (c for c in rows[0] if c.startswith("loss/")):
        losses.plot(
            [row["epoch"] for row in rows],
            [row[column] for row in rows],
            marker=".",
            label=column.removeprefix("loss/"),
        )
    losses.set_ylabel("loss, unweighted")
    for k, name in enumerate(structures):
        scores.plot(range(len(dice)), [row[k] for row in dice], marker=".", label=name)
    scores.set(ylabel="pseudo Dice, labeled patches", xlabel="epoch", ylim=(0, 1))
    scores.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (losses, scores):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)
