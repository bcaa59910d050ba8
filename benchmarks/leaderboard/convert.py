"""`convert`: the papers' public data sets -> nnU-Net raw datasets, in the order of the papers' lists.

Cases are renamed <PREFIX>_001, ... so that the name order is the order of the training list, then that of the
test list: the first n are the papers' labeled cases, the last ones their test scans. `cases.json` keeps the
old names. The dataset appears whole or not at all.

| name | source (below --source) | dataset | train + test | labeled in the papers |
|---|---|---|---|---|
| la_h5 | UA-MT's `<case>/mri_norm2.h5` | Dataset511_LA | 80 + 20 | 4, 8, 16 |
| la_nrrd | the challenge's `<case>/lgemri.nrrd`, `laendo.nrrd` | Dataset511_LA | 80 + 20 | 4, 8, 16 |
| pancreas_h5 | `<case>_norm.h5` or `<case>.h5` | Dataset512_Pancreas | 62 + 20 | 6, 12 |
| pancreas_dicom | NIH's `PANCREAS_0001/**/*.dcm`, label0001.nii.gz | Dataset512_Pancreas | 62 + 20 | 6, 12 |
| brats19_h5 | SSL4MIS's `<case>.h5` | Dataset513_BraTS19 | 250 + 60 | 25, 50 |
| acdc_h5 | SSL4MIS's volumes `patient001_frame01.h5` | Dataset514_ACDC | 140 + 40 | 6, 14 |

BraTS19: the 25 validation scans are left out. ACDC: two volumes per patient; 10 patients are left out.
The papers' preparation uses labels: LA and pancreas are cropped around the structure, test scans included.
Whoever compares with their figures needs the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnssl.files import scratch_folder, write_json

LA_PATCH, LA_MARGIN = 112, 15  # in plane; the public code draws margins of 10 to 20 at random
PANCREAS_WINDOW, PANCREAS_MARGIN = (-125.0, 275.0), 25  # HU; voxels of 1 mm
SOFT_TISSUE = (-50.0, 250.0)  # HU: where the mean of a pancreas must lie
Volume = tuple[np.ndarray, np.ndarray, Sequence[float]]  # image and label (D, H, W), spacing (x, y, z) in mm


@dataclass(frozen=True)
class Format:
    """One converter: `read` finds and prepares a case by the name that the list has."""

    dataset: str
    prefix: str
    labels: tuple[str, ...]
    lists: tuple[str, str]  # of the training and of the test cases
    read: Callable[[Path, str], Volume]
    channel: str = "MRI"  # nnU-Net normalises each scan by itself


def convert(name: str, source: Path, raw: Path, lists: Path | None = None) -> Path:
    """Write the dataset of converter `name` below `raw`; returns its folder. ValueError where something is
    missing."""
    if name not in FORMATS:
        raise ValueError(f"no converter {name!r}; there are {', '.join(FORMATS)}")
    form = FORMATS[name]
    folder = raw / form.dataset
    if folder.exists():
        raise ValueError(f"{folder} already exists: remove it to convert again")
    names = [case for file in form.lists for case in read_list(lists or source, file)]
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(form.lists)}: a case stands in them twice")
    raw.mkdir(parents=True, exist_ok=True)
    with scratch_folder(raw) as scratch:
        partial = Path(scratch, folder.name)
        for part in ("imagesTr", "labelsTr"):
            (partial / part).mkdir(parents=True)
        renamed = {}
        for number, case in enumerate(tqdm(names, desc=name, unit="case"), 1):
            image, label, spacing = form.read(source, case)
            if image.shape != label.shape or label.max() > len(form.labels):
                raise ValueError(
                    f"{case}: image {image.shape}, label {label.shape} with values to {label.max()}; "
                    f"expected {form.labels}"
                )
            new = renamed[case] = f"{form.prefix}_{number:03d}"
            for array, path in (
                (image.astype(np.float32), f"imagesTr/{new}_0000"),
                (label.astype(np.uint8), f"labelsTr/{new}"),
            ):
                picture = sitk.GetImageFromArray(array)
                picture.SetSpacing([float(s) for s in spacing])
                sitk.WriteImage(picture, str(partial / f"{path}.nii.gz"), useCompression=True)
        labels = {"background": 0, **{label: k for k, label in enumerate(form.labels, 1)}}
        content = {
            "channel_names": {"0": form.channel},
            "labels": labels,
            "numTraining": len(names),
            "file_ending": ".nii.gz",
        }
        write_json(content, partial / "dataset.json", indent=1)
        write_json(renamed, partial / "cases.json", indent=1)
        os.replace(partial, folder)
    return folder


def read_list(folder: Path, name: str) -> list[str]:
    """Case names of one of the papers' lists, in its order; a file of this name anywhere below `folder`."""
    path = find(folder, name)
    return [
        line.strip().split(",")[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]


def find(folder: Path, *patterns: str) -> Path:
    """The one file or folder below `folder` that has one of these names; ValueError if there is none, or more
    than one."""
    for pattern in patterns:
        if (folder / pattern).exists():
            return folder / pattern
        found = sorted(folder.rglob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{pattern} is below {folder} more than once: {found[0]}, {found[1]}")
    raise ValueError(f"{' or '.join(patterns)} not found in {folder} or its subfolders")


def read_h5(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The datasets `image` and `label`."""
    import h5py

    with h5py.File(path, "r") as file:
        if absent := {"image", "label"} - set(file):
            raise ValueError(f"{path} has no dataset {', '.join(sorted(absent))}; it has {', '.join(file)}")
        return np.asarray(file["image"]), np.asarray(file["label"])


def la_h5(source: Path, case: str) -> Volume:
    """(x, y, z), 0.625 mm, cropped around the atrium and normalised by UA-MT's authors."""
    image, label = read_h5(find(source, case) / "mri_norm2.h5")
    return image.transpose(2, 1, 0), (label > 0).transpose(2, 1, 0), (0.625,) * 3


def la_nrrd(source: Path, case: str) -> Volume:
    """The challenge's own files, prepared as UA-MT's, but with the middle of its random margins: no two runs
    differ.

    The crop is in plane only: the public code computes a box in z too, but keeps all slices.
    """
    folder = find(source, case)
    scan, mask = (sitk.ReadImage(str(folder / f"{name}.nrrd")) for name in ("lgemri", "laendo"))
    image, label = sitk.GetArrayFromImage(scan).astype(np.float32), sitk.GetArrayFromImage(mask) > 0
    if not label.any():
        raise ValueError(f"{folder / 'laendo.nrrd'} is empty")
    box = [slice(None)]
    for indices, size in zip(np.nonzero(label)[1:], label.shape[1:], strict=True):
        low, high = int(indices.min()), int(indices.max())
        pad = LA_MARGIN + max(LA_PATCH - (high - low), 0) // 2
        box.append(slice(max(low - pad, 0), min(high + pad, size)))
    image = (image - image.mean()) / image.std()
    return image[tuple(box)], label[tuple(box)], scan.GetSpacing()


def pancreas_h5(source: Path, case: str) -> Volume:
    """(x, y, z), 1 mm, windowed, cropped and normalised by its authors."""
    image, label = read_h5(find(source, f"{case}_norm.h5", f"{case}.h5"))
    return image.transpose(2, 1, 0), (label > 0).transpose(2, 1, 0), (1.0,) * 3


def pancreas_dicom(source: Path, case: str) -> Volume:
    """NIH's series and label: window [-125, 275] HU, 1 mm, crop 25 voxels around the label, zero mean and
    unit variance.

    `case` ends in the number (`image0001`, `PANCREAS_0001`). Both files are brought to the same orientation
    by their own headers; a label that then does not lie on soft tissue is an error, not a guess.
    """
    number = case[-4:]
    folder = find(source, f"PANCREAS_{number}")
    series = {path.parent for path in folder.rglob("*.dcm")}
    if len(series) != 1:
        raise ValueError(f"{folder}: expected one folder of .dcm files, found {len(series)}")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series.pop())))
    scan = sitk.DICOMOrient(reader.Execute(), "LPS")
    mask = sitk.DICOMOrient(
        sitk.ReadImage(str(find(source, f"label{number}.nii.gz", f"label{number}.nii"))), "LPS"
    )
    if scan.GetSize() != mask.GetSize():
        raise ValueError(f"{case}: the scan has {scan.GetSize()} voxels, its label {mask.GetSize()}")
    mask.CopyInformation(scan)  # origins of the labels are not those of the scans
    inside = sitk.GetArrayViewFromImage(scan)[sitk.GetArrayViewFromImage(mask) > 0]
    if not len(inside) or not SOFT_TISSUE[0] <= inside.mean() <= SOFT_TISSUE[1]:
        mean = f"{inside.mean():.0f} HU" if len(inside) else "nowhere"
        raise ValueError(
            f"{case}: the label lies on {mean}, a pancreas does not: check the orientation in the label's "
            "header"
        )
    size = [max(1, round(n * s)) for n, s in zip(scan.GetSize(), scan.GetSpacing(), strict=True)]
    image, label = (
        sitk.GetArrayFromImage(
            sitk.Resample(
                picture, size, sitk.Transform(), how, scan.GetOrigin(), (1.0,) * 3, scan.GetDirection(), fill
            )
        )
        for picture, how, fill in (
            (sitk.Cast(scan, sitk.sitkFloat32), sitk.sitkLinear, -1000.0),
            (mask, sitk.sitkNearestNeighbor, 0),
        )
    )
    lows, highs = ([int(f(i)) for i in np.nonzero(label)] for f in (np.min, np.max))
    box = tuple(
        slice(max(0, a - PANCREAS_MARGIN), b + PANCREAS_MARGIN + 1) for a, b in zip(lows, highs, strict=True)
    )
    image = np.clip(image[box], *PANCREAS_WINDOW)
    return (image - image.mean()) / max(float(image.std()), 1e-6), label[box] > 0, (1.0,) * 3


def brats19_h5(source: Path, case: str) -> Volume:
    """(x, y, z) FLAIR, 1 mm; the papers segment the whole tumour: any label."""
    image, label = read_h5(find(source, f"{case}.h5"))
    return image.transpose(2, 1, 0), (label > 0).transpose(2, 1, 0), (1.0,) * 3


def acdc_h5(source: Path, case: str) -> Volume:
    """(slice, y, x); the files tell no spacing, so the table's distances in mm are those in voxels."""
    image, label = read_h5(find(source, f"{case}.h5"))
    return image, label, (1.0,) * 3


FORMATS = {
    "la_h5": Format("Dataset511_LA", "LA", ("left_atrium",), ("train.list", "test.list"), la_h5),
    "la_nrrd": Format("Dataset511_LA", "LA", ("left_atrium",), ("train.list", "test.list"), la_nrrd),
    "pancreas_h5": Format(
        "Dataset512_Pancreas", "PANCREAS", ("pancreas",), ("train.list", "test.list"), pancreas_h5
    ),
    "pancreas_dicom": Format(
        "Dataset512_Pancreas", "PANCREAS", ("pancreas",), ("train.list", "test.list"), pancreas_dicom
    ),
    "brats19_h5": Format("Dataset513_BraTS19", "BRATS", ("tumour",), ("train.txt", "test.txt"), brats19_h5),
    "acdc_h5": Format(
        "Dataset514_ACDC",
        "ACDC",
        ("right_ventricle", "myocardium", "left_ventricle"),
        ("train.list", "test.list"),
        acdc_h5,
    ),
}
