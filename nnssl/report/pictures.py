"""What a training saved of its pseudo-labels over time, as strips and as curves of student and teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nnssl.data.structures import mask_of, structures
from nnssl.report.charts import Chart, Series
from nnssl.report.curves import named
from nnssl.report.panels import OUTLINES, Enlarge, Panel, Strip, colored, draw_outlines, paint, rgb
from nnssl.report.runs import Run

FOLDER = "pseudo_labels"
ACCEPTED = "#3d8bff"


def saved(run: Run) -> dict[int, dict[str, np.ndarray]]:
    """{epoch: arrays} of a run, and its scans under -1; empty where there are no pictures."""
    folder = run.folder / FOLDER
    if not (folder / "scans.npz").is_file():
        return {}
    files = {-1: folder / "scans.npz"}
    files |= {int(path.stem.removeprefix("epoch_")): path for path in sorted(folder.glob("epoch_*.npz"))}
    found = {}
    for epoch, path in files.items():
        try:
            with np.load(path, allow_pickle=False) as content:
                found[epoch] = dict(content)
        except Exception as error:  # damaged files raise nearly anything
            run.note(f"{path} is not read: {error}")
    return found


def strips(run: Run, runs: Sequence[Run]) -> list[Strip]:
    """One per scan: the image, then a column per moment, rows of pseudo-labels, confidence and accepted
    voxels."""
    content = saved(run)
    scans = content.pop(-1, {})
    found, result = structures(run.dataset_json), []
    for i, name in enumerate(scans.get("names", ())):
        moments = {epoch: arrays for epoch, arrays in content.items() if f"label_{i}" in arrays}
        if not moments:
            continue
        last = moments[max(moments)][f"label_{i}"]
        z = int((last > 0).sum((1, 2)).argmax()) if last.any() else len(last) // 2
        image = scans[f"image_{i}"][z] / 255
        enlarge = Enlarge(image.shape, scans["spacing"].tolist())
        base = enlarge.image(image)
        rows: dict[str, list[Panel]] = {"image": [_panel(name, colored(base))]}
        rows |= {"pseudo-label": [], "confidence": [], "accepted": []}
        for epoch, arrays in moments.items():
            caption = f"epoch {epoch}"
            labels = enlarge.labels(arrays[f"label_{i}"][z])
            pixels = draw_outlines(colored(base), labels, found)
            rows["pseudo-label"].append(_panel(caption, pixels))
            certain = enlarge.image(arrays[f"confidence_{i}"][z] / 255)
            rows["confidence"].append(_panel(caption, shade(certain)))
            if (accepted := arrays.get(f"accepted_{i}")) is not None:
                pixels = colored(base)
                paint(pixels, enlarge.labels(accepted[z]) > 0, ACCEPTED, 0.35)
                for k, values in enumerate(found.values()):
                    inside = mask_of(labels, values) & (enlarge.labels(accepted[z]) > 0)
                    paint(pixels, inside, OUTLINES[k % len(OUTLINES)], 0.6)
                rows["accepted"].append(_panel(caption, pixels))
        result.append(Strip(f"{named(run, runs)}: {name}", {k: v for k, v in rows.items() if v}))
    return result


def _panel(caption: str, pixels: np.ndarray) -> Panel:
    return Panel(caption, np.clip(pixels, 0, 255).astype(np.uint8))


def shade(share: np.ndarray) -> np.ndarray:
    """Confidence from dark blue (0.5 and less) over grey to yellow (1): even in lightness, for every eye."""
    stops = np.array([rgb(color) for color in ("#00204d", "#7c7b78", "#ffea46")])
    place = np.clip(2 * share - 1, 0, 1)[..., None] * 2
    lower = np.minimum(place.astype(int), 1)[..., 0]
    return stops[lower] + (place - lower[..., None]) * (stops[lower + 1] - stops[lower])


def teacher_charts(runs: Sequence[Run]) -> list[Chart]:
    """Dice of student and teacher on the same views of validation cases, per structure."""
    charts = []
    for run in runs:
        content = {epoch: arrays for epoch, arrays in saved(run).items() if "dice_teacher" in arrays}
        for k, name in enumerate(structures(run.dataset_json)) if content else ():
            lines = [
                Series(who, list(content), [float(a[f"dice_{who}"][k]) for a in content.values()], style)
                for style, who in enumerate(("student", "teacher"))
            ]
            if any(math.isfinite(v) for s in lines for v in s.y):
                note = "On the same few views of validation cases: a teacher below its student holds it back."
                title = f"{named(run, runs)}, student and teacher: {name}"
                charts.append(Chart(title, lines, "Dice", note=note, limits=(0, 1)))
    return charts
