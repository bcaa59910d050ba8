"""The raw side of a dataset: which files belong to which case, and reading them without silent damage.

SimpleITK reads a truncated NIfTI file without complaint, with zeros for the missing end, and NaN as zero;
other readers hand NaN on, and nnU-Net normalises it into a volume of NaN. `CheckedPlans` is nnU-Net's plan
with a reader that refuses such files and names them.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from os.path import abspath, basename, expandvars, isdir, join
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

NO_DATA = 1e15  # magnitude that no scanner gives


class SourceError(ValueError):
    """A raw file cannot be used; the message names it and says what to do."""


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


def plans_in(preprocessed_dataset_folder: str) -> str:
    """Names of the plans of a dataset, for messages."""
    names = os.listdir(preprocessed_dataset_folder) if isdir(preprocessed_dataset_folder) else []
    return (
        ", ".join(sorted(name[:-5] for name in names if "lans" in name and name.endswith(".json"))) or "none"
    )


class CheckedPlans(PlansManager):
    """A plan whose reader raises `SourceError` on unreadable or truncated files, non-finite voxels and a
    wrong number of channels.

    images    the image files of one case
    channels  number of channels that these must give together
    strict    look for non-finite voxels in the file itself, too (nnU-Net trains on labeled NIfTI images whose
              NaN were read as zero)
    declared  values that label maps may have; None: any
    """

    def __init__(
        self,
        plans: dict[str, Any],
        images: Sequence[str],
        channels: int,
        strict: bool,
        declared: Collection[int] | None = None,
    ) -> None:
        super().__init__(plans)
        self.images, self.channels, self.strict = list(images), channels, strict
        self.declared = declared

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
                if len(data) != case.channels:
                    raise SourceError(
                        f"{', '.join(files)}: {len(data)} channel(s), but dataset.json declares "
                        f"{case.channels}. "
                        "Give every case the same channels, or remove it."
                    )
                finite = np.isfinite(data).reshape(len(data), -1).all(axis=1)
                if not finite.all():
                    per_channel = len(files) == case.channels
                    raise _not_finite(
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
                label, properties = _read(lambda files: read_seg(files[0]), [file], False)
                if case.declared is not None and (problem := label_problem(np.unique(label), case.declared)):
                    declared = ", ".join(map(str, sorted(case.declared)))
                    raise SourceError(
                        f"{file}: {problem}; expected {declared} (labels in dataset.json). {LABEL_REMEDY}."
                    )
                return label, properties

        return CheckedReader


LABEL_REMEDY = "Correct the label map, or declare the values in dataset.json"


def label_problem(values: Sequence[float] | np.ndarray, declared: Collection[int]) -> str:
    """What is wrong with the values of a label map; empty where all are declared."""
    undeclared = [float(value) for value in values if value not in declared]
    if not undeclared:
        return ""
    more = f" and {len(undeclared) - 10} more" if len(undeclared) > 10 else ""
    wrong = "not declared" if all(value.is_integer() for value in undeclared) else "no whole numbers"
    return f"values {', '.join(f'{v:g}' for v in undeclared[:10])}{more} are {wrong}"


def _no_data_mark(data: np.ndarray) -> float:
    """The largest value, where it is no intensity: float32 then keeps nothing of the others; else 0."""
    largest = max(float(data.max()), -float(data.min())) if data.size else 0.0
    if largest <= NO_DATA:
        return 0.0
    others = np.abs(data[np.abs(data) <= NO_DATA])
    return largest if others.size and float(others.max()) < 1e-7 * largest else 0.0


def _not_finite(files: Sequence[str]) -> SourceError:
    return SourceError(
        f"{', '.join(files)}: NaN or infinite voxels. Replace them with finite values, or remove the case."
    )


def _read(read: Any, files: Sequence[str], strict: bool) -> Any:
    """``read(files)``; where that fails, the file that cannot be read on its own is named."""
    for file in files:
        _inspect(file, strict)
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
        reason = " ".join(str(error).split())[:300] or "sizes or spacings of these files differ"
        raise SourceError(
            f"{', '.join(guilty)}: cannot be read ({reason}). Repair, replace or remove the case."
        ) from error


def _inspect(file: str, strict: bool) -> None:
    """Refuse damaged gzip streams, NIfTI files shorter than their header says and, where `strict`, NIfTI
    files with non-finite voxels."""
    if not file.lower().endswith((".gz", ".nii")):
        return
    try:
        content = _unpacked(file)
        voxels = _nifti_voxels(content) if ".nii" in basename(file).lower() else None
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(
            f"{file}: truncated or damaged ({error}). Copy or download it again, or remove it."
        ) from error
    if voxels is None:
        return  # the reader knows more
    start, count, dtype = voxels
    expected = start + count * dtype.itemsize
    if len(content) < expected:
        raise SourceError(
            f"{file}: truncated, {len(content)} of {expected} bytes are there. Copy or download it again, "
            "or remove it."
        )
    if strict and dtype.kind == "f" and not np.isfinite(np.frombuffer(content, dtype, count, start)).all():
        raise _not_finite([file])


def _unpacked(file: str) -> bytes:
    """Content of a file, of ``.gz`` as zlib's gzread gives it to the readers: stream after stream; bytes
    behind the last one do not count, and a file that is not compressed is taken as it is."""
    magic, chunk = b"\x1f\x8b", 1 << 20
    parts = []
    with open(file, "rb") as stream:
        packed = stream.read(chunk)
        if not packed:
            raise EOFError("the file is empty")
        if not (file.lower().endswith(".gz") and packed.startswith(magic)):
            return packed + stream.read()
        while packed.startswith(magic):
            unpack = zlib.decompressobj(wbits=31)  # gzip
            while not unpack.eof:
                if not packed:
                    raise EOFError("the gzip stream ends too early")
                parts.append(unpack.decompress(packed))
                packed = stream.read(chunk) if not unpack.eof else unpack.unused_data
            if len(packed) < len(magic):
                packed += stream.read(chunk)
    return b"".join(parts)


def _nifti_voxels(content: bytes) -> tuple[int, int, np.dtype] | None:
    """Start, number and type of the voxels as SimpleITK finds them by a NIfTI-1 or -2 header: their size by
    the type alone, their start behind the header. None for other headers and types."""
    headers = {348: Nifti1Header, 540: Nifti2Header}
    sizes = int.from_bytes(content[:4], "little"), int.from_bytes(content[:4], "big")
    size = next((n for n in sizes if n in headers), None)
    if size is None:
        return None
    if len(content) < size:
        raise EOFError(f"{len(content)} of the {size} bytes of its header are there")
    header = headers[size](content[:size], check=False)
    try:
        dtype = header.get_data_dtype()
    except HeaderDataError:
        return None
    dims = [int(n) for n in header["dim"]]
    offset = float(header["vox_offset"])  # 0, -1 and NaN occur, and mean the same
    start = int(offset) if size <= offset < math.inf else size
    return start, math.prod(max(n, 1) for n in dims[1 : dims[0] + 1]), dtype
