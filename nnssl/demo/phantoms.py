"""Synthetic 3D scans of one anatomy: data for the demo and the tests, of any number and grid, from a seed.

A scan is a body with an `organ` (a large ellipsoid, smoothly deformed) and a `lesion` (smaller, brighter, in
the organ's rim), among distractors as bright as either and dark cavities. Shape, contrast, position, grid and
spacing vary from case to case; partial volume, blur, a bias field and Rician noise lie on top. Geometry is in
mm, arrays are (D, H, W), coordinates (z, y, x).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from scipy.interpolate import CubicSpline
from tqdm import tqdm

from nnssl.files import scratch_folder, write_json

LABELS = {"background": 0, "organ": 1, "lesion": 2}
FIELD_OF_VIEW_MM = (72.0, 96.0, 96.0)
SPACING_MM = (3.6, 2.6, 2.6)
_SUPERSAMPLING = 2  # per axis: partial volume comes from averaging these


@dataclass(frozen=True)
class Phantom:
    """One scan: `image` (D, H, W) int16, `labels` (D, H, W) uint8 with the values of `LABELS`, `spacing` (z,
    y, x) in mm."""

    image: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, float, float]


def smooth_field(rng: np.random.Generator, shape: Sequence[int], knots: int) -> np.ndarray:
    """Random field (D, H, W) float32 of standard deviation about 1, cubic between `knots` normal values per
    axis."""
    field = rng.standard_normal((knots,) * len(shape))
    for n in (
        shape
    ):  # the first axis is interpolated and goes last, so that after all of them the order is the old one
        weights = CubicSpline(np.arange(knots), np.eye(knots))(np.linspace(0, knots - 1, n))  # (n, knots)
        field = np.tensordot(field, weights, axes=(0, 1))
    field = field.astype(np.float32)
    return field / max(float(field.std()), 1e-6)


def _rotation(rng: np.random.Generator, degrees: float) -> np.ndarray:
    """Random rotation (3, 3): Rodrigues' formula about a random axis, angle normal with this standard
    deviation."""
    axis = rng.standard_normal(3)
    x, y, z = axis / np.linalg.norm(axis)
    angle = np.deg2rad(degrees) * rng.standard_normal()
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def _inside(points: np.ndarray, centre: np.ndarray, radii: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Mask (D, H, W) of an ellipsoid: `points` (3, D, H, W), `centre` and `radii` in mm."""
    local = np.tensordot(rotation, points - centre.reshape(3, 1, 1, 1), axes=1)
    return (np.square(local / radii.astype(np.float32).reshape(3, 1, 1, 1))).sum(0) <= 1


def make_phantom(rng: np.random.Generator, spacing: Sequence[float] = SPACING_MM) -> Phantom:
    """Draw one scan with about this `spacing` (z, y, x) in mm; field of view and spacing vary by a few per
    cent."""
    voxel = np.asarray(spacing) * rng.uniform(0.95, 1.05, 3)
    shape = np.maximum(4, np.round(np.asarray(FIELD_OF_VIEW_MM) * rng.uniform(0.94, 1.06, 3) / voxel)).astype(
        int
    )
    fine = tuple(int(n) * _SUPERSAMPLING for n in shape)
    axes = [(np.arange(n) + 0.5 - n / 2) * v / _SUPERSAMPLING for n, v in zip(fine, voxel, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    warped = points + np.stack([rng.uniform(1.5, 3.0) * smooth_field(rng, fine, 4) for _ in range(3)])

    turn = _rotation(rng, 15)
    centre = rng.normal((0, 3, 0), (3, 5, 5))
    radii = np.array([17, 23, 17]) * rng.uniform(0.8, 1.25, 3)
    organ = _inside(warped, centre, radii, turn)
    # the lesion's place in the organ's own frame: the upper front rim, jittered, so that position helps but
    # does not decide
    direction = np.array([0.6, -0.55, 0.3]) + rng.normal(0, 0.25, 3)
    spot = centre + turn.T @ (radii * direction / np.linalg.norm(direction) * rng.uniform(0.75, 1.0))
    lesion = _inside(warped, spot, np.array([9, 11, 9]) * rng.uniform(0.8, 1.25, 3), _rotation(rng, 60))

    body = _inside(warped, np.zeros(3), np.array([40, 46, 42]) * rng.uniform(0.9, 1.1, 3), np.eye(3))
    organ_level = 0.62 + 0.05 * rng.standard_normal()
    lesion_level = organ_level + rng.uniform(0.28, 0.45)
    scan = np.where(body, 0.4, 0.03) + 0.05 * smooth_field(rng, fine, 7) * body
    for level, count, reach, small, large in (
        (organ_level, 4, 38, 4, 9),
        (lesion_level, 5, 40, 3, 7),
        (0.2, 2, 36, 4, 8),
    ):
        for _ in range(count):
            away = rng.standard_normal(3)
            at = away / np.linalg.norm(away) * rng.uniform(0.7, 1.0) * reach
            blob = _inside(warped, at, rng.uniform(small, large, 3), _rotation(rng, 90))
            scan[blob & body] = level + 0.04 * rng.standard_normal()
    texture = 0.03 * smooth_field(rng, fine, 16)
    scan = np.where(organ, organ_level + texture, scan)
    scan = np.where(lesion, lesion_level + texture, scan)

    labels = np.where(lesion, 2, organ.astype(np.uint8))
    blocks = tuple(np.stack([shape, np.full(3, _SUPERSAMPLING)], axis=1).ravel())
    share = np.stack([(labels == k).reshape(blocks).mean((1, 3, 5)) for k in LABELS.values()])
    blurred = ndimage.gaussian_filter(scan, rng.uniform(0.5, 0.9) * _SUPERSAMPLING)
    signal = blurred.reshape(blocks).mean((1, 3, 5))
    signal = np.clip(signal, 0, None) ** rng.uniform(0.8, 1.25) * np.exp(
        rng.uniform(0.1, 0.25) * smooth_field(rng, signal.shape, 3)
    )
    noise = rng.uniform(0.04, 0.09) * rng.standard_normal((2, *signal.shape))
    magnitude = np.hypot(signal + noise[0], noise[1])
    image = np.clip(np.round(rng.uniform(300, 900) * magnitude), 0, 32767).astype(np.int16)
    return Phantom(
        image, share.argmax(0).astype(np.uint8), (float(voxel[0]), float(voxel[1]), float(voxel[2]))
    )


def _save(array: np.ndarray, spacing: tuple[float, float, float], path: Path) -> None:
    picture = sitk.GetImageFromArray(array)
    picture.SetSpacing(spacing[::-1])
    sitk.WriteImage(picture, str(path), useCompression=True)


def write_dataset(
    folder: str | os.PathLike[str],
    labeled: int = 6,
    unlabeled: int = 24,
    test: int = 6,
    seed: int = 0,
    spacing: Sequence[float] = SPACING_MM,
    progress: bool = False,
) -> Path:
    """Write an nnU-Net raw dataset: `imagesTr` + `labelsTr`, `imagesUn` (nobody labeled these), `imagesTs` +
    `labelsTs`, `dataset.json`.

    A case depends on `seed`, its folder and its number alone: more cases never change the earlier ones.
    `folder` appears whole or not at all. Raises ValueError where `folder` exists or a count is negative, or
    zero for `labeled`.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} already exists: choose another folder, or remove it first")
    if labeled < 1 or unlabeled < 0 or test < 0:
        raise ValueError(
            f"found labeled={labeled}, unlabeled={unlabeled}, test={test}; expected labeled >= 1 and no "
            "negative count"
        )
    parts = [("Tr", "train", labeled), ("Un", "unlabeled", unlabeled), ("Ts", "test", test)]
    todo = [
        (part, k, suffix, name, n)
        for part, (suffix, name, count) in enumerate(parts)
        for k, n in enumerate(range(1, count + 1))
    ]
    dataset = {
        "channel_names": {"0": "MRI"},
        "labels": LABELS,
        "numTraining": labeled,
        "file_ending": ".nii.gz",
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent) as scratch:
        partial = Path(scratch, folder.name)
        for part, k, suffix, name, n in tqdm(todo, desc="phantoms", unit="scan", disable=not progress):
            phantom = make_phantom(np.random.default_rng([seed, part, k]), spacing)
            images, labels = partial / f"images{suffix}", partial / f"labels{suffix}"
            images.mkdir(parents=True, exist_ok=True)
            _save(phantom.image, phantom.spacing, images / f"{name}_{n:03d}_0000.nii.gz")
            if suffix != "Un":
                labels.mkdir(parents=True, exist_ok=True)
                _save(phantom.labels, phantom.spacing, labels / f"{name}_{n:03d}.nii.gz")
        write_json(dataset, partial / "dataset.json")
        os.replace(partial, folder)
    return folder
