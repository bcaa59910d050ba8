"""Scans that train without labels: the raw folder ``imagesUn``, and cases of ``imagesTr`` whose labels a
split hides.

Both are preprocessed, image only, by nnU-Net's own code into ``<data_identifier>_unlabeled``: beside the
labeled cases and not among them, because nnU-Net takes every case of its folder for labeled. A training never
opens the labels of hidden cases, raw or preprocessed; nnU-Net's planning and its preprocessing of `imagesTr`
do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from os.path import basename, isdir, isfile, join
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.data.findings import listed, raise_errors
from nnssl.data.freshness import Case, Target, preprocessing_fingerprint, read_properties, stale_reason
from nnssl.data.labeled import set_aside
from nnssl.data.names import inspect_unlabeled_names, unlabeled_files
from nnssl.data.preprocess import Log, bring_up_to_date
from nnssl.data.raw import training_files

SUFFIX = "_unlabeled"


def unlabeled_folder(preprocessed_dataset_folder: str) -> str:
    """``<...>/<data_identifier>`` -> ``<...>/<data_identifier>_unlabeled``."""
    return preprocessed_dataset_folder.rstrip("/\\") + SUFFIX


def target_of(plans_manager: PlansManager, configuration: str, dataset_json: dict[str, Any]) -> Target:
    """Where the unlabeled cases of a configuration go."""
    identifier = plans_manager.get_configuration(configuration).data_identifier
    folder = unlabeled_folder(join(nnUNet_preprocessed, plans_manager.dataset_name, identifier))
    fingerprint = preprocessing_fingerprint(plans_manager, configuration)
    return Target(folder, plans_manager, configuration, dataset_json, fingerprint)


def find_unlabeled_images(raw_dataset_folder: str, dataset_json: dict[str, Any]) -> dict[str, list[str]]:
    """{case: files in channel order} of ``imagesUn``; empty if there is no such folder. Looks at names only.

    Raises ValueError naming the files: channels missing or too many, a name without channel number, a name
    that a labeled case has.
    """
    raise_errors(inspect_unlabeled_names(raw_dataset_folder, dataset_json))
    cases, _ = unlabeled_files(raw_dataset_folder, dataset_json)
    return {case: [files[channel] for channel in sorted(files)] for case, files in cases.items()}


def unlabeled_cases(
    plans_manager: PlansManager, configuration: str, dataset_json: dict[str, Any], hidden: Sequence[str] = ()
) -> tuple[Target, list[Case]]:
    """What `ensure_unlabeled` is to bring up to date; cases without raw files are there as preprocessed ones
    alone."""
    target = target_of(plans_manager, configuration, dataset_json)
    labeled_folder = target.folder.removesuffix(SUFFIX)
    raw = join(nnUNet_raw, plans_manager.dataset_name) if nnUNet_raw.is_set() else ""
    if there := bool(raw) and isdir(join(raw, "imagesUn")):
        scans = find_unlabeled_images(raw, dataset_json)
    else:
        scans = {name: [] for name in _preprocessed_scans(target.folder)}
    if both := [name for name in sorted(scans) if isfile(join(labeled_folder, name + ".pkl"))]:
        if there:
            raise ValueError(
                f"{listed(both)}: in imagesUn, but still among the labeled cases in {labeled_folder}. If the "
                "label was removed, run `nnssl plan-and-preprocess` once (or remove the case's files there); "
                "else rename the unlabeled scan."
            )
        raise ValueError(
            f"{listed(both)}: preprocessed without label in {target.folder} and with label in "
            f"{labeled_folder}; expected one of the two. Run `nnssl plan-and-preprocess` where the raw data "
            "are, which sets the old one aside, or move the case's files away from one of these folders."
        )
    training = training_files(raw, dataset_json) if isdir(raw) else {}
    images = {name: [file for file in training.get(name, ([], ""))[0] if isfile(file)] for name in hidden}
    cases = [Case(name, tuple(files), "imagesUn") for name, files in scans.items()]
    cases += [Case(name, tuple(files), "imagesTr") for name, files in images.items()]
    return target, sorted(cases, key=lambda case: case.name)


def _preprocessed_scans(folder: str) -> list[str]:
    """Names of preprocessed cases that came from ``imagesUn`` or whose properties are damaged."""
    names = os.listdir(folder) if isdir(folder) else []
    markers = [name for name in names if name.endswith(".pkl") and not name.startswith(".")]
    properties = {name.removesuffix(".pkl"): read_properties(join(folder, name)) for name in markers}
    return [
        case
        for case, content in properties.items()
        if content is None or content.get("nnssl", {}).get("origin") == "imagesUn"
    ]


def set_removed_aside(
    plans_manager: PlansManager,
    configuration: str,
    dataset_json: dict[str, Any],
    raw_dataset_folder: str,
    hidden: Collection[str],
    log: Log = print,
) -> None:
    """Move preprocessed cases that are neither in ``imagesUn`` nor hidden to `<folder>_removed`: where the
    raw data are absent they would be used again. Those that an earlier split hid stay, as they would not.
    Without a folder ``imagesUn`` only scans that have a label now are moved.

    hidden  by any fold
    """
    target = target_of(plans_manager, configuration, dataset_json)
    training = training_files(raw_dataset_folder, dataset_json)
    from_scans = set(_preprocessed_scans(target.folder))
    if isdir(join(raw_dataset_folder, "imagesUn")):
        scans = set(find_unlabeled_images(raw_dataset_folder, dataset_json))
    else:
        scans = from_scans - training.keys()
    names = os.listdir(target.folder) if isdir(target.folder) else []
    there = {
        name.removesuffix(".pkl").removesuffix(".b2nd").removesuffix("_seg")
        for name in names
        if name.endswith((".pkl", ".b2nd"))
    }
    if removed := sorted(there - scans - set(hidden) - (training.keys() - from_scans)):
        files = [file for name in removed for file in reversed(target.files(name)) if isfile(file)]
        aside = set_aside([basename(file) for file in files], target.folder, "_removed")
        log(
            f"Moved {len(removed)} preprocessed scans that are neither in imagesUn nor hidden by a split to "
            f"{aside}: {listed(removed)}"
        )


def ensure_unlabeled(
    plans_manager: PlansManager,
    configuration: str,
    dataset_json: dict[str, Any],
    hidden: Sequence[str] = (),
    num_processes: int | None = None,
    log: Callable[[str], None] = print,
    verbose: bool = False,
    show_progress: bool = True,
) -> list[str]:
    """Preprocess what is missing or stale of ``imagesUn`` and of the `hidden` cases; returns the sorted names
    of all of them.

    hidden  cases of ``imagesTr`` that a split lists as ``unlabeled``

    Where raw images are absent (a cluster with preprocessed data alone) complete cases of the right plan
    serve. Without any unlabeled case the list is empty. Raises ValueError naming the files and what to do;
    finished cases stay.
    """
    target, cases = unlabeled_cases(plans_manager, configuration, dataset_json, hidden)
    orphans = {
        case.name: reason for case in cases if not case.images and (reason := stale_reason(case, target))
    }
    if orphans:
        shown = ", ".join(f"{name} ({reason})" for name, reason in list(orphans.items())[:10])
        raise ValueError(
            f"{len(orphans)} unlabeled cases in {target.folder} have no raw image to preprocess: {shown}. "
            "Set nnUNet_raw to where imagesUn "
            "and imagesTr are, or copy the preprocessed folder from a machine that has them."
        )
    if alone := [case.name for case in cases if not case.images and case.origin == "imagesUn"]:
        log(
            f"{len(alone)} unlabeled scans are there as preprocessed cases alone, for there is no folder "
            f"imagesUn: {target.folder}"
        )
    bring_up_to_date(cases, target, num_processes, log, verbose, show_progress)
    return [case.name for case in cases]
