"""The labeled part of a dataset: preprocessed by nnU-Net's own code, but only where something is missing or
stale."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os.path import basename, getmtime, isdir, isfile, join
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.data.freshness import Case, Target, preprocessing_fingerprint
from nnssl.data.preprocess import Log, bring_up_to_date
from nnssl.data.raw import training_files
from nnssl.files import copy_file


def labeled_cases(
    plans_manager: PlansManager, configuration: str, dataset_json: dict[str, Any], raw_dataset_folder: str
) -> tuple[Target, list[Case]]:
    """What `ensure_labeled` is to bring up to date."""
    identifier = plans_manager.get_configuration(configuration).data_identifier
    folder = join(nnUNet_preprocessed, plans_manager.dataset_name, identifier)
    fingerprint = preprocessing_fingerprint(plans_manager, configuration, dataset_json)
    files = training_files(raw_dataset_folder, dataset_json)
    cases = [Case(name, tuple(images), "imagesTr", label) for name, (images, label) in sorted(files.items())]
    return Target(folder, plans_manager, configuration, dataset_json, fingerprint), cases


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
    dataset to `<folder>_removed`.

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
            f"belong into imagesUn."
        )
    if removed := removed_cases(target, cases):
        aside = target.folder.rstrip("/\\") + "_removed"  # not deleted: the raw scans may be gone
        os.makedirs(aside, exist_ok=True)
        for name in removed:
            for file in reversed(target.files(name)):
                if isfile(file):
                    os.replace(file, join(aside, basename(file)))
        shown = ", ".join(removed[:5]) + " ..." * (len(removed) > 5)
        log(f"Moved {len(removed)} preprocessed cases that are no longer in imagesTr to {aside}: {shown}")
    if not bring_up_to_date(cases, target, num_processes, log, verbose, show_progress):
        log(f"All {len(cases)} labeled cases in {target.folder} are up to date.")


def copy_ground_truth(
    raw_dataset_folder: str, dataset_json: Mapping[str, Any], preprocessed_dataset_folder: str
) -> None:
    """Labels into ``gt_segmentations``, where nnU-Net's validation looks for them, as its preprocessing
    does."""
    folder = join(preprocessed_dataset_folder, "gt_segmentations")
    os.makedirs(folder, exist_ok=True)
    for case, (_, label) in training_files(raw_dataset_folder, dataset_json).items():
        destination = join(folder, case + dataset_json["file_ending"])
        if not isfile(destination) or getmtime(destination) < getmtime(label):
            copy_file(label, destination)
