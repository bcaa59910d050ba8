"""Whether a preprocessed case is there, complete, and of today's sources and plan.

The properties (``.pkl``) of a case carry a record under the key ``nnssl`` (nnU-Net ignores it)::

    format       version of this record
    origin       raw folder of the image: ``imagesTr`` or ``imagesUn``
    fingerprint  hash over the plan's keys that decide the preprocessed voxels, see
                 `preprocessing_fingerprint`
    sources      raw files: name, bytes, mtime_ns, blake2b of the content (None where nnU-Net itself had
                 preprocessed the case)
    bytes        sizes of the two arrays on disk, which shows a truncated copy
    checksums    of the two arrays on disk; absent where nnU-Net itself had preprocessed the case
    declared     values to which the label map keeps; absent where nnU-Net itself had preprocessed the case

Or one key alone, for a case that nnU-Net itself had preprocessed::

    stale        why it has to be preprocessed again
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os.path import basename, dirname, getsize, isfile, join
from typing import Any

import blosc2
import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.data.raw import num_channels
from nnssl.files import write_bytes

RECORD_FORMAT = 1
OTHER_SETTINGS = "preprocessed with other settings"
CHECKSUM = re.compile(rb"crc32:([0-9a-f]{8})\Z")  # ends a .pkl that we wrote


@dataclass(frozen=True)
class Case:
    """One case to preprocess: raw image files in channel order (empty: not on this machine), and its label
    file if it is to be used."""

    name: str
    images: tuple[str, ...]
    origin: str  # imagesTr | imagesUn
    label: str | None = None

    @property
    def sources(self) -> list[str]:
        """Every raw file that decides the result; for TIFF nnU-Net reads the spacing from ``<case>.json``
        beside it."""
        files = [*self.images, *([self.label] if self.label else [])]
        sidecars = {join(dirname(file), self.name + ".json"): None for file in files}
        return [*files, *(file for file in sidecars if isfile(file))]


@dataclass(frozen=True)
class Target:
    """Where cases go and what decides their voxels."""

    folder: str
    plans_manager: PlansManager
    configuration: str
    dataset_json: dict[str, Any]
    fingerprint: str

    def files(self, name: str) -> tuple[str, str, str]:
        """Paths of image (C, D, H, W) float32, segmentation (1, D, H, W) int16 and properties of a case."""
        stem = join(self.folder, name)
        return stem + ".b2nd", stem + "_seg.b2nd", stem + ".pkl"


def preprocessing_fingerprint(
    plans_manager: PlansManager, configuration: str, dataset_json: Mapping[str, Any] | None = None
) -> str:
    """Hash over the plan's keys that decide preprocessed voxels, and nothing else: not architecture, patch or
    batch.

    For labeled cases pass `dataset_json` too: labels and regions decide nnU-Net's ``class_locations``.
    """
    plan = plans_manager.get_configuration(configuration).configuration
    of_configuration = ("spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name")
    of_resampling = (
        "resampling_fn_data",
        "resampling_fn_data_kwargs",
        "resampling_fn_seg",
        "resampling_fn_seg_kwargs",
    )
    content: dict[str, Any] = {key: plan.get(key) for key in (*of_configuration, *of_resampling)}
    content["transpose_forward"] = plans_manager.transpose_forward
    content["intensities"] = plans_manager.foreground_intensity_properties_per_channel
    content["image_reader_writer"] = plans_manager.plans["image_reader_writer"]
    if dataset_json is not None:
        content["labels"] = [dataset_json["labels"], dataset_json.get("regions_class_order")]
    return hashlib.sha256(json.dumps(_canonical(content), sort_keys=True).encode()).hexdigest()[:32]


def _canonical(value: Any) -> Any:
    """1, 1.0 and numpy's 1.0 are the same plan."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_canonical(item) for item in value]
    if value is None or isinstance(value, str):
        return value
    return bool(value) if isinstance(value, (bool, np.bool_)) else repr(float(value))


def stale_reason(case: Case, target: Target) -> str:
    """Why a case has to be preprocessed (again); empty where it is complete and fresh. Reads properties and
    file stamps, not voxels."""
    return judge(case, target)[0]


def read_properties(path: str) -> dict[str, Any] | None:
    """A case's ``.pkl``; None if it is damaged. Of a file with a checksum that shows before anything is
    unpickled."""
    try:
        with open(path, "rb") as file:
            written = file.read()
        found = CHECKSUM.search(written)
        if found and int(found[1], 16) != zlib.crc32(written[: found.start()]):
            return None
        stream = io.BytesIO(written)
        content = pickle.load(stream)
        if stream.tell() != (found.start() if found else len(written)):
            return None  # a damaged checksum
    except Exception:  # a half-written pickle can raise nearly anything
        return None
    return content if isinstance(content, dict) else None


def write_properties(properties: Mapping[str, Any], path: str) -> None:
    """A case's ``.pkl`` with a checksum behind it, which pickle does not read."""
    written = pickle.dumps(properties)
    write_bytes(written + b"crc32:%08x" % zlib.crc32(written), path)


def checksum(path: str) -> int:
    """CRC-32 of a file: against accidents, and fast."""
    value = 0
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def judge(
    case: Case, target: Target, hash_of: Callable[[str], str] | None = None
) -> tuple[str, dict[str, Any] | None]:
    """Reason as in `stale_reason`; for a fresh case whose record can be improved, the properties to write
    back.

    hash_of  in the place of `digest`, for files whose time alone has changed
    """
    hash_of = hash_of or digest
    data, segmentation, marker = target.files(case.name)
    if not isfile(marker):
        return "not preprocessed", None
    properties = read_properties(marker)
    if properties is None or not (isfile(data) and isfile(segmentation)):
        return "incomplete", None
    record = properties.get("nnssl")
    if record is None:  # nnU-Net's own work: of an unknown plan, which it must at least not contradict
        reason = _contradiction(case, target, properties, hash_of) if case.label else "of unknown origin"
        return reason, None if reason else {
            **properties,
            "nnssl": make_record(case, target, [getsize(data), getsize(segmentation)], False),
        }
    if reason := record.get("stale"):
        return reason, None
    if (
        record.get("format") != RECORD_FORMAT
        or record["fingerprint"] != target.fingerprint
        or record["origin"] != case.origin
    ):
        return OTHER_SETTINGS, None
    if record["bytes"] != [getsize(data), getsize(segmentation)]:
        return "incomplete", None
    if not case.images:
        return "", None
    now, then = [stamp(file) for file in case.sources], record["sources"]
    if [(s["file"], s["bytes"]) for s in now] != [(s["file"], s["bytes"]) for s in then]:
        return "source changed", None
    touched = [i for i, (s, t) in enumerate(zip(now, then, strict=True)) if s["mtime_ns"] != t["mtime_ns"]]
    if any(then[i]["blake2b"] is None or then[i]["blake2b"] != hash_of(case.sources[i]) for i in touched):
        return "source changed", None
    if not touched:
        return "", None
    sources = [
        {**t, "mtime_ns": s["mtime_ns"]} for s, t in zip(now, then, strict=True)
    ]  # same content: hash it once only
    return "", {**properties, "nnssl": {**record, "sources": sources}}


def _contradiction(
    case: Case, target: Target, properties: dict[str, Any], hash_of: Callable[[str], str]
) -> str:
    """Whether files that nnU-Net wrote itself are older than their sources, unreadable, of another label map
    than its copy in ``gt_segmentations``, or of another size than the plan gives."""
    files = target.files(case.name)
    if min(os.path.getmtime(file) for file in files) < max(os.path.getmtime(file) for file in case.sources):
        return "source changed"
    truth = ground_truth(dirname(target.folder), case.name, target.dataset_json)
    # a corrected label map may be older than all of this: archives keep times
    if case.label and isfile(truth) and differ(truth, case.label, hash_of):
        return "source changed"
    if "class_locations" not in properties:
        return "incomplete"
    try:
        shapes = [tuple(blosc2.open(file, mode="r").shape) for file in files[:2]]
    except Exception:  # blosc2 has no error class of its own
        return "incomplete"
    spacing = [properties["spacing"][axis] for axis in target.plans_manager.transpose_forward]
    wanted = list(target.plans_manager.get_configuration(target.configuration).spacing)
    wanted = wanted if len(wanted) == len(spacing) else [spacing[0], *wanted]
    shape = tuple(
        int(n)
        for n in compute_new_shape(properties["shape_after_cropping_and_before_resampling"], spacing, wanted)
    )
    if shapes != [(num_channels(target.dataset_json), *shape), (1, *shape)]:
        return OTHER_SETTINGS
    return ""


def ground_truth(preprocessed_dataset_folder: str, case: str, dataset_json: Mapping[str, Any]) -> str:
    """Where nnU-Net copies the label map of a case, for its validation."""
    return join(preprocessed_dataset_folder, "gt_segmentations", case + dataset_json["file_ending"])


def differ(copy: str, source: str, hash_of: Callable[[str], str] | None = None) -> bool:
    """Whether a copy is of other content than its source; read only where times differ and sizes do not."""
    hash_of, ours, theirs = hash_of or digest, os.stat(copy), os.stat(source)
    if ours.st_size != theirs.st_size:
        return True
    return ours.st_mtime_ns != theirs.st_mtime_ns and hash_of(copy) != hash_of(source)


def stamp(file: str) -> dict[str, Any]:
    """Name, size and time of change of a file."""
    stat = os.stat(file)
    return {"file": basename(file), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def make_record(case: Case, target: Target, sizes: list[int], with_digest: bool) -> dict[str, Any]:
    """The record of a case with arrays of these sizes in bytes."""
    sources = [{**stamp(file), "blake2b": digest(file) if with_digest else None} for file in case.sources]
    return {
        "format": RECORD_FORMAT,
        "origin": case.origin,
        "fingerprint": target.fingerprint,
        "sources": sources,
        "bytes": sizes,
    }


def digest(file: str) -> str:
    """Hash of a file's content."""
    content_hash = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 22):
            content_hash.update(chunk)
    return content_hash.hexdigest()


def content_of(case: Case, files: tuple[str, str, str]) -> list[Any]:
    """What tells the voxels that a training reads of a case from others of the same plan: hashes of its raw
    files, or of a case that nnU-Net itself had preprocessed the stamps of the arrays.

    Of raw files that changed since, the new content, for such a case is preprocessed anew; without any the
    record counts.
    """
    record = (read_properties(files[2]) or {}).get("nnssl", {})
    then = {(s["file"], s["bytes"], s["mtime_ns"]): s["blake2b"] for s in record.get("sources", [])}
    if case.images:
        stamps = [tuple(stamp(file).values()) for file in case.sources]
        known = zip(stamps, case.sources, strict=True)
        return [[key[0], then.get(key) or digest(file)] for key, file in known]
    if then and all(then.values()):
        return [[key[0], value] for key, value in then.items()]
    return [stamp(file) for file in files[:2] if isfile(file)]
