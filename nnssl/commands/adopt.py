"""``nnssl adopt``: corrected segmentations make labeled cases of unlabeled scans.

Everything is checked and prepared in folders of its own first. Then one file, the journal, decides: without
it nothing has happened, with it the few moves that are left are carried out, by the next call where this one
is killed.
"""

from __future__ import annotations

import difflib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os.path import basename, dirname, exists, isdir, isfile, islink, join, lexists
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnssl.commands.pseudo_label import unedited
from nnssl.data.dataset_json import declared_labels
from nnssl.data.findings import ERROR, WARNING, Finding, listed, raise_errors
from nnssl.data.freshness import Case, Target, digest
from nnssl.data.inspection import inspect_split, read_dataset_json, reader_of
from nnssl.data.labeled import labeled_cases, old_files
from nnssl.data.names import ADOPTION, JOURNAL, inspect_labeled_names, inspect_unlabeled_names
from nnssl.data.preprocess import bring_up_to_date
from nnssl.data.raw import num_channels, training_files
from nnssl.data.scans import OFF_GRID, Scan, inspect_labels, inspect_scans, measure
from nnssl.data.split import NNUNET_FOLDS, Fold, load_splits, nnunet_split, unused_backup
from nnssl.data.unlabeled import find_unlabeled_images
from nnssl.datasets import is_plan
from nnssl.files import copy_file, move_across, read_json, write_json
from nnssl.training.lock import trainings_of

Operations = list[list[str]]  # [move, from, to], [copy, from, to] or [remove, path]


@dataclass(frozen=True)
class Adopted:
    """One case: its images in imagesUn, and the corrected segmentation."""

    name: str
    images: tuple[str, ...]
    label: str


def adopt(
    dataset_id: int,
    corrected: str,
    dry_run: bool = False,
    accept_unedited: bool = False,
    num_processes: int | None = None,
) -> None:
    """Move the scans of `corrected` from imagesUn to imagesTr, with their segmentations as labels.

    New cases join the training part of every fold and of no fold the validation; plan, fingerprint and
    trained models stay. They are preprocessed for every plan that labeled cases are preprocessed for.
    Nothing is changed where one file is wrong.
    """
    name = str(convert_id_to_dataset_name(dataset_id))
    # absolute, because the journal may be read from another working directory
    raw, preprocessed = (os.path.abspath(join(folder, name)) for folder in (nnUNet_raw, nnUNet_preprocessed))
    if isdir(raw) and isdir(preprocessed) and os.path.samefile(raw, preprocessed):
        raise ValueError(
            f"nnUNet_raw and nnUNet_preprocessed are the same folder, {dirname(raw)}. Set them to two."
        )
    staging = (join(raw, ADOPTION), join(preprocessed, ADOPTION))
    _refuse_while_training(name)
    if isfile(join(staging[0], JOURNAL)):
        if dry_run:
            raise ValueError(
                f"{staging[0]}: an adoption was interrupted. Rerun without --dry-run to finish it."
            )
        _carry_out(staging)
        print("Finished the adoption that was interrupted.")
    findings, dataset_json = read_dataset_json(join(raw, "dataset.json"))
    raise_errors(findings)
    raise_errors([*inspect_labeled_names(raw, dataset_json), *inspect_unlabeled_names(raw, dataset_json)])
    cases = _find(raw, dataset_json, corrected)
    if not cases:
        print(f"{corrected}: every case is labeled already; nothing is left to adopt.")
        return
    if not accept_unedited and (same := unedited(corrected, [case.name for case in cases])):
        raise ValueError(
            f"{corrected}: {listed(same)} as predicted, not corrected. Put the files that somebody has "
            "checked into a folder of their own, or, if all were checked, add --accept-unedited."
        )
    problems = list(_inspect(raw, preprocessed, dataset_json, cases))
    for finding in problems:
        if finding.level == WARNING:
            print(f"WARNING: {finding}")
    raise_errors(problems)
    _refuse_unwritable(raw, preprocessed)
    known = sorted(training_files(raw, dataset_json))
    splits = _new_splits(raw, preprocessed, known, [case.name for case in cases])
    targets = _targets(raw, preprocessed)
    print(f"{len(cases)} cases to adopt: {listed([case.name for case in cases])}")
    for file, (folds, how) in splits.items():
        print(f"{file}: {how}, {len(folds)} folds; the new cases train in each.")
    for target in targets:
        print(f"{target.folder}: preprocessed for {target.plans_manager.plans_name}.")
    if dry_run:
        print("Nothing was changed (--dry-run).")
        return
    shutil.rmtree(
        staging[0], ignore_errors=True
    )  # preparations without a journal; preprocessed cases are kept
    _prepare(raw, preprocessed, staging, cases, known, splits, targets, num_processes)
    _carry_out(staging)
    print(f"{name}: {len(known) + len(cases)} labeled cases, {len(cases)} of them new.")


# what is there


def _find(raw: str, dataset_json: dict[str, Any], corrected: str) -> list[Adopted]:
    """The corrected cases that are still unlabeled; ValueError for every name that does not fit."""
    if not isdir(corrected):
        raise ValueError(f"{corrected}: no such folder. Give the one with the corrected segmentations.")
    ending = dataset_json["file_ending"]
    names = sorted(n for n in os.listdir(corrected) if n.endswith(ending) and not n.startswith("."))
    if not names:
        raise ValueError(f"{corrected}: no file {ending} (file_ending in dataset.json).")
    scans, training = find_unlabeled_images(raw, dataset_json), training_files(raw, dataset_json)
    cases, findings = [], []
    for file in (join(corrected, name) for name in names):
        case = basename(file).removesuffix(ending)
        if case in scans:
            cases.append(Adopted(case, tuple(scans[case]), file))
        elif case in training:
            label = training[case][1]
            if not isfile(label) or digest(label) != digest(file):
                remedy = "Nothing is overwritten; remove the file here, or correct the label there by hand"
                findings.append(Finding(ERROR, file, f"{case} is labeled already ({label})", "", remedy))
        else:
            near = difflib.get_close_matches(case, scans, 1)
            remedy = f"Is {near[0]}{ending} meant? Rename it" if near else "Rename or remove it"
            findings.append(Finding(ERROR, file, "no scan of this name in imagesUn", "", remedy))
    for name in sorted(set(os.listdir(corrected)) - set(names)):
        meant = next((scan for scan in scans if name.startswith(f"{scan}.")), None)
        if meant is None or name.endswith(".json"):  # TIFF has a second file
            continue
        if f"{meant}{ending}" in names:
            print(f"WARNING: {join(corrected, name)} is not used, {meant}{ending} is.")
            continue
        remedy = f"Save it as {meant}{ending}, or remove it"
        findings.append(Finding(ERROR, join(corrected, name), "another file format", ending, remedy))
    raise_errors(findings)
    for adopted in cases:
        labels = Case(adopted.name, (adopted.label,), "imagesUn").sources  # TIFF has a second file
        places = [(file, join(raw, "labelsTr", basename(file))) for file in labels]
        taken = [place for file, place in places if exists(place) and digest(place) != digest(file)]
        images = Case(adopted.name, adopted.images, "imagesUn").sources
        taken += [f for f in (join(raw, "imagesTr", basename(image)) for image in images) if lexists(f)]
        if taken:
            raise ValueError(f"{taken[0]} exists already, and nothing is overwritten. Move it away.")
    return cases


def _inspect(
    raw: str, preprocessed: str, dataset_json: dict[str, Any], cases: Sequence[Adopted]
) -> Iterator[Finding]:
    """Values, grid and readability of the segmentations and their images."""
    scans = [Scan(case.name, "imagesTr", case.images) for case in cases]
    scans += [Scan(case.name, "labelsTr", (case.label,)) for case in cases]
    reader = reader_of(dataset_json, [case.images[0] for case in cases])
    bar = partial(tqdm, desc="inspection", unit="file", mininterval=0.5, disable=None)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(scans, reader, num_channels(dataset_json), folder, progress=bar)
    yield from inspect_scans(measured)
    for finding in inspect_labels(measured, declared_labels(dataset_json)):
        if finding.found == OFF_GRID:
            remedy = "Save it on the grid of its image: an editor may have turned or shifted the voxels, too"
            finding = replace(finding, level=ERROR, remedy=remedy)
        yield finding


def _refuse_while_training(dataset: str) -> None:
    """ValueError naming the trainings that read what an adoption moves."""
    running = trainings_of(join(str(nnUNet_results), dataset)) if nnUNet_results.is_set() else []
    if running:
        raise ValueError(
            f"{dataset} is being trained on, and an adoption moves scans that the training reads:\n"
            + "\n".join(f"  - {line}" for line in running)
            + "\nWait for it or end it, then adopt, and train anew."
        )


def _refuse_unwritable(raw: str, preprocessed: str) -> None:
    """ValueError before anything is written."""
    parts = [join(raw, name) for name in ("imagesTr", "labelsTr", "imagesUn")]
    for folder in parts:
        if islink(folder):
            raise ValueError(
                f"{folder} is a link to {os.path.realpath(folder)}, where files would be moved. Make it a "
                "folder (of links to the files, if you like)."
            )
    for folder in [raw, *parts, *([preprocessed] if isdir(preprocessed) else [])]:
        if isdir(folder) and not os.access(folder, os.W_OK):
            raise ValueError(f"{folder} cannot be written. Adopt where it can.")


def _new_splits(
    raw: str, preprocessed: str, known: Sequence[str], new: Sequence[str]
) -> dict[str, tuple[list[Fold], str]]:
    """{splits file: its folds with the new cases, what was done}."""
    files = [join(folder, "splits_final.json") for folder in (raw, preprocessed)]
    found = {}
    for file in (file for file in files if isfile(file)):
        raise_errors(inspect_split(file, known))
        found[file] = ([_joined(fold, new) for fold in load_splits(file)], "extended")
    if not found and isdir(preprocessed) and len(known) >= NNUNET_FOLDS:
        # nnU-Net's own, of the old cases: left alone it would draw new folds, and validate on new cases
        folds = nnunet_split(known)
        plain = [{key: [str(case) for case in fold[key]] for key in ("train", "val")} for fold in folds]
        found[files[1]] = ([_joined(fold, new) for fold in plain], "made as nnU-Net would have before")
    return found


def _joined(fold: Fold, new: Sequence[str]) -> Fold:
    joined = {**fold, "train": [*fold["train"], *(case for case in new if case not in fold["train"])]}
    return {k: [c for c in v if k == "train" or c not in new] for k, v in joined.items()}


def _targets(raw: str, preprocessed: str) -> list[Target]:
    """Every folder of preprocessed labeled cases, with a plan that it belongs to."""
    found: dict[str, Target] = {}
    if not isfile(join(preprocessed, "dataset.json")):
        return []
    dataset_json = read_json(join(preprocessed, "dataset.json"))
    names = [file for file in os.listdir(preprocessed) if file.endswith(".json") and file[0] != "."]
    contents = {file: read_json(join(preprocessed, file)) for file in sorted(names)}
    found_plans = {file: content for file, content in contents.items() if is_plan(content)}
    # a copy of a plan ("nnUNetPlans-old.json") keeps its name inside; the one called so comes first
    for file in sorted(found_plans, key=lambda file: file != f"{found_plans[file]['plans_name']}.json"):
        content = found_plans[file]
        if content.get("dataset_name") != basename(preprocessed):
            raise ValueError(
                f"{join(preprocessed, file)}, key dataset_name: is {content.get('dataset_name')!r}, "
                f"whose data would be changed; expected {basename(preprocessed)!r}. Correct or remove it."
            )
        plans = PlansManager(content)
        for configuration in plans.available_configurations:
            target, _ = labeled_cases(plans, configuration, dataset_json, raw)
            if not isdir(target.folder):
                continue
            if old := old_files(target.folder):
                raise ValueError(
                    f"{target.folder}: {listed(old)} of nnU-Net before 2.6, which has another format now and "
                    "refuses a folder with both. Run nnssl plan-and-preprocess first."
                )
            found.setdefault(target.folder, target)
    return list(found.values())


# what is changed


def _prepare(
    raw: str,
    preprocessed: str,
    staging: tuple[str, str],
    cases: Sequence[Adopted],
    known: Sequence[str],
    splits: dict[str, tuple[list[Fold], str]],
    targets: Sequence[Target],
    num_processes: int | None,
) -> None:
    """Preprocess and write everything aside, the journal last."""
    labels, truth = join(staging[0], "labelsTr"), join(staging[1], "gt_segmentations")
    os.makedirs(labels)
    new, begin, end = [case.name for case in cases], Operations(), Operations()
    labeled = []
    for case in cases:
        for file in Case(case.name, (case.label,), "imagesTr").sources:  # TIFF has a second file
            copy_file(file, join(labels, basename(file)))
            begin.append(["move", join(labels, basename(file)), join(raw, "labelsTr", basename(file))])
        if isdir(join(preprocessed, "gt_segmentations")):
            os.makedirs(truth, exist_ok=True)
            copy_file(case.label, join(truth, basename(case.label)))
            place = join(preprocessed, "gt_segmentations", basename(case.label))
            begin.append(["move", join(truth, basename(case.label)), place])
        images = Case(case.name, case.images, "imagesUn").sources
        end += [["move", file, join(raw, "imagesTr", basename(file))] for file in images]
        copy = join(labels, basename(case.label))
        labeled.append(Case(case.name, case.images, "imagesTr", copy))
    for target in targets:
        aside = replace(target, folder=join(staging[1], basename(target.folder)))
        bring_up_to_date(labeled, aside, num_processes)
        for name in new:
            moves = zip(aside.files(name), target.files(name), strict=True)
            end += [["move", source, destination] for source, destination in moves]
    for folder in os.listdir(preprocessed) if isdir(preprocessed) else []:
        if folder.endswith("_unlabeled"):
            stems = [join(preprocessed, folder, name) for name in new]
            begin += [
                ["remove", stem + suffix] for stem in stems for suffix in (".pkl", ".b2nd", "_seg.b2nd")
            ]
    added = {
        case.name: {
            "images": [f"imagesTr/{basename(file)}" for file in case.images],
            "label": f"labelsTr/{basename(case.label)}",
        }
        for case in cases
    }
    for folder, aside_folder in zip((raw, preprocessed), staging, strict=True):
        file = join(folder, "dataset.json")
        if isfile(file):
            content = {**read_json(file), "numTraining": len(known) + len(new)}
            if "dataset" in content:
                content["dataset"] = {**content["dataset"], **added}
            end.append(_rewrite(content, file, aside_folder))
        file = join(folder, "splits_final.json")
        if file in splits:
            if isfile(file):
                begin.append(["copy", file, unused_backup(file)])
            end.append(_rewrite(splits[file][0], file, aside_folder))
    write_json(begin + end, join(staging[0], JOURNAL), indent=1)


def _rewrite(content: Any, file: str, folder: str) -> list[str]:
    os.makedirs(folder, exist_ok=True)
    write_json(content, join(folder, basename(file)))
    return ["move", join(folder, basename(file)), file]


def _carry_out(staging: tuple[str, str]) -> None:
    """Do what the journal lists, as far as it is not done yet."""
    journal = join(staging[0], JOURNAL)
    try:
        for kind, *paths in read_json(journal):
            if kind == "move":
                _move(*paths)
            elif kind == "copy":
                if not lexists(paths[1]):
                    copy_file(*paths)
            elif lexists(paths[0]):
                os.unlink(paths[0])
    except OSError as error:
        raise RuntimeError(
            f"{error}. The adoption is half done, nothing is lost: clear the cause and rerun to finish it."
        ) from error
    shutil.rmtree(staging[1], ignore_errors=True)
    os.unlink(journal)
    shutil.rmtree(staging[0], ignore_errors=True)


def _move(source: str, destination: str) -> None:
    """A file or a link, from one disk to another if need be; done where only `destination` is there."""
    if not lexists(source):
        if not lexists(destination):
            raise FileNotFoundError(f"{source}: gone, and not at {destination} either")
        return
    os.makedirs(dirname(destination), exist_ok=True)
    if islink(source):
        pointed = os.readlink(source)
        if not os.path.isabs(pointed):  # relative to where the link is
            pointed = os.path.relpath(join(dirname(source), pointed), dirname(destination))
        if not lexists(destination):
            os.symlink(pointed, destination)
        os.unlink(source)
        return
    move_across(source, destination)
