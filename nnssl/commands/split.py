"""``nnssl split``: hide labels, to measure what unlabeled scans bring."""

from __future__ import annotations

import argparse
import os

from nnunetv2.paths import nnUNet_raw

from nnssl.data.findings import raise_errors
from nnssl.data.inspection import read_dataset_json
from nnssl.data.split import make_splits, training_cases, write_splits
from nnssl.files import read_json
from nnssl.training.lookup import dataset_name, nnunet_folder


def split(args: argparse.Namespace) -> None:
    name = dataset_name(args.d)
    file = os.path.join(nnUNet_raw, name, "dataset.json") if nnUNet_raw.is_set() else ""
    if os.path.isfile(file):
        raise_errors(read_dataset_json(file)[0])
    val = _read_cases(args.val) if args.val is not None else None
    splits = make_splits(training_cases(name), args.labeled, args.unlabeled, val, args.first, args.seed)
    splits_file = os.path.join(nnunet_folder("nnUNet_preprocessed"), name, "splits_final.json")
    saved = write_splits(splits, splits_file)
    if saved:
        print(f"The old split was saved as {saved}.")
    print(f"{splits_file}:")
    for index, fold in enumerate(splits):
        print(
            f"  fold {index}: {len(fold['train'])} labeled, {len(fold['unlabeled'])} unlabeled, "
            f"{len(fold['val'])} validation"
        )
    if any(fold["unlabeled"] for fold in splits):
        print(
            "Training preprocesses the unlabeled images when it starts; `nnssl plan-and-preprocess` does it "
            "now."
        )


def _read_cases(values: list[str]) -> list[str]:
    """Case names from the command line; a single value that is a file is read: a JSON list, or a name per
    line."""
    if len(values) > 1 or not os.path.isfile(values[0]):
        return values
    try:
        with open(values[0], encoding="utf-8-sig") as stream:  # some editors put a mark in front
            text = stream.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"--val: {values[0]} is not UTF-8 ({error.reason}). Save it as UTF-8.") from None
    if not text.lstrip().startswith(("[", "{")):
        return [line.strip() for line in text.splitlines() if line.strip()]
    names = read_json(values[0], "utf-8-sig")
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(
            f"--val: {values[0]} is not a list of names. Give a JSON list of names, or one name per line."
        )
    return names
