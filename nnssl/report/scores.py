"""Scores of validation cases against their labels, and paired differences between models."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnssl.data.structures import mask_of, structures
from nnssl.files import read_json
from nnssl.metrics import interval, overlap, surface_distances
from nnssl.report.runs import Run

FEWEST = 5  # cases that a verdict takes
MEAN = "mean of all"  # the pseudo-structure of a case's mean


class Metric(NamedTuple):
    """name and unit as shown; digits; whether more is better."""

    name: str
    unit: str
    digits: int
    higher: bool


METRICS = {
    "dice": Metric("Dice", "", 3, True),
    "jaccard": Metric("Jaccard", "", 3, True),
    "hd95": Metric("95HD", "mm", 2, False),
    "asd": Metric("ASD", "mm", 2, False),
}


class Key(NamedTuple):
    """A validation case; each fold has its own."""

    fold: str
    case: str


Values = dict[str, float]  # by metric


@dataclass(frozen=True)
class Scores:
    """values: {model: {case: {structure: {metric: value}}}}, the same cases of every model.

    notes: sentences about what was left out and why.
    """

    structures: tuple[str, ...]
    models: tuple[str, ...]
    values: dict[str, dict[Key, dict[str, Values]]]
    notes: tuple[str, ...]

    @property
    def cases(self) -> list[Key]:
        return list(next(iter(self.values.values()), {}))

    def rows(self) -> tuple[str, ...]:
        """The structures, and their mean where there are several."""
        return (*self.structures, MEAN) if len(self.structures) > 1 else self.structures

    def column(self, model: str, structure: str, metric: str) -> np.ndarray:
        """A value per case, NaN where it is not scored; of `MEAN` the mean over a case's structures."""
        cases = self.values[model].values()
        if structure != MEAN:
            return np.array([case[structure][metric] for case in cases], float)
        return np.array([mean([case[s][metric] for s in self.structures]) for case in cases], float)

    def difference(self, model: str, reference: str, structure: str, metric: str) -> Difference | None:
        """Model minus reference over the cases that one has a value of; None where there are none. Who
        rightly finds nothing where the other invents a structure has the best value there is."""
        gap = np.array([self._gap(case, model, reference, structure, metric) for case in self.cases], float)
        gap = gap[np.isfinite(gap)]
        if not len(gap):
            return None
        low, high = interval(gap)
        return Difference(float(gap.mean()), low, high, len(gap))

    def _gap(self, case: Key, model: str, reference: str, structure: str, metric: str) -> float:
        best = 1.0 if METRICS[metric].higher else 0.0
        gaps = []
        for one in self.structures if structure == MEAN else (structure,):
            ours, theirs = (self.values[m][case][one][metric] for m in (model, reference))
            if math.isnan(ours) != math.isnan(theirs):
                ours, theirs = (best if math.isnan(v) else v for v in (ours, theirs))
            gaps.append(ours - theirs)
        return mean(gaps)


class Difference(NamedTuple):
    """Mean of paired differences, its bootstrap interval, and the number of cases."""

    mean: float
    low: float
    high: float
    cases: int

    def verdict(self, higher_is_better: bool) -> str:
        """`better`, `worse`, `no clear difference` where the interval holds 0, or `too few cases`."""
        if self.cases < FEWEST:
            return "too few cases"
        if self.low <= 0 <= self.high:
            return "no clear difference"
        return "better" if (self.mean > 0) == higher_is_better else "worse"


def mean(values: Sequence[float]) -> float:
    """Of those that are scored."""
    kept = [v for v in values if math.isfinite(v)]
    return sum(kept) / len(kept) if kept else math.nan


def score_runs(runs: Sequence[Run]) -> Scores:
    """Score what every model has predicted of its final validation."""
    models = tuple(dict.fromkeys(run.model for run in runs))
    found = structures(runs[0].dataset_json)
    predicted: dict[str, dict[Key, Path]] = {model: {} for model in models}
    for run in runs:
        predicted[run.model] |= {Key(run.fold, case): path for case, path in run.predictions.items()}
    common = [key for key in predicted[models[0]] if all(key in predicted[m] for m in models)]
    notes = []
    for run in runs:
        if not run.validated:
            count = f"{len(run.predictions)} cases are predicted" if run.predictions else "nothing is there"
            notes.append(f"{run.model}, fold {run.fold}: the final validation is not complete, {count}.")
    if extra := sorted({key.case for m in models for key in predicted[m]} - {k.case for k in common}):
        shown = ", ".join(extra[:8]) + (" ..." if len(extra) > 8 else "")
        notes.append(f"{len(extra)} cases are left out, not every trainer has predicted them: {shown}.")
    values: dict[str, dict[Key, dict[str, Values]]] = {model: {} for model in models}
    places = {run.fold: truth_folder(run) for run in runs}
    for key in common:
        place = places[key.fold]
        truth_file = place / predicted[models[0]][key].name if place else None
        if truth_file is None or not truth_file.is_file():
            notes.append(
                f"{key.case}: no label at {truth_file or 'gt_segmentations'}; set nnUNet_preprocessed."
            )
            continue
        try:
            arrays = {m: read_labels(predicted[m][key], runs[0].dataset_json)[0] for m in models}
            truth, spacing = read_labels(truth_file, runs[0].dataset_json)
        except Exception as error:  # readers raise what they like on a file that is being written
            notes.append(f"{key.case} cannot be read and is left out: {error}")
            continue
        if other := [array.shape for array in arrays.values() if array.shape != truth.shape]:
            found_shape, expected = (" x ".join(map(str, shape)) for shape in (other[0], truth.shape))
            notes.append(
                f"{key.case} is left out: its prediction has {found_shape} voxels, its label {truth_file} "
                f"{expected}; the label changed since it was predicted."
            )
            continue
        ignored = runs[0].dataset_json["labels"].get("ignore")
        known = None if ignored is None else truth != ignored
        for model, array in arrays.items():
            values[model][key] = score_case(array, truth, spacing, found, known)
    return Scores(tuple(found), models, values, tuple(notes))


def score_case(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float],
    found: dict[str, tuple[int, ...]],
    known: np.ndarray | None = None,
) -> dict[str, Values]:
    """{structure: {metric: value}}, NaN where neither has the structure. known: voxels that count."""
    result = {}
    # a picture has a surface in its plane alone
    extended = [step for step, size in zip(spacing, truth.shape, strict=True) if size > 1]
    for name, labels in found.items():
        p, t = (mask_of(array, labels) for array in (prediction, truth))
        if known is not None:
            p, t = p & known, t & known
        dice, jaccard = overlap(p, t)
        distances = surface_distances(p.squeeze(), t.squeeze(), [extended])[0]
        result[name] = {"dice": dice, "jaccard": jaccard, "hd95": distances.hd95, "asd": distances.asd}
    return result


def truth_folder(run: Run) -> Path | None:
    """Where nnU-Net keeps the labels that it validates against."""
    from nnunetv2.paths import nnUNet_preprocessed

    if nnUNet_preprocessed.is_set():
        folder = Path(str(nnUNet_preprocessed)) / run.dataset / "gt_segmentations"
        if folder.is_dir():
            return folder
    summary = run.folder / "validation" / "summary.json"
    if summary.is_file():
        for case in read_json(summary).get("metric_per_case", []):
            return Path(case["reference_file"]).parent
    return None


def read_labels(path: str | os.PathLike[str], dataset_json: dict[str, Any]) -> tuple[np.ndarray, tuple]:
    """Label map (D, H, W) and spacing per axis in mm, with nnU-Net's reader; a 2D picture has D = 1."""
    array, properties = _reader(path, dataset_json).read_seg(str(path))
    return array[0].astype(np.int32), tuple(float(s) for s in properties["spacing"])


def read_image(path: str | os.PathLike[str], dataset_json: dict[str, Any]) -> np.ndarray:
    """First channel (D, H, W)."""
    array, _ = _reader(path, dataset_json).read_images((str(path),))
    return array[0]


def _reader(path: str | os.PathLike[str], dataset_json: dict[str, Any]) -> Any:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    return determine_reader_writer_from_dataset_json(dataset_json, str(path), verbose=False)()
