"""Slices with outlines and errors, and strips of them: arrays for the page, and one PNG of each strip."""

from __future__ import annotations

import base64
import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from nnssl.data.structures import mask_of
from nnssl.files import replacing
from nnssl.report.charts import PNG_MARK

EDGE = 250  # pixels of a panel's longer edge
MOST = 10  # pixels per voxel at most
LOSS = 10  # of 255, what a panel may lose in colors for a smaller page
MARGIN = 0.4  # of the structures' extent, shown around them
# light on grey and told apart by the color-blind; errors differ by stripes, too
OUTLINES = ("#f0e442", "#00e0b0", "#ffffff", "#b9a3ff", "#e69f00", "#9ad0ff")
ERRORS = {"missed": "#3d8bff", "added": "#ff6a13", "other structure": "#e58fc0"}
Structures = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Panel:
    """caption and (H, W, 3) uint8."""

    caption: str
    pixels: np.ndarray


@dataclass(frozen=True)
class Strip:
    """Rows of panels, each with a name; the longest row has the captions of all."""

    title: str
    rows: Mapping[str, Sequence[Panel]]


def rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], float)


def grey(image: np.ndarray) -> np.ndarray:
    """0 to 1 between its 0.5th and 99.5th percentile."""
    low, high = np.percentile(image, [0.5, 99.5])
    return np.clip((image.astype(float) - low) / max(float(high - low), 1e-6), 0, 1)


class Enlarge:
    """A slice (H, W) of a given spacing to square pixels: labels by the nearest voxel, images linearly."""

    def __init__(self, shape: Sequence[int], spacing: Sequence[float]) -> None:
        extent = np.multiply(shape, spacing)
        scale = min(EDGE / max(extent), MOST / max(spacing))
        sizes = np.maximum(1, np.round(extent * scale)).astype(int)
        self.places = [(np.arange(n) + 0.5) * s / n - 0.5 for n, s in zip(sizes, shape, strict=True)]
        self.nearest = np.ix_(
            *(np.clip(np.round(p), 0, s - 1).astype(int) for p, s in zip(self.places, shape, strict=True))
        )

    def labels(self, plane: np.ndarray) -> np.ndarray:
        return plane[self.nearest]

    def image(self, plane: np.ndarray) -> np.ndarray:
        grid = np.meshgrid(*self.places, indexing="ij")
        return ndimage.map_coordinates(plane.astype(float), grid, order=1, mode="nearest")


def outline(mask: np.ndarray, width: int = 2) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask, iterations=width, border_value=1)


def stripes(shape: Sequence[int], kind: int) -> np.ndarray:
    """Patterns that differ without color: none, diagonals, the other diagonals."""
    y, x = np.indices(tuple(shape))
    return np.stack([np.ones_like(x), (x + y) % 8 < 5, (x - y) % 8 < 5]).astype(bool)[kind]


def paint(base: np.ndarray, mask: np.ndarray, color: str, opacity: float = 1.0) -> None:
    """In place, base (H, W, 3) float in 0 to 255."""
    base[mask] = (1 - opacity) * base[mask] + opacity * rgb(color)


def colored(image: np.ndarray) -> np.ndarray:
    """(H, W) in 0 to 1 -> (H, W, 3) in 0 to 255."""
    return np.repeat(255 * image[..., None], 3, axis=-1)


def draw_outlines(base: np.ndarray, labels: np.ndarray, found: Structures) -> np.ndarray:
    """Outlines of the structures of (H, W) on (H, W, 3), in place, with a dark rim: bright tissue and print
    have no color to tell them by."""
    masks = [mask_of(labels, values) for values in found.values()]
    for mask in masks:
        paint(base, outline(mask, 3), "#000000", 0.7)
    for i, mask in enumerate(masks):
        paint(base, outline(mask), OUTLINES[i % len(OUTLINES)])
    return base


def errors(base: np.ndarray, prediction: np.ndarray, truth: np.ndarray, known: np.ndarray) -> None:
    """Fill what is wrong, in place: missed, added, and called another structure."""
    wrong = (prediction != truth) & known
    kinds = (wrong & (prediction == 0), wrong & (truth == 0), wrong & (prediction > 0) & (truth > 0))
    for kind, (mask, color) in enumerate(zip(kinds, ERRORS.values(), strict=True)):
        paint(base, mask & stripes(mask.shape, kind), color, 0.75)


def case_strip(
    title: str,
    image: np.ndarray | None,
    truth: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    spacing: Sequence[float],
    found: Structures,
    shown: str,
    ignored: int | None = None,
) -> Strip:
    """A case in up to three planes: labels, then the prediction of every model with its errors.

    Args:
        image: (D, H, W), None: black.
        truth: labels (D, H, W); predictions: by model, the same shape.
        shown: the structure that the planes go through.
        ignored: the ignore label.
    """
    known = np.ones(truth.shape, bool) if ignored is None else truth != ignored
    cleared = np.where(known, truth, 0)
    everything = (cleared > 0) | np.any([p > 0 for p in predictions.values()], axis=0)
    target = mask_of(cleared, found[shown])
    if not target.any():
        target = everything
    box, shape = _box(everything), truth.shape
    picture = np.zeros(shape) if image is None else grey(image)
    rows = {}
    for axis in range(3):
        if shape[axis] == 1 or any(n == 1 for i, n in enumerate(shape) if i != axis):
            continue
        others = [i for i in range(3) if i != axis]
        index = int(target.sum(axis=tuple(others)).argmax()) if target.any() else shape[axis] // 2
        rows[f"{'zyx'[axis]} = {index}"] = _plane(
            axis, index, box, picture, cleared, predictions, known, spacing, found
        )
    if not rows:  # a picture
        rows["picture"] = _plane(0, 0, box, picture, cleared, predictions, known, spacing, found)
    return Strip(title, rows)


def _plane(
    axis: int,
    index: int,
    box: tuple[slice, ...],
    picture: np.ndarray,
    truth: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    known: np.ndarray,
    spacing: Sequence[float],
    found: Structures,
) -> list[Panel]:
    place = tuple(index if i == axis else box[i] for i in range(3))
    flip = slice(None, None, -1 if axis else 1)  # heads up where the first axis runs upwards
    cut = {name: a[place][flip] for name, a in (("image", picture), ("truth", truth), ("known", known))}
    enlarge = Enlarge(cut["truth"].shape, [s for i, s in enumerate(spacing) if i != axis])
    base, labels, counted = (
        enlarge.image(cut["image"]),
        enlarge.labels(cut["truth"]),
        enlarge.labels(cut["known"]),
    )
    panels = [Panel("labels", draw_outlines(colored(base), labels, found).astype(np.uint8))]
    for model, prediction in predictions.items():
        called = enlarge.labels(prediction[place][flip])
        pixels = colored(base)
        errors(pixels, called, labels, counted)
        draw_outlines(pixels, called, found)
        panels.append(Panel(model, pixels.astype(np.uint8)))
    return panels


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    """Around a mask with a margin; everything where it is empty."""
    found = ndimage.find_objects(mask.astype(np.uint8))
    if not found:
        return tuple(slice(0, n) for n in mask.shape)
    margins = [max(6, round(MARGIN * (s.stop - s.start))) for s in found[0]]
    return tuple(
        slice(max(0, s.start - m), min(n, s.stop + m))
        for s, m, n in zip(found[0], margins, mask.shape, strict=True)
    )


def data_uri(pixels: np.ndarray) -> str:
    """A PNG in a URI, of 256 colors where they suffice."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(pixels))
    fewer = picture.quantize(dither=Image.Dither.NONE)
    if np.abs(np.asarray(fewer.convert("RGB"), int) - pixels).max() <= LOSS:
        picture = fewer
    stream = io.BytesIO()
    picture.save(stream, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def draw_strip(strip: Strip, path: str | os.PathLike[str]) -> None:
    """All panels in one PNG, with captions."""
    from matplotlib.figure import Figure

    rows = list(strip.rows.values())
    columns = max(len(row) for row in rows)
    width, letters = 0.6 + 2.4 * columns, 13.5  # an inch holds so many
    title = textwrap.wrap(strip.title, int(letters * width))
    heights = [0.4 + 2.4 * max(p.pixels.shape[0] / p.pixels.shape[1] for p in panels) for panels in rows]
    figure = Figure(figsize=(width, 0.3 + 0.2 * len(title) + sum(heights)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for line, (name, panels) in zip(axes, strip.rows.items(), strict=True):
        for axis in line:
            axis.set(xticks=[], yticks=[])
        for axis in line[len(panels) :]:
            axis.set_axis_off()
        for axis, panel in zip(line, panels, strict=False):
            axis.imshow(panel.pixels, interpolation="nearest")
            axis.set_title(textwrap.fill(panel.caption, int(letters * 2.4)), fontsize=9)
        line[0].set_ylabel(name, fontsize=9)
    figure.suptitle("\n".join(title), fontsize=10)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=100, metadata=PNG_MARK)
