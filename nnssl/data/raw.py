"""The raw side of a dataset: which files belong to which case, and reading them without silent damage.

SimpleITK reads a truncated NIfTI file without complaint, with zeros for the missing end, and NaN as zero;
other readers hand NaN on, and nnU-Net normalises it into a volume of NaN. `CheckedPlans` is nnU-Net's plan
with a reader that refuses such files and names them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from os.path import abspath, expandvars, isdir, join
from typing import Any

import numpy as np
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.data.formats import SourceError, inspect_file, kind_of, nifti_problem, not_finite
from nnssl.datasets import plans_of

MOST_VOXELS = 2**31  # after resampling
NO_DATA = 1e15  # magnitude that no scanner gives


def num_channels(dataset_json: Mapping[str, Any]) -> int:
    """Number of input channels that ``dataset.json`` declares."""
    return len(dataset_json["modality"] if "modality" in dataset_json else dataset_json["channel_names"])


def channel_files(folder: str, file_ending: str) -> tuple[dict[str, dict[int, str]], list[str]]:
    """``<case>_<4 digits><file_ending>`` in `folder` as {case: {channel: path}}, and the names with this
    ending that lack the channel."""
    pattern = re.compile(r"(.+)_(\d{4})" + re.escape(file_ending))
    cases: dict[str, dict[int, str]] = {}
    odd = []
    for name in sorted(os.listdir(folder)) if isdir(folder) else []:
        if name.startswith(".") or not name.endswith(file_ending):
            continue
        if match := pattern.fullmatch(name):
            cases.setdefault(match[1], {})[int(match[2])] = join(folder, name)
        else:
            odd.append(name)
    return cases, odd


def training_files(
    raw_dataset_folder: str, dataset_json: Mapping[str, Any]
) -> dict[str, tuple[list[str], str]]:
    """{case: (images, label)} of the labeled part as nnU-Net finds it: ``imagesTr``, or the key ``dataset``
    of dataset.json.

    Only names: nothing is opened. Empty where the raw data are not on this machine.
    """
    if "dataset" in dataset_json:

        def absolute(file: str) -> str:
            return abspath(join(raw_dataset_folder, expandvars(file)))

        entries = dataset_json["dataset"].items()
        return {
            case: ([absolute(image) for image in entry["images"]], absolute(entry["label"]))
            for case, entry in entries
        }
    ending = dataset_json["file_ending"]
    cases, _ = channel_files(join(raw_dataset_folder, "imagesTr"), ending)
    labels = join(raw_dataset_folder, "labelsTr")
    return {
        case: ([files[channel] for channel in sorted(files)], join(labels, case + ending))
        for case, files in cases.items()
    }


def cases_in(folder: str, ending: str) -> list[str]:
    """Sorted names of the cases with a file ``<case><ending>`` in `folder`; hidden files are no cases."""
    names = [name for name in os.listdir(folder) if name.endswith(ending) and not name.startswith(".")]
    return sorted(name.removesuffix(ending) for name in names)


def plans_in(preprocessed_dataset_folder: str) -> str:
    """Names of the plans of a dataset, for messages."""
    return ", ".join(plans_of(preprocessed_dataset_folder)) or "none"


class CheckedPlans(PlansManager):
    """A plan whose reader raises `SourceError` on unreadable or truncated files, non-finite voxels and a
    wrong number of channels.

    images    the image files of one case
    channels  number of channels that these must give together
    strict    look for non-finite voxels in the file itself, too (nnU-Net trains on labeled NIfTI images whose
              NaN were read as zero)
    declared  values that label maps may have; None: any
    spacing   what images are resampled to, of the configuration; None: they are not
    """

    def __init__(
        self,
        plans: dict[str, Any],
        images: Sequence[str],
        channels: int,
        strict: bool,
        declared: Collection[int] | None = None,
        spacing: Sequence[float] | None = None,
    ) -> None:
        super().__init__(plans)
        self.images, self.channels, self.strict = list(images), channels, strict
        self.declared, self.spacing = declared, spacing

    def size_problem(self, data: np.ndarray, properties: Mapping[str, Any]) -> str:
        """What a spacing in another unit makes of an image: no voxels, or more than any memory takes."""
        own = [float(properties["spacing"][axis]) for axis in self.transpose_forward]
        shape = [data.shape[1:][axis] for axis in self.transpose_forward]
        wanted = list(self.spacing or own)
        wanted = wanted if len(wanted) == len(own) else [own[0], *wanted]
        new = [round(n * s / w) for n, s, w in zip(shape, own, wanted, strict=True)]
        if min(new) > 0 and math.prod(new) <= max(MOST_VOXELS, 100 * math.prod(shape)):
            return ""
        found, size = (" x ".join(f"{v:g}" for v in values) for values in (own, new))
        return f"spacing {found} mm: resampled it would have {size} voxels"

    @property
    def image_reader_writer_class(self) -> type:
        case = self
        reader_class: type = super().image_reader_writer_class
        strict = self.strict and issubclass(reader_class, SimpleITKIO)  # the others hand NaN on, see below

        class CheckedReader(reader_class):
            def read_images(self, files: Sequence[str], *args: Any) -> tuple[np.ndarray, dict]:
                if list(files) != case.images:  # some readers read segmentations this way
                    return super().read_images(files, *args)
                data, properties = _read(super().read_images, files, strict)
                if problem := _grid_problem(data, properties):
                    raise SourceError(f"{', '.join(files)}: {problem}. Repair or remove the case.")
                if case.spacing and (problem := case.size_problem(data, properties)):
                    raise SourceError(
                        f"{', '.join(files)}: {problem}. Correct the spacing, or remove the case."
                    )
                if len(data) != case.channels:
                    raise SourceError(
                        f"{', '.join(files)}: {len(data)} channel(s), but dataset.json declares "
                        f"{case.channels}. "
                        "Give every case the same channels, or remove it."
                    )
                if (
                    len(files) == 1 < len(data)
                    and len(properties.get("sitk_stuff", {}).get("spacing", ())) > 3
                ):
                    raise SourceError(  # SimpleITKIO.write_seg fails, at the end of the training
                        f"{files[0]}: {len(data)} volumes in one file, for which nnU-Net can write no "
                        "segmentations. Save every volume in a file of its own: CASE_0000, CASE_0001, ..."
                    )
                finite = np.isfinite(data).reshape(len(data), -1).all(axis=1)
                if not finite.all():
                    per_channel = len(files) == case.channels
                    raise not_finite(
                        [file for file, good in zip(files, finite, strict=True) if not good]
                        if per_channel
                        else files
                    )
                if extreme := _no_data_mark(data):
                    raise SourceError(
                        f"{', '.join(files)}: values of {extreme:.3g}, beside which the others vanish in "
                        "normalisation (a mark for no data?). Replace them by the value of the background."
                    )
                return data, properties

            def read_seg(self, file: str) -> tuple[np.ndarray, dict]:
                read_seg = super().read_seg
                label, properties = _read(lambda files: read_seg(files[0]), [file], True)
                if (channels := _label_channels(label, properties)) != 1:
                    raise SourceError(
                        f"{file}: {channels} channels (one-hot, RGB or layers?); expected one label map with "
                        "a number per voxel. Merge the channels into one, or remove the case."
                    )
                if problem := _grid_problem(label, properties):
                    raise SourceError(f"{file}: {problem}. Repair or remove the case.")
                if case.declared is not None and (problem := label_problem(np.unique(label), case.declared)):
                    declared = ", ".join(map(str, sorted(case.declared)))
                    raise SourceError(
                        f"{file}: {problem}; expected {declared} (labels in dataset.json). {LABEL_REMEDY}."
                    )
                return label, properties

        return CheckedReader


def _label_channels(label: np.ndarray, properties: Mapping[str, Any]) -> int:
    """Of a label map (channels, z, y, x); several values per voxel, which SimpleITK gives last, count too."""
    values_last = len(properties["spacing"]) < label.ndim - 1
    return int(label.shape[-1 if values_last else 0])


LABEL_REMEDY = "Correct the label map, or declare the values in dataset.json"


def label_problem(values: Sequence[float] | np.ndarray, declared: Collection[int]) -> str:
    """What is wrong with the values of a label map; empty where all are declared."""
    undeclared = [float(value) for value in values if value not in declared]
    if not undeclared:
        return ""
    more = f" and {len(undeclared) - 10} more" if len(undeclared) > 10 else ""
    wrong = "not declared" if all(value.is_integer() for value in undeclared) else "no whole numbers"
    return f"values {', '.join(map(_shown, undeclared[:10]))}{more} are {wrong}"


def _shown(value: float) -> str:
    """Short, but never rounded to a whole number."""
    texts = (f"{value:.{digits}g}" for digits in (6, 9, 17))
    return next(t for t in texts if float(t) == value or not float(t).is_integer())


def _no_data_mark(data: np.ndarray) -> float:
    """The largest value, where it is no intensity: float32 then keeps nothing of the others; else 0."""
    largest = max(float(data.max()), -float(data.min())) if data.size else 0.0
    if largest <= NO_DATA:
        return 0.0
    others = np.abs(data[np.abs(data) <= NO_DATA])
    return largest if others.size and float(others.max()) < 1e-7 * largest else 0.0


def _read(read: Any, files: Sequence[str], strict: bool) -> Any:
    """``read(files)``; where that fails, the file that cannot be read on its own is named."""
    for file in files:
        inspect_file(file, strict)
    try:
        return read(files)
    except Exception as error:
        guilty = list(files)
        for file in files if len(files) > 1 else []:
            try:
                read([file])
            except Exception:
                guilty = [file]
                break
        raise SourceError(
            f"{', '.join(guilty)}: cannot be read ({_reason(error, guilty, read)}). "
            "Repair, replace or remove the case."
        ) from error


EXPECTED = {  # kinds of content by ending; others are named in the message
    ".nii": ("NIfTI", "NIfTI-2"),
    ".nii.gz": ("NIfTI", "NIfTI-2"),
    ".nrrd": ("NRRD",),
    ".mha": ("MetaImage",),
    ".png": ("PNG",),
    ".bmp": ("BMP",),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
}


def _reason(error: Exception, files: Sequence[str], read: Any) -> str:
    """Why a reader failed, for the user: what the file is if not what its name says, else the reader's own
    words without its source files and addresses."""
    for file in files:
        kind, expected = kind_of(file), next((v for k, v in EXPECTED.items() if file.lower().endswith(k)), ())
        if kind and expected and kind not in expected:
            return f"its content is {kind}, not {expected[0]}"
        if kind == "NIfTI-2" and isinstance(getattr(read, "__self__", None), SimpleITKIO):
            return (
                "NIfTI-2, which SimpleITK does not read: convert it to NIfTI-1, or plan anew with "
                "overwrite_image_reader_writer NibabelIO in dataset.json"
            )
        if file.lower().endswith((".nii", ".nii.gz")) and (problem := nifti_problem(file)):
            return problem
    text = re.sub(r"\S+\(0x[0-9a-f]+\): ", "", " ".join(str(error).split()).rpartition("ERROR: ")[2])
    return text[:300] or "sizes or spacings of these files differ"


def _grid_problem(data: np.ndarray, properties: Mapping[str, Any]) -> str:
    """What makes a grid useless: no voxels, or a spacing that is no length."""
    spacing = [float(s) for s in properties["spacing"]]
    if len(spacing) != data.ndim - 1:
        return f"{data.ndim - 1} axes, but {len(spacing)} spacings (colors, where nnU-Net expects numbers?)"
    if not data.size:
        return f"no voxels, its shape is {' x '.join(map(str, data.shape[1:]))}"
    if not all(0 < s < math.inf for s in spacing):
        return f"spacing {' x '.join(f'{s:g}' for s in spacing)}, expected positive numbers (mm)"
    return ""
