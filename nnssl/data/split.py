"""Splits in which labels are hidden: nnU-Net's ``splits_final.json`` with one more key per fold,
``unlabeled`` (nnU-Net ignores it)."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from os.path import dirname, isdir, isfile, join
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnssl.data.freshness import read_properties
from nnssl.data.raw import cases_in, training_files
from nnssl.files import copy_file, read_json, write_json

NNUNET_SEED, NNUNET_FOLDS = 12345, 5  # nnUNetTrainer.do_split
Fold = dict[str, list[str]]


def load_splits(splits_file: str) -> list[Fold]:
    """The folds; ValueError naming the file if it is not a list of {train: [...], val: [...], unlabeled:
    [...] (optional)}."""
    splits = read_json(splits_file)
    try:
        keys = [(fold["train"], fold["val"], fold.get("unlabeled", [])) for fold in splits]
        fine = isinstance(splits, list) and all(
            isinstance(cases, list) and all(isinstance(case, str) for case in cases)
            for fold in keys
            for cases in fold
        )
    except (KeyError, TypeError, AttributeError):
        fine = False
    if not fine:
        raise ValueError(
            f"{splits_file}: expected a list of folds with the keys train, val and (optional) unlabeled. "
            "Repair or remove it."
        )
    return splits


def hidden_cases(splits_file: str, fold: int | str, known: Collection[str]) -> list[str]:
    """Cases of ``imagesTr`` that fold `fold` uses without their labels; empty if the file or the key is
    absent.

    known  all cases of ``imagesTr``

    Raises ValueError naming file and key: hidden cases that are also trained or validated on, unknown cases,
    and, where any fold hides labels, ``all`` and folds beyond the file, for which nnU-Net would train on
    every label there is.
    """
    if not isfile(splits_file):
        return []
    splits = load_splits(splits_file)
    hiding = any(entry.get("unlabeled") for entry in splits)
    if fold == "all" or int(fold) >= len(splits):
        if not hiding:
            return []
        what = "fold all" if fold == "all" else f"fold {fold}, of {len(splits)} in the file,"
        choice = f"one of the folds 0 to {len(splits) - 1}" if len(splits) > 1 else "fold 0"
        raise ValueError(
            f"{splits_file} hides labels (key unlabeled), but {what} would train on them. Choose {choice}, "
            "or move the file away to train on all labels."
        )
    entry = splits[int(fold)]
    hidden = entry.get("unlabeled", [])
    for key in ("train", "val"):
        if overlap := sorted(set(hidden) & set(entry[key])):
            raise ValueError(
                f"{splits_file}, fold {fold}: {_some(overlap)} in unlabeled and in {key}. Remove from one "
                "of the two."
            )
    for key in ("train", "val", "unlabeled"):
        if unknown := sorted(set(entry.get(key, [])) - set(known)):
            raise ValueError(
                f"{splits_file}, fold {fold}, key {key}: {_some(unknown)} no case of imagesTr that was "
                "preprocessed. Remove from the list, "
                "or add to imagesTr and run `nnssl plan-and-preprocess` (scans in imagesUn are always used "
                "and never listed)."
            )
    return sorted(set(hidden))


def make_splits(
    cases: Sequence[str],
    labeled: int,
    unlabeled: int | None,
    val: Sequence[str] | None,
    first: bool,
    seed: int,
) -> list[Fold]:
    """Folds with `labeled` training cases each, and the others (at most `unlabeled`, if given) without label.

    val    validation cases of a single fold; None: nnU-Net's own five seeded folds, whose validation cases
           stay what they are; of fewer than five cases each fold leaves one out
    first  choose in name order; else at random under `seed`, so that a smaller choice is part of a larger one

    Raises ValueError where the numbers or names cannot be had.
    """
    names = sorted(cases)
    if seed < 0:
        raise ValueError(f"--seed {seed}: expected 0 or more.")
    if val is None:
        if len(names) < 2:
            raise ValueError(f"{len(names)} labeled case(s): a split needs two. Train with fold all.")
        folds = nnunet_split(names)
    else:
        if unknown := sorted(set(val) - set(names)):
            raise ValueError(
                f"--val: {_some(unknown)} not in the dataset's imagesTr ({len(names)} cases, e.g. "
                f"{', '.join(names[:3])})."
            )
        if not val or len(set(val)) < len(val):
            raise ValueError("--val: a case is named twice." if val else "--val: no case is named.")
        folds = [{"train": [name for name in names if name not in set(val)], "val": sorted(val)}]
    splits: list[Fold] = []
    for index, fold in enumerate(folds):
        pool = [str(name) for name in fold["train"]]
        if not 1 <= labeled <= len(pool):
            raise ValueError(
                f"--labeled {labeled}: fold {index} has {len(pool)} training cases; choose 1 to {len(pool)}."
            )
        rest = len(pool) - labeled
        if unlabeled is not None and not 0 <= unlabeled <= rest:
            raise ValueError(
                f"--unlabeled {unlabeled}: fold {index} has {rest} cases left beside {labeled} labeled; "
                f"choose 0 to {rest}."
            )
        order = (
            pool if first else [pool[i] for i in np.random.default_rng([seed, index]).permutation(len(pool))]
        )
        hidden = order[labeled:] if unlabeled is None else order[labeled : labeled + unlabeled]
        splits.append(
            {
                "train": sorted(order[:labeled]),
                "val": [str(name) for name in fold["val"]],
                "unlabeled": sorted(hidden),
            }
        )
    return splits


def nnunet_split(cases: Sequence[str]) -> list[Fold]:
    """nnU-Net's own folds: five, always the same; of fewer than five cases each leaves one out."""
    number = min(NNUNET_FOLDS, len(cases))
    return generate_crossval_split(sorted(cases), seed=NNUNET_SEED, n_splits=number)


def write_splits(splits: list[Fold], splits_file: str) -> str | None:
    """Write whole or not at all; an existing file of other content is kept as ``.bak``, ``.bak1``, ...:
    returns that path."""
    saved = None
    if isfile(splits_file):
        try:
            if read_json(splits_file) == splits:
                return None
        except ValueError:
            pass  # damaged, and kept all the same
        saved = backup(splits_file)
    os.makedirs(dirname(splits_file), exist_ok=True)
    write_json(splits, splits_file)
    return saved


def backup(path: str) -> str:
    """Copy a file to its `unused_backup`; returns that name."""
    target = unused_backup(path)
    copy_file(path, target)
    return target


def unused_backup(path: str) -> str:
    """The first free name of ``<path>.bak``, ``<path>.bak1``, ..."""
    number, target = 0, path + ".bak"
    while os.path.lexists(target):
        number += 1
        target = f"{path}.bak{number}"
    return target


def training_cases(dataset_name: str) -> list[str]:
    """Sorted names of the dataset's cases with label, from nnUNet_raw or else from what was preprocessed."""
    raw = join(nnUNet_raw, dataset_name) if nnUNet_raw.is_set() else ""
    if raw and isfile(join(raw, "dataset.json")):
        cases = sorted(training_files(raw, read_json(join(raw, "dataset.json"))))
        if cases:
            return cases
    folder = join(nnUNet_preprocessed, dataset_name, "gt_segmentations")
    dataset_json = join(nnUNet_preprocessed, dataset_name, "dataset.json")
    if not (isdir(folder) and isfile(dataset_json)):
        raw_folder = join(raw, "imagesTr") if raw else "nnUNet_raw (not set)"
        raise ValueError(
            f"{dataset_name}: no cases in {raw_folder}, nor preprocessed ones in {dirname(folder)}."
        )
    return cases_in(folder, read_json(dataset_json)["file_ending"])


def absent_classes(dataset: Any, cases: Sequence[str], label_manager: Any) -> list[int | tuple[int, ...]]:
    """Foreground labels (or regions, as tuples) of which no labeled case in `cases` has a voxel: they cannot
    be learned.

    dataset        nnU-Net's dataset or the folder of the preprocessed labeled cases; only the properties of
                   `cases` are read
    label_manager  nnU-Net's, of the plan
    """
    folder = getattr(dataset, "source_folder", dataset)
    classes = (
        label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
    )
    absent = [tuple(int(label) for label in c) if isinstance(c, (tuple, list)) else int(c) for c in classes]
    for case in cases:
        if not absent:
            break
        properties = read_properties(join(folder, case + ".pkl"))
        if properties is None or "class_locations" not in properties:
            raise ValueError(
                f"{join(folder, case)}.pkl: absent or damaged. Run `nnssl plan-and-preprocess` to redo the "
                "case."
            )
        absent = [c for c in absent if len(properties["class_locations"].get(c, ())) == 0]
    return absent


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (
        f" and {len(names) - 5} more are" if len(names) > 5 else " is" if len(names) == 1 else " are"
    )
