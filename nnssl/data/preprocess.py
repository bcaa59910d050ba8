"""nnU-Net's preprocessing, case by case: only what is missing or stale, in parallel, each case complete or
not there at all.

nnU-Net's ``DefaultPreprocessor.run`` deletes its output folder and starts over. Here the same
``run_case_save`` of the plan's preprocessor writes one case into a scratch folder beside the target; the
finished files are then moved into place, the properties (``.pkl``) last: they mark a complete case. They
carry a record under the key ``nnssl`` (nnU-Net ignores it) from which the next run decides what to redo::

    format       version of this record
    origin       raw folder of the image: ``imagesTr`` or ``imagesUn``
    fingerprint  hash over the plan's keys that decide the preprocessed voxels, see
                 `preprocessing_fingerprint`
    sources      raw files: name, bytes, mtime_ns, blake2b of the content (None where nnU-Net itself had
        preprocessed the case)
    bytes        sizes of the two arrays on disk, which shows a truncated copy
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os.path import basename, dirname, getsize, isdir, isfile, join
from typing import Any

import blosc2
import numpy as np
from nnunetv2.configuration import default_num_processes
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnssl.data.parallel import unordered, usable_cores
from nnssl.data.raw import CheckedPlans, SourceError, digest, num_channels

RECORD_FORMAT = 1
LEFTOVER_SECONDS = (
    24 * 3600
)  # scratch folders of killed runs are removed after a day; a younger one may belong to a living process
Log = Callable[[str], None]


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
    return _judge(case, target)[0]


def read_properties(path: str) -> dict[str, Any] | None:
    """A case's ``.pkl``; None if it is damaged."""
    try:
        with open(path, "rb") as file:
            content = pickle.load(file)
    except Exception:  # a half-written pickle can raise nearly anything
        return None
    return content if isinstance(content, dict) else None


def _judge(case: Case, target: Target) -> tuple[str, dict[str, Any] | None]:
    """Reason as in `stale_reason`; for a fresh case whose record can be improved, the properties to write
    back."""
    data, segmentation, marker = target.files(case.name)
    if not isfile(marker):
        return "not preprocessed", None
    properties = read_properties(marker)
    if properties is None or not (isfile(data) and isfile(segmentation)):
        return "incomplete", None
    record = properties.get("nnssl")
    if (
        record is None
    ):  # nnU-Net's own work: nothing is known about the plan, so it must at least not contradict it
        reason = _contradiction(case, target, properties) if case.label else "of unknown origin"
        return reason, None if reason else {
            **properties,
            "nnssl": _record(case, target, [getsize(data), getsize(segmentation)], False),
        }
    if (
        record.get("format") != RECORD_FORMAT
        or record["fingerprint"] != target.fingerprint
        or record["origin"] != case.origin
    ):
        return "preprocessed with other settings", None
    if record["bytes"] != [getsize(data), getsize(segmentation)]:
        return "incomplete", None
    if not case.images:
        return "", None
    now, then = [_stamp(file) for file in case.sources], record["sources"]
    if [(s["file"], s["bytes"]) for s in now] != [(s["file"], s["bytes"]) for s in then]:
        return "source changed", None
    touched = [i for i, (s, t) in enumerate(zip(now, then, strict=True)) if s["mtime_ns"] != t["mtime_ns"]]
    if any(then[i]["blake2b"] is None or then[i]["blake2b"] != digest(case.sources[i]) for i in touched):
        return "source changed", None
    if not touched:
        return "", None
    sources = [
        {**t, "mtime_ns": s["mtime_ns"]} for s, t in zip(now, then, strict=True)
    ]  # same content: hash it once only
    return "", {**properties, "nnssl": {**record, "sources": sources}}


def _contradiction(case: Case, target: Target, properties: dict[str, Any]) -> str:
    """Whether files that nnU-Net wrote itself are older than their sources, unreadable, or of another size
    than the plan gives."""
    files = target.files(case.name)
    if min(os.path.getmtime(file) for file in files) < max(os.path.getmtime(file) for file in case.sources):
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
        return "preprocessed with other settings"
    return ""


def _stamp(file: str) -> dict[str, Any]:
    stat = os.stat(file)
    return {"file": basename(file), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _record(case: Case, target: Target, sizes: list[int], with_digest: bool) -> dict[str, Any]:
    sources = [{**_stamp(file), "blake2b": digest(file) if with_digest else None} for file in case.sources]
    return {
        "format": RECORD_FORMAT,
        "origin": case.origin,
        "fingerprint": target.fingerprint,
        "sources": sources,
        "bytes": sizes,
    }


def _produce(case: Case, target: Target, scratch: str, verbose: bool) -> str:
    """Preprocess one case; returns what went wrong, empty if nothing did (all failures are reported
    together)."""
    try:
        if not stale_reason(case, target):
            return ""  # a training that started at the same time was faster
        plans = CheckedPlans(
            target.plans_manager.plans,
            case.images,
            num_channels(target.dataset_json),
            strict=case.label is None,
        )
        configuration = plans.get_configuration(target.configuration)
        preprocessor = configuration.preprocessor_class(verbose=verbose)
        stem = join(scratch, case.name)
        record = _record(
            case, target, [], with_digest=True
        )  # before reading: a source that changes meanwhile is noticed next time
        preprocessor.run_case_save(
            stem, list(case.images), case.label, plans, configuration, target.dataset_json
        )
        with open(stem + ".pkl", "rb") as file:
            properties = pickle.load(file)
        if case.label is None:
            properties[
                "class_locations"
            ] = {}  # nnU-Net's loader asks for it; nothing is known about the classes
        record["bytes"] = [getsize(stem + ".b2nd"), getsize(stem + "_seg.b2nd")]
        _write_pickle({**properties, "nnssl": record}, stem + ".pkl")
        for suffix, destination in zip((".b2nd", "_seg.b2nd", ".pkl"), target.files(case.name), strict=True):
            os.replace(stem + suffix, destination)
    except SourceError as error:
        return f"{case.name}: {error}"
    except Exception as error:
        detail = traceback.format_exc() if verbose else f"{type(error).__name__}: {error}"
        return f"{case.name}: could not be preprocessed from {', '.join(case.sources)}: {detail}"
    return ""


def _write_pickle(content: Any, path: str) -> None:
    """Whole or not at all. What a kill leaves is a folder, as nnU-Net refuses files of a kind that it does
    not know among the cases."""
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=dirname(path), ignore_cleanup_errors=True) as folder:
        with open(join(folder, basename(path)), "wb") as file:
            pickle.dump(content, file)
        os.replace(file.name, path)


def bring_up_to_date(
    cases: Sequence[Case],
    target: Target,
    num_processes: int | None = None,
    log: Log = print,
    verbose: bool = False,
    show_progress: bool = True,
) -> int:
    """Preprocess the cases that are missing or stale; returns how many there were.

    Every other case is finished before a failing one is reported, so nothing that could be done is left
    undone. Raises ValueError naming the files and what to do, RuntimeError if a process died.
    """
    todo = []
    for case in cases:
        reason, improved = _judge(case, target)
        if reason:
            todo.append(case)
        elif improved is not None and os.access(target.folder, os.W_OK):
            _write_pickle(improved, target.files(case.name)[2])
    if not todo:
        return 0
    workers = min(num_processes or min(default_num_processes, usable_cores()), len(todo))
    kept = f", {len(cases) - len(todo)} others are up to date" if len(todo) < len(cases) else ""
    log(
        f"Preprocessing {len(todo)} cases into {target.folder} ({workers} "
        f"process{'es' * (workers > 1)}{kept})."
    )
    random.Random(os.getpid()).shuffle(
        todo
    )  # folds started together share the work instead of all doing the same case
    os.makedirs(target.folder, exist_ok=True)
    _remove_leftovers(target.folder)
    scratch = tempfile.mkdtemp(prefix=f".{basename(target.folder)}.tmp-", dir=dirname(target.folder))
    try:
        results = unordered(_produce, [(case, target, scratch, verbose) for case in todo], workers)
        errors = [
            error
            for error in tqdm(results, "preprocessing", len(todo), disable=not show_progress, mininterval=0.5)
            if error
        ]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if errors:
        shown = "\n".join(f"  - {error}" for error in sorted(errors)[:20])
        raise ValueError(
            f"{len(errors)} of {len(todo)} cases could not be preprocessed (the others are done and "
            f"stay):\n{shown}\n"
            "Repair, replace or remove these files and start again: only what is missing is redone."
        )
    return len(todo)


def _remove_leftovers(folder: str) -> None:
    parent, prefix = dirname(folder), f".{basename(folder)}.tmp-"
    for name in os.listdir(parent):
        path = join(parent, name)
        if (
            name.startswith(prefix)
            and isdir(path)
            and time.time() - os.path.getmtime(path) > LEFTOVER_SECONDS
        ):
            shutil.rmtree(path, ignore_errors=True)
