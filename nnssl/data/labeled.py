"""The labeled part of a dataset: preprocessed by nnU-Net's own code, but only where something is missing or
stale."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from glob import escape, glob
from os.path import basename, getsize, isdir, isfile, join
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.data.dataset_json import inspect_dataset_json
from nnssl.data.findings import errors_of, listed
from nnssl.data.freshness import (
    Case,
    Target,
    differ,
    digest,
    ground_truth,
    judge,
    preprocessing_fingerprint,
    read_properties,
    write_properties,
)
from nnssl.data.preprocess import Log, bring_up_to_date
from nnssl.data.raw import cases_in, training_files
from nnssl.files import copy_file, move_across, read_json, remove_leftovers

COMPARED = 1 << 30  # bytes, about a second
OUTSIDE = -1  # nnU-Net's value outside of the body, in preprocessed label maps


def labeled_cases(
    plans_manager: PlansManager, configuration: str, dataset_json: dict[str, Any], raw_dataset_folder: str
) -> tuple[Target, list[Case]]:
    """What `ensure_labeled` is to bring up to date."""
    identifier = plans_manager.get_configuration(configuration).data_identifier
    folder = join(nnUNet_preprocessed, plans_manager.dataset_name, identifier)
    fingerprint = preprocessing_fingerprint(plans_manager, configuration, dataset_json)
    files = training_files(raw_dataset_folder, _listing(raw_dataset_folder, dataset_json))
    cases = [Case(name, tuple(images), "imagesTr", label) for name, (images, label) in sorted(files.items())]
    return Target(folder, plans_manager, configuration, dataset_json, fingerprint), cases


def _listing(raw_dataset_folder: str, dataset_json: dict[str, Any]) -> dict[str, Any]:
    """With the key ``dataset`` as the raw dataset.json has it, if that is sound: the copy beside the plan may
    list other cases."""
    file = join(raw_dataset_folder, "dataset.json")
    try:
        content = read_json(file)
    except (OSError, ValueError, RecursionError):
        return dataset_json
    if errors_of(inspect_dataset_json(file, content)):
        return dataset_json
    others = {key: value for key, value in dataset_json.items() if key != "dataset"}
    return others | ({"dataset": content["dataset"]} if "dataset" in content else {})


def removed_cases(target: Target, cases: list[Case]) -> list[str]:
    """Preprocessed cases that the raw dataset no longer has: nnU-Net would go on training on them."""
    suffix, known = ".b2nd", {case.name for case in cases}
    names = os.listdir(target.folder) if isdir(target.folder) else []
    found = {
        name.removesuffix(suffix)
        for name in names
        if name.endswith(suffix) and not name.endswith("_seg" + suffix)
    }
    return sorted(found - known)


class _TooMuch(Exception):
    """More to read than a start of a training should take."""


def outdated_cases(
    target: Target, cases: Sequence[Case], names: Collection[str], compared: int = COMPARED
) -> dict[str, str]:
    """{case: reason} of those preprocessed cases `names` that the raw dataset has otherwise now. By sizes and
    times; contents are compared where times alone differ, `compared` bytes of them at most.

    cases  all labeled ones of the raw dataset
    """
    left = compared

    def hash_of(file: str) -> str:
        nonlocal left
        if (left := left - getsize(file)) < 0:
            raise _TooMuch
        return digest(file)

    found, there = {}, {case.name: case for case in cases}
    for name in sorted(names):
        if (case := there.get(name)) is None:
            found[name] = "no longer in imagesTr"
        elif gone := [basename(file) for file in case.sources if not isfile(file)]:
            found[name] = f"{', '.join(gone)} is gone"
        else:
            try:
                reason = judge(case, target, hash_of)[0]
            except _TooMuch:
                reason = "source touched, content not compared"
            found |= {name: reason} if reason else {}
    return found


def old_files(folder: str) -> list[str]:
    """Names of the files that nnU-Net wrote before 2.6: .npz, .npy and their .pkl."""
    names = set(os.listdir(folder)) if isdir(folder) else set()
    old = {name for name in names if name.endswith((".npz", ".npy"))}
    stems = {name[:-4].removesuffix("_seg") for name in old}
    return sorted(old | {f"{stem}.pkl" for stem in stems if f"{stem}.b2nd" not in names} & names)


def undeclared_labels(dataset: Any, cases: Sequence[str], declared: Collection[int]) -> dict[str, list[int]]:
    """Preprocessed label maps with values that dataset.json does not declare. Only those are read that
    nnU-Net's own preprocessing wrote: ours refuses them.

    dataset  nnU-Net's dataset of the preprocessed labeled cases
    """
    found = {}
    for case in cases:
        properties = read_properties(join(dataset.source_folder, case + ".pkl")) or {}
        if "declared" in properties.get("nnssl", {}):
            continue
        values = np.unique(dataset.load_case(case)[1][:])
        if odd := [int(value) for value in values if value not in declared and value != OUTSIDE]:
            found[case] = odd
    return found


def set_aside(names: Sequence[str], folder: str, suffix: str) -> str:
    """Move files of `folder` to `<folder><suffix>`: not deleted, the raw scans may be gone."""
    aside = folder.rstrip("/\\") + suffix
    os.makedirs(aside, exist_ok=True)
    for name in names:
        move_across(join(folder, name), join(aside, name))
    return aside


def ensure_labeled(
    plans_manager: PlansManager,
    configuration: str,
    dataset_json: dict[str, Any],
    raw_dataset_folder: str,
    num_processes: int | None = None,
    log: Log = print,
    verbose: bool = False,
    show_progress: bool = True,
) -> None:
    """Preprocess the labeled cases that are missing or stale; move those that were taken out of the raw
    dataset to `<folder>_removed`, and the files of an nnU-Net before 2.6 to `<folder>_before_2.6`.

    Raises ValueError where raw images or labels are absent or cannot be used.
    """
    target, cases = labeled_cases(plans_manager, configuration, dataset_json, raw_dataset_folder)
    missing = [file for case in cases for file in case.sources if not isfile(file)]
    if not cases or missing:
        what = (
            f"no labeled case in {join(raw_dataset_folder, 'imagesTr')}"
            if not cases
            else f"missing: {', '.join(missing[:10])}"
        )
        raise ValueError(
            f"{what}. Labeled cases need images in imagesTr and labels in labelsTr; scans without label "
            "belong into imagesUn."
        )
    if removed := removed_cases(target, cases):
        files = [file for name in removed for file in reversed(target.files(name)) if isfile(file)]
        aside = set_aside([basename(file) for file in files], target.folder, "_removed")
        shown = ", ".join(removed[:5]) + " ..." * (len(removed) > 5)
        log(f"Moved {len(removed)} preprocessed cases that are no longer in imagesTr to {aside}: {shown}")
    if old := old_files(target.folder):  # nnU-Net refuses a folder with both kinds
        aside = set_aside(old, target.folder, "_before_2.6")
        log(f"Moved {len(old)} files of an nnU-Net before 2.6 to {aside}.")
    if not bring_up_to_date(cases, target, num_processes, log, verbose, show_progress):
        log(f"All {len(cases)} labeled cases in {target.folder} are up to date.")


def copy_ground_truth(
    raw_dataset_folder: str,
    dataset_json: Mapping[str, Any],
    preprocessed_dataset_folder: str,
    log: Log = print,
) -> None:
    """Labels into ``gt_segmentations``, where nnU-Net's validation looks for them, as its preprocessing does;
    those of cases that were taken out of the raw dataset to `gt_segmentations_removed`."""
    folder = join(preprocessed_dataset_folder, "gt_segmentations")
    os.makedirs(folder, exist_ok=True)
    remove_leftovers(folder)
    training, ending = training_files(raw_dataset_folder, dataset_json), dataset_json["file_ending"]
    # without raw data they say which cases there are
    if removed := [case for case in cases_in(folder, ending) if case not in training]:
        aside = set_aside([case + ending for case in removed], folder, "_removed")
        log(f"Moved {len(removed)} label maps of cases taken out of imagesTr to {aside}: {listed(removed)}")
    for case, (_, label) in training.items():
        destination = ground_truth(preprocessed_dataset_folder, case, dataset_json)
        if not isfile(destination) or _seen(destination) != _seen(label):
            if isfile(destination) and differ(destination, label):
                _mark_stale(preprocessed_dataset_folder, case)
            copy_file(label, destination)


def _mark_stale(preprocessed_dataset_folder: str, case: str) -> None:
    """In other configurations, where nnU-Net itself preprocessed the case: only its copy of the label map,
    about to be replaced, tells that it has changed."""
    for marker in glob(join(escape(preprocessed_dataset_folder), "*", escape(case) + ".pkl")):
        properties = read_properties(marker)
        if properties is not None and "nnssl" not in properties:
            write_properties({**properties, "nnssl": {"stale": "source changed"}}, marker)


def _seen(path: str) -> tuple[int, int]:
    """Of a copy that `copy_file` made the same as of its source."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns
