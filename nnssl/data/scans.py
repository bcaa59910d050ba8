"""Statistics of scans and label maps, each file read once and kept, and scans unlike the labeled ones.

The statistics stand in ``nnssl_inspection.json`` of the preprocessed dataset, under the stamps of the files
(size, time of change): what has not changed is not read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import basename, dirname, isfile, join
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from nnunetv2.configuration import default_num_processes
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

from nnssl.data.findings import ERROR, WARNING, Finding, listed, printable
from nnssl.data.parallel import unordered, usable_cores
from nnssl.data.raw import LABEL_REMEDY, CheckedPlans, SourceError, label_problem
from nnssl.files import read_json, write_text

FILE = "nnssl_inspection.json"
FORMAT = 2
SAMPLED = 1_000_000  # voxels per channel
DISTINCT = 1000  # values are counted up to here
SECONDS_BETWEEN_WRITES = 60
QUEUED = 16  # files that wait for a process: thousands at once take memory
PER_PROCESS = 8  # starting a process costs more than reading a few files

ENOUGH = 10  # labeled cases; with fewer all factors count double
SPACING, EXTENT, INTENSITIES, VALUES = 2.0, 2.0, 2.5, 3.0  # factors beyond the labeled cases
EXTREME = 100.0  # ranges of intensities beyond the percentiles
SATURATED = 0.05  # share of voxels at the maximum, among those above the minimum
OFF_GRID = "spacing, origin or direction are not those of the image"
APART = 0.1  # smallest spacings by which channels of one case may lie apart
CLEAR = 0.8  # cosine of an axis with one of the body's; others are oblique, and point nowhere
FEW = 16  # distinct values, where labeled scans have more than twice as many
ABSOLUTE = ("CTNormalization", "NoNormalization", "RGBTo01Normalization")  # keep scale and zero of a scan
Statistics = dict[str, Any]


@dataclass(frozen=True)
class Scan:
    """Files of one case that give one image, or its label map (origin labelsTr)."""

    name: str
    origin: str  # imagesTr | labelsTr | imagesUn | imagesTs, only to compare with imagesUn
    files: tuple[str, ...]


def measure(
    scans: Sequence[Scan],
    reader: str,
    channels: int,
    folder: str,
    num_processes: int | None = None,
    progress: Callable[[Any], Any] = iter,
) -> dict[Scan, Statistics]:
    """Statistics of every scan, from those kept in `folder` where its files have not changed.

    A scan that cannot be read has the key ``error`` alone, and is tried again next time.
    """
    file = join(folder, FILE)
    kept, origins = _read_kept(file), {scan.origin for scan in scans}
    others = {key: value for key, value in kept.items() if key.partition("/")[0] not in origins}
    keys = {scan: f"{scan.origin}/{scan.name}" for scan in scans}
    stamps = {scan: [reader, channels, *map(_stamp, scan.files)] for scan in scans}
    known = {scan: kept[key] for scan, key in keys.items() if kept.get(key, {}).get("stamps") == stamps[scan]}
    jobs = [(scan, reader, channels) for scan in scans if scan not in known]
    workers = min(num_processes or min(default_num_processes, usable_cores()), 1 + len(jobs) // PER_PROCESS)
    written = time.monotonic()
    for scan, statistics in progress(unordered(_measure, jobs, workers, queued=QUEUED)):
        known[scan] = {**statistics, "stamps": stamps[scan]}
        if time.monotonic() - written > SECONDS_BETWEEN_WRITES:
            _keep(others, known, keys, file)
            written = time.monotonic()
    if jobs or len(kept) != len(others) + len(known):
        _keep(others, known, keys, file)
    return {scan: known[scan] for scan in scans}


def _read_kept(file: str) -> dict[str, Statistics]:
    """What earlier inspections wrote; a damaged file costs the time of measuring again."""
    try:
        content = read_json(file) if isfile(file) else {}
        return dict(content["cases"]) if content.get("format") == FORMAT else {}
    except (ValueError, KeyError, AttributeError, TypeError):
        return {}


def _keep(
    others: Mapping[str, Statistics], known: Mapping[Scan, Statistics], keys: Mapping[Scan, str], file: str
) -> None:
    cases = {**others, **{keys[scan]: v for scan, v in known.items() if "error" not in v}}
    folder = os.path.dirname(file)
    if not os.path.isdir(os.path.dirname(folder)):  # nnUNet_preprocessed points nowhere: told by others
        return
    with contextlib.suppress(OSError):  # read-only: measured anew next time
        os.makedirs(folder, exist_ok=True)
        write_text(json.dumps({"format": FORMAT, "cases": cases}), file)


def _stamp(file: str) -> list[Any]:
    stat = os.stat(file)
    return [basename(file), stat.st_size, stat.st_mtime_ns]


def _measure(scan: Scan, reader: str, channels: int) -> tuple[Scan, Statistics]:
    images = () if scan.origin == "labelsTr" else scan.files
    plans = CheckedPlans({"image_reader_writer": reader}, images, channels, strict=scan.origin == "imagesUn")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some readers print
            if scan.origin == "labelsTr":
                return scan, label_statistics(*plans.image_reader_writer_class().read_seg(scan.files[0]))
            reader_class = plans.image_reader_writer_class
            statistics = image_statistics(*reader_class().read_images(list(scan.files)))
            return scan, {**statistics, "apart": _apart(reader_class, scan.files, statistics["spacing"])}
    except SourceError as error:
        return scan, {"error": str(error)}
    except Exception as error:  # a reader may raise anything
        return scan, {"error": f"{', '.join(scan.files)}: cannot be read ({type(error).__name__}: {error})"}


def image_statistics(image: np.ndarray, properties: Mapping[str, Any]) -> Statistics:
    """Of an image (C, z, y, x): grid, hash of the voxels, and per channel what describes its intensities."""
    return {**_grid(image, properties), "hash": _hash(image), "channels": [_channel(c) for c in image]}


def label_statistics(label: np.ndarray, properties: Mapping[str, Any]) -> Statistics:
    """Of a label map (1, z, y, x): grid and the values that occur (at most 1000)."""
    return {**_grid(label, properties), "values": [float(v) for v in np.unique(label)[:DISTINCT]]}


def _grid(array: np.ndarray, properties: Mapping[str, Any]) -> Statistics:
    placed = properties.get("sitk_stuff", properties.get("nibabel_stuff", {}))
    position = [placed[key] for key in ("origin", "direction", "original_affine") if key in placed]
    return {
        "shape": [int(n) for n in array.shape[1:]],
        "spacing": [float(s) for s in properties["spacing"]],
        "position": [float(v) for part in position for v in np.ravel(part)],
        "axes": _axes(properties),
    }


def _axes(properties: Mapping[str, Any]) -> str:
    """Where the axes of the voxels as read point to, e.g. LPS; empty where no header tells, or one of them is
    oblique."""
    itk, nifti = properties.get("sitk_stuff", {}), properties.get("nibabel_stuff", {})
    affine = nifti.get("reoriented_affine", nifti.get("original_affine"))
    if affine is not None:
        matrix = np.array(affine)[:3, :3]
    elif len(direction := itk.get("direction", ())) in (9, 16):
        size = math.isqrt(len(direction))
        matrix = np.diag([-1, -1, 1]) @ np.reshape(direction, (size, size))[:3, :3]
    else:
        return ""
    with np.errstate(all="ignore"):
        cosines = matrix / np.linalg.norm(matrix, axis=0)
    main = np.abs(cosines).argmax(0)
    if len(set(main)) < 3 or not (np.abs(cosines).max(0) >= CLEAR).all():
        return ""
    return "".join(("LR", "PA", "IS")[row][int(cosines[row, i] > 0)] for i, row in enumerate(main))


def _apart(reader: type, files: Sequence[str], spacing: Sequence[float]) -> list[float]:
    """By how many mm each file of a case lies off the grid of the first, by the headers; 0 where it does not,
    or where no header tells."""
    corners = [_corners(reader, file) for file in files] if len(files) > 1 else []
    distances = [0.0] * len(files)
    for index, (first, other) in enumerate(zip(corners[:1] * len(corners), corners, strict=True)):
        if first is None or other is None:
            continue
        apart = np.linalg.norm(first[:, None] - other[None], axis=-1)
        turned = issubclass(reader, (SimpleITKIOWithReorient, NibabelIOWithReorient))
        distance = float((apart.min(1) if turned else apart.diagonal()).max())
        distances[index] = distance if distance > APART * min(spacing) else 0.0
    return distances


def _corners(reader: type, file: str) -> np.ndarray | None:
    """Places of the corner voxels in mm, as the header of a file that `reader` reads gives them."""
    if issubclass(reader, SimpleITKIO):
        header = sitk.ImageFileReader()
        header.SetFileName(file)
        header.ReadImageInformation()
        axes = min(3, header.GetDimension())
        direction = np.reshape(header.GetDirection(), (header.GetDimension(),) * 2)[:axes, :axes]
        matrix, origin = direction * header.GetSpacing()[:axes], header.GetOrigin()[:axes]
        size = header.GetSize()[:axes]
    elif issubclass(reader, (NibabelIO, NibabelIOWithReorient)):
        image: Any = nibabel.load(file)
        matrix, origin, size = image.affine[:3, :3], image.affine[:3, 3], image.shape[:3]
    else:
        return None
    ends = np.array(list(itertools.product(*((0, n - 1) for n in size))))
    return np.asarray(ends @ matrix.T + np.array(origin))


def _hash(array: np.ndarray) -> str:
    content = hashlib.blake2b(repr(array.shape).encode(), digest_size=16)
    for channel in array:
        content.update(np.ascontiguousarray(channel, np.float32).data)
    return content.hexdigest()


def _channel(channel: np.ndarray) -> dict[str, float]:
    flat = channel.ravel()
    lowest, highest = float(flat.min()), float(flat.max())
    sample = flat[:: max(1, flat.size // SAMPLED)].astype(np.float64)
    low, median, high = (float(q) for q in np.percentile(sample, (0.5, 50, 99.5)))
    above = np.count_nonzero(sample > lowest)
    return {
        "min": lowest,
        "low": low,
        "median": median,
        "high": high,
        "max": highest,
        "distinct": int(min(np.unique(sample).size, DISTINCT)),
        "at_max": float(np.count_nonzero(sample == highest) / above) if above else 0.0,
    }


# what the statistics tell


def inspect_scans(measured: Mapping[Scan, Statistics], schemes: Sequence[str] = ()) -> Iterator[Finding]:
    """Files that cannot be used, scans that are there twice, and unlabeled scans unlike the labeled ones.

    schemes  normalization schemes of the plan, one per channel, where there is one
    """
    for scan, statistics in measured.items():
        if "error" in statistics and scan.origin != "imagesTs":
            found = printable(statistics["error"]).removeprefix(f"{printable(scan.files[0])}: ")
            yield Finding(ERROR, scan.files[0], found)
    every = {s: v for s, v in measured.items() if s.origin != "labelsTr" and "error" not in v}
    images = {s: v for s, v in every.items() if s.origin != "imagesTs"}
    yield from _constant(images)
    yield from _off_grid(images)
    yield from _twice(every)
    labeled = [v for s, v in images.items() if s.origin == "imagesTr"]
    usual = Usual(labeled, schemes) if labeled else None
    for scan, statistics in images.items():
        if scan.origin == "imagesUn" and usual and (reasons := usual.unlike(statistics)):
            yield Finding(
                WARNING,
                scan.files[0],
                f"unlike the labeled scans: {'; '.join(reasons)}",
                remedy="Correct or remove the scan unless it is meant to be there",
            )


def _constant(images: Mapping[Scan, Statistics]) -> Iterator[Finding]:
    for scan, statistics in images.items():
        constant = [i for i, c in enumerate(statistics["channels"]) if c["min"] == c["max"]]
        if len(constant) == len(statistics["channels"]):
            yield Finding(ERROR, scan.files[0], "all voxels have the same value", remedy="Remove the scan")
        elif constant:
            names = ", ".join(map(str, constant))
            yield Finding(WARNING, scan.files[0], f"channel {names}: all voxels have the same value")


def _off_grid(images: Mapping[Scan, Statistics]) -> Iterator[Finding]:
    for scan, statistics in images.items():
        for file, distance in zip(scan.files, statistics.get("apart", ()), strict=False):
            if distance:
                yield Finding(
                    WARNING,
                    file,
                    f"up to {distance:.3g} mm off the grid of {basename(scan.files[0])}, by their headers",
                    "one grid for all channels of a case, for nnU-Net stacks them voxel by voxel",
                    "Resample the file onto that grid, or correct the header that is wrong",
                )


def _twice(images: Mapping[Scan, Statistics]) -> Iterator[Finding]:
    first: dict[str, Scan] = {}
    for scan in sorted(images, key=lambda scan: scan.origin):  # labeled, tested, unlabeled
        other = first.setdefault(images[scan]["hash"], scan)
        if other is scan or scan.origin == "imagesTs":
            continue
        if other.origin == "imagesTs":
            remedy = "Remove it here: a test on scans that were trained on flatters"
            yield Finding(
                WARNING, scan.files[0], f"the same image as {other.name} in imagesTs", remedy=remedy
            )
            continue
        what = "labeled scan" if other.origin == "imagesTr" else "scan"
        yield Finding(
            WARNING,
            scan.files[0],
            f"the same image as the {what} {other.name} ({other.origin})",
            remedy="Remove one of them: a validation case among the unlabeled scans is not unseen"
            if other.origin != scan.origin
            else "Remove one of them",
        )


class Usual:
    """What the labeled scans are like.

    schemes  normalization schemes of the plan, one per channel
    """

    def __init__(self, labeled: Sequence[Statistics], schemes: Sequence[str] = ()) -> None:
        self.schemes = schemes
        self.tolerance = 1.0 if len(labeled) >= ENOUGH else 2.0
        self.shapes, self.spacings = (np.array([v[key] for v in labeled]) for key in ("shape", "spacing"))
        self.extents = self.shapes * self.spacings
        self.axes = {v.get("axes", "") for v in labeled}
        columns = zip(*(map(_described, v["channels"]) for v in labeled), strict=True)
        self.bounds = [
            {key: (min(c[key] for c in column), max(c[key] for c in column)) for key in column[0]}
            for column in columns
        ]

    def unlike(self, statistics: Statistics) -> list[str]:
        """How a scan differs from all labeled ones; empty where it is like them."""
        reasons = list(self._geometry(statistics))
        several = len(statistics["channels"]) > 1
        for index, (channel, bounds) in enumerate(zip(statistics["channels"], self.bounds, strict=True)):
            if channel["min"] == channel["max"]:
                continue  # told by itself
            scheme = self.schemes[index] if index < len(self.schemes) else ""
            prefix = f"channel {index}: " if several else ""
            reasons += [prefix + r for r in self._intensities(_described(channel), bounds, scheme)]
        return reasons

    def _geometry(self, statistics: Statistics) -> Iterator[str]:
        shape, spacing = np.array(statistics["shape"]), np.array(statistics["spacing"])
        flat = (shape == 1) & (self.shapes.min(0) > 1)
        if flat.any():
            found = f"shape {_numbers(shape)}; labeled {_range(self.shapes)}"
            yield f"a single slice ({found}): a scout or localizer?"
        if self._beyond(spacing, self.spacings, SPACING):
            ratio = float(np.median(np.median(self.spacings, 0) / spacing))
            units = {1000: "metres", 10: "centimetres", 0.001: "micrometres"}
            guess = next((f": in {unit}?" for f, unit in units.items() if 0.5 < ratio / f < 2), "")
            yield f"spacing {_numbers(spacing)} (labeled {_range(self.spacings)}){guess}"
        if not flat.any() and self._beyond(shape * spacing, self.extents, EXTENT):
            yield f"field of view {_numbers(shape * spacing)} mm (labeled {_range(self.extents)})"
        axes = statistics.get("axes", "")
        if axes and "" not in self.axes and axes not in self.axes:
            found = f"axes {axes} (labeled {', '.join(sorted(self.axes))})"
            yield f"{found}: stored flipped or turned, and the reader does not turn it back"

    def _beyond(self, values: np.ndarray, others: np.ndarray, factor: float) -> bool:
        factor *= self.tolerance
        return bool(((values < others.min(0) / factor) | (values > others.max(0) * factor)).any())

    def _intensities(
        self, channel: Mapping[str, float], labeled: Mapping[str, tuple[float, float]], scheme: str
    ) -> Iterator[str]:
        low, high, width = labeled["low"][0], labeled["high"][1], labeled["width"]
        factor = INTENSITIES * self.tolerance
        negative = channel["below"] > max(0.1, VALUES * labeled["below"][1])
        positive = labeled["below"][0] > max(0.1, VALUES * channel["below"])
        outside = channel["low"] > high or channel["high"] < low
        scaled = channel["width"] > factor * max(width[1], high - low) or channel["width"] < width[0] / factor
        if negative or positive or (scheme in ABSOLUTE and (outside or scaled)):
            found = f"intensities {channel['low']:.4g} to {channel['high']:.4g}"
            guess = ": another modality or unit?" * (negative or positive)
            yield f"{found} (labeled {low:.4g} to {high:.4g}){guess}"
        if channel["extreme"] > max(EXTREME, VALUES * labeled["extreme"][1]):
            yield f"extreme values, {channel['min']:.4g} to {channel['max']:.4g}"
        if channel["at_max"] > max(SATURATED, VALUES * labeled["at_max"][1]):
            yield f"saturated, {channel['at_max']:.0%} of the voxels have the highest value"
        fewest, number = labeled["distinct"][0], channel["distinct"]
        if number < fewest / (VALUES * self.tolerance) or number <= FEW < fewest / 2:
            guess = ": a label map?" * (number <= FEW)
            yield f"{number:.0f} distinct values (labeled at least {fewest:.0f}){guess}"


def _described(channel: Mapping[str, float]) -> dict[str, float]:
    """A channel's statistics, and how wide its range is, which share of it lies below zero (a third or more
    in CT, none in MR), and how far the extremes lie outside of it."""
    low, high = channel["low"], channel["high"]
    width = high - low
    outside = max(channel["max"] - high, low - channel["min"])
    return {
        **channel,
        "width": width,
        "below": min(1.0, max(0.0, -low / width)) if width > 0 else float(low < 0),
        "extreme": outside / width if width > 0 else math.inf if outside > 0 else 0.0,
    }


def _numbers(values: np.ndarray) -> str:
    return " x ".join(f"{v:.4g}" for v in values)


def _range(values: np.ndarray) -> str:
    low, high = values.min(0), values.max(0)
    return _numbers(low) if np.allclose(low, high) else f"{_numbers(low)} to {_numbers(high)}"


def inspect_labels(measured: Mapping[Scan, Statistics], declared: set[int]) -> Iterator[Finding]:
    """Label maps against dataset.json and against their images."""
    images = {s.name: v for s, v in measured.items() if s.origin == "imagesTr" and "error" not in v}
    labels = {s: v for s, v in measured.items() if s.origin == "labelsTr" and "error" not in v}
    all_empty = bool(labels) and all(v["values"] == [0.0] for v in labels.values())
    if all_empty:
        yield Finding(
            ERROR,
            dirname(next(iter(labels)).files[0]),
            f"all {len(labels)} label maps are empty: every voxel is background",
            "voxels of the classes in dataset.json",
            "Export them anew",
        )
    for scan, statistics in labels.items():
        file = scan.files[0]
        if problem := label_problem(statistics["values"], declared):
            yield Finding(ERROR, file, problem, _declared(declared), LABEL_REMEDY)
        elif statistics["values"] == [0.0] and not all_empty:
            yield Finding(WARNING, file, "empty: all voxels are background")
        image = images.get(scan.name)
        if image and image["shape"] != statistics["shape"]:
            yield Finding(
                ERROR,
                file,
                f"shape {_numbers(np.array(statistics['shape']))}",
                f"{_numbers(np.array(image['shape']))}, that of the image",
                "Resample the label map onto the grid of its image",
            )
        elif (
            image
            and image["position"]
            and not all(_close(image[key], statistics[key]) for key in ("spacing", "position"))
        ):
            yield Finding(
                WARNING,
                file,
                OFF_GRID,
                remedy="nnU-Net ignores those of the label map; make sure that both lie on one grid",
            )


def _declared(declared: set[int]) -> str:
    return f"{listed([str(v) for v in sorted(declared)])} (labels in dataset.json)"


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) != len(b) or bool(np.allclose(a, b, rtol=1e-3, atol=1e-3))
