"""The files of a raw dataset by their names: which belong to which case, and which nobody would take.

Nothing is opened but the small spacing files of TIFF images.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from os.path import basename, isdir, isfile, islink, join, lexists, split
from shlex import quote
from typing import Any

from nnssl.data.dataset_json import inspect_case_name
from nnssl.data.findings import ERROR, WARNING, Finding, listed
from nnssl.data.formats import NOT_UTF8, NOT_UTF8_REMEDY, is_utf8
from nnssl.data.raw import channel_files, num_channels, training_files
from nnssl.files import ALLOW_READING, may_read, read_json

FOLDERS = ("imagesTr", "labelsTr", "imagesUn")
ADOPTION, JOURNAL = "nnssl_adopt", "journal.json"  # folder of `nnssl adopt`, and what makes it binding


def inspect_names(raw: str, dataset_json: Mapping[str, Any]) -> Iterator[Finding]:
    """Everything that the names in a raw dataset tell; `dataset_json` must be sound."""
    yield from _folders(raw, dataset_json)
    yield from inspect_labeled_names(raw, dataset_json)
    yield from inspect_unlabeled_names(raw, dataset_json)
    yield from _capitals(raw, dataset_json)
    yield from inspect_spacing_files(raw, dataset_json)


def inspect_adoption(raw: str) -> Iterator[Finding]:
    """An adoption of corrected segmentations that was killed halfway."""
    if isfile(join(raw, ADOPTION, JOURNAL)):
        yield Finding(
            ERROR,
            join(raw, ADOPTION),
            "an adoption was interrupted",
            remedy="Rerun `nnssl adopt` to finish it",
        )


def inspect_access(*folders: str) -> Iterator[Finding]:
    """Folders that may not be read, or not entered: their files would seem to be absent."""
    for folder in folders:
        if isdir(folder) and not may_read(folder):
            yield Finding(ERROR, folder, "permission denied", "a folder to read and enter", ALLOW_READING)


def _folders(raw: str, dataset_json: Mapping[str, Any]) -> Iterator[Finding]:
    """Folders whose names are nearly those that are read."""
    present = [name for name in os.listdir(raw) if isdir(join(raw, name))]
    for wanted in FOLDERS if "dataset" not in dataset_json else ("imagesUn",):
        for name in sorted(set(present) - {*FOLDERS, "imagesTs", "labelsTs", "imagesVal", "labelsVal"}):
            letters = re.sub("[^a-z]", "", name.lower())
            near = difflib.SequenceMatcher(None, letters, wanted.lower()).ratio() > 0.85
            unlabeled = wanted == "imagesUn" and ("unlab" in letters or letters.startswith("imagesun"))
            same = letters == wanted.lower()  # beside the right one an old copy is none of our business
            if same or (wanted not in present and (near or unlabeled)):
                yield Finding(
                    WARNING,
                    join(raw, name),
                    "a folder that is not read",
                    remedy=f"Is {wanted} meant? Rename it",
                )


def _expected_channels(raw: str, dataset_json: Mapping[str, Any]) -> list[int]:
    expected = list(range(num_channels(dataset_json)))
    training = training_files(raw, dataset_json)
    if len(expected) > 1 and training and all(len(images) == 1 for images, _ in training.values()):
        return [0]  # all channels in one file, e.g. RGB; their number is checked on reading
    return expected


def _channels(folder: str, cases: Mapping[str, Mapping[int, str]], expected: list[int]) -> Iterator[Finding]:
    for case, files in cases.items():
        if sorted(files) != expected:
            found, wanted = (
                ", ".join(f"_{channel:04d}" for channel in channels) for channels in (sorted(files), expected)
            )
            remedy = "Add or remove files so that they agree"
            if expected == [0]:  # often the number of the patient
                name = f"{case}_{min(files):04d}"
                ending = basename(files[min(files)]).removeprefix(name)
                remedy = (
                    f"If the number is the patient's, append that of the channel ({name}_0000{ending}); else "
                    "add or remove files so that they agree"
                )
            yield Finding(
                ERROR,
                f"{join(folder, case)}*",
                f"channels {found} found",
                f"{wanted} (channel_names in dataset.json)",
                remedy,
            )


def inspect_labeled_names(raw: str, dataset_json: Mapping[str, Any]) -> Iterator[Finding]:
    """imagesTr and labelsTr, or what the key `dataset` lists."""
    training = training_files(raw, dataset_json)
    for case, (images, label) in training.items():
        for file in (*images, label):
            if isfile(file) and not is_utf8(file):
                yield Finding(ERROR, file, NOT_UTF8, remedy=NOT_UTF8_REMEDY)
            elif not isfile(file):
                found = "dangling link" if islink(file) else f"missing (case {case})"
                remedy = (
                    "Add it, or move the scan into imagesUn"
                    if file == label
                    else "Restore it, or remove the case"
                )
                if _in_other_form(file):
                    found += ", but the same name is there in the other Unicode form (ü as one sign or two)"
                    remedy = (
                        f"Rename all to one form: `convmv -r -f utf8 -t utf8 --nfc --notest {quote(raw)}`"
                    )
                yield Finding(ERROR, file, found, "", remedy)
    if training and dataset_json.get("numTraining") != len(training):
        yield Finding(
            WARNING,
            f"{join(raw, 'dataset.json')}, key numTraining",
            f"is {dataset_json.get('numTraining')}",
            f"{len(training)}, the number of labeled cases (scans of imagesUn are never counted)",
            "nnU-Net's planning uses it; correct it",
        )
    if "dataset" in dataset_json:
        return
    ending, folder, labels = dataset_json["file_ending"], join(raw, "imagesTr"), join(raw, "labelsTr")
    cases, odd = channel_files(folder, ending)
    if hidden := _hidden(folder, ending):
        found = f"{listed(hidden)}: hidden, but nnU-Net takes every file *{ending} here for a case"
        yield Finding(ERROR, folder, found, remedy=HIDDEN_REMEDY)
    yield from _ignored(labels, ending)
    for name in odd:
        yield Finding(
            ERROR,
            join(folder, name),
            "no channel number",
            f"<case>_0000{ending}",
            "Rename or remove the file",
        )
    yield from _channels(folder, cases, _expected_channels(raw, dataset_json))
    for case in cases:
        yield from inspect_case_name(case, join(folder, case) + "*")
    taken = {basename(file) for files in cases.values() for file in files.values()} | set(odd)
    yield from _left_out(folder, taken, cases.keys(), f"<case>_0000{ending}")
    yield from _left_out(labels, {case + ending for case in cases}, cases.keys(), f"<case>{ending}")


def _in_other_form(file: str) -> bool:
    """Whether the folder has a name that looks the same: macOS and others write letters in two forms."""
    folder, name = split(file)
    if name.isascii() or not isdir(folder):
        return False
    return any(
        unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name)
        for other in os.listdir(folder)
    )


def inspect_unlabeled_names(raw: str, dataset_json: Mapping[str, Any]) -> Iterator[Finding]:
    """imagesUn. Dangling links and folders that bear the name of a scan are not taken."""
    folder, ending = join(raw, "imagesUn"), dataset_json["file_ending"]
    if lexists(folder) and not isdir(folder):
        what = "a file" if isfile(folder) else "dangling link"
        yield Finding(ERROR, folder, what, "a folder", "Correct or remove it")
    if closed := list(inspect_access(folder)):
        yield from closed
        return
    cases, odd = unlabeled_files(raw, dataset_json)
    yield from _ignored(folder, ending)
    example = f"<case>_0000{ending}"
    for name in odd:
        yield Finding(
            ERROR, join(folder, name), "no channel number", f"{example}, as in imagesTr", "Rename it"
        )
    yield from _channels(folder, cases, _expected_channels(raw, dataset_json))
    for file in (file for files in cases.values() for file in files.values() if not is_utf8(file)):
        yield Finding(ERROR, file, NOT_UTF8, remedy=NOT_UTF8_REMEDY)
    for case in cases:
        yield from inspect_case_name(case, join(folder, case) + "*")
    training = training_files(raw, dataset_json)
    for case in sorted(cases.keys() & training.keys()):
        yield Finding(
            ERROR,
            f"{join(folder, case)}*",
            "a labeled case in imagesTr has the same name",
            remedy="Rename the unlabeled scan, or remove it if it is the same image",
        )
    tests = channel_files(join(raw, "imagesTs"), ending)[0]
    if both := sorted(cases.keys() & tests.keys()):
        found = f"{listed(both)}: also in imagesTs"
        remedy = "Remove them here if they are the same scans: a test on scans that were trained on flatters"
        yield Finding(WARNING, folder, found, remedy=remedy)
    taken = {basename(file) for files in cases.values() for file in files.values()} | set(odd)
    left_out = list(_left_out(folder, taken, cases.keys(), example))
    if left_out and not cases and not odd:
        yield Finding(ERROR, *_parts(left_out[0]))
    else:
        yield from left_out


def _parts(finding: Finding) -> tuple[str, str, str, str]:
    return finding.place, finding.found, finding.expected, finding.remedy


def unlabeled_files(raw: str, dataset_json: Mapping[str, Any]) -> tuple[dict[str, dict[int, str]], list[str]]:
    """As `channel_files` of imagesUn, without what is no file: folders and dangling links."""
    cases, odd = channel_files(join(raw, "imagesUn"), dataset_json["file_ending"])
    there = {case: {c: file for c, file in files.items() if isfile(file)} for case, files in cases.items()}
    return {case: files for case, files in there.items() if files}, odd


HIDDEN_REMEDY = "Remove them: macOS leaves such files, `find -name '._*' -delete` finds all"


def _hidden(folder: str, ending: str) -> list[str]:
    """Names with a leading dot that would be read without it."""
    names = os.listdir(folder) if isdir(folder) else []
    return sorted(name for name in names if name.startswith(".") and name.endswith(ending))


def _ignored(folder: str, ending: str) -> Iterator[Finding]:
    if hidden := _hidden(folder, ending):
        yield Finding(WARNING, folder, f"{listed(hidden)}: hidden, ignored", remedy=HIDDEN_REMEDY)


def _left_out(folder: str, taken: set[str], cases: Any, expected: str) -> Iterator[Finding]:
    """One finding that names everything in a folder that is not read."""
    names = []
    for name in sorted(os.listdir(folder)) if isdir(folder) else []:
        path, sidecar = join(folder, name), name.endswith(".json") and name.removesuffix(".json") in cases
        if name in taken or name.startswith(".") or sidecar:
            continue
        what = "folder" if isdir(path) else "dangling link" if islink(path) and not isfile(path) else ""
        names.append(f"{name} ({what})" if what else name)
    if names:
        yield Finding(
            WARNING,
            folder,
            f"not taken: {listed(names)}",
            f"names like {expected} (file_ending in dataset.json)",
            "Convert, rename or move them, or remove them",
        )


def _capitals(raw: str, dataset_json: Mapping[str, Any]) -> Iterator[Finding]:
    """Cases that are one and the same where file names know no capitals."""
    names = [*training_files(raw, dataset_json), *unlabeled_files(raw, dataset_json)[0]]
    groups: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        groups.setdefault(name.lower(), []).append(name)
    for group in groups.values():
        if len(group) > 1:
            yield Finding(
                WARNING,
                raw,
                f"cases {', '.join(group)} differ in capitals only",
                remedy="They overwrite each other on macOS and Windows; rename or remove one",
            )


def inspect_spacing_files(raw: str, dataset_json: Mapping[str, Any]) -> Iterator[Finding]:
    """3D TIFF: the spacing stands in ``<case>.json`` beside the images; else nnU-Net takes (1, 1, 1)."""
    ending = dataset_json["file_ending"]
    if ending.lower() not in (".tif", ".tiff"):
        return
    with_spacing: list[str] = []
    without: list[str] = []
    for origin in ("imagesTr", "imagesUn"):
        folder = join(raw, origin)
        cases, _ = channel_files(folder, ending)
        for case in cases:
            file = join(folder, case + ".json")
            (with_spacing if isfile(file) else without).append(file)
        for name in sorted(os.listdir(folder)) if isdir(folder) else []:
            case = re.sub(r"_\d{4}$", "", name.removesuffix(".json"))
            if name.endswith(".json") and case in cases and name.removesuffix(".json") not in cases:
                with_spacing.append(join(folder, name))
                yield Finding(
                    ERROR,
                    join(folder, name),
                    "a spacing file that is not read",
                    f"{case}.json",
                    "Rename it: the name has no channel number",
                )
    for file in with_spacing:
        yield from _spacing_file(file)
    for file in without if with_spacing else []:
        yield Finding(
            ERROR,
            file,
            "no spacing file, other cases have one",
            '{"spacing": [z, y, x]} in mm',
            "Add it: nnU-Net would take (1, 1, 1)",
        )


def _spacing_file(file: str) -> Iterator[Finding]:
    try:
        content = read_json(file)
        spacing = content["spacing"]
        fine = len(spacing) == 3 and all(
            isinstance(s, (int, float)) and 0 < s < float("inf") for s in spacing
        )
    except (ValueError, KeyError, TypeError, OSError):
        fine = False
    if not fine:
        yield Finding(
            ERROR,
            file,
            "no valid spacing file",
            '{"spacing": [z, y, x]}, three positive numbers in mm',
            "Correct it",
        )


def missing_spacing_files(raw: str, dataset_json: Mapping[str, Any]) -> Iterator[Finding]:
    """For a plan with nnU-Net's reader of 3D TIFF: no case has a spacing file at all."""
    folders = [join(raw, origin) for origin in ("imagesTr", "imagesUn")]
    cases = [
        (folder, case) for folder in folders for case in channel_files(folder, dataset_json["file_ending"])[0]
    ]
    if cases and not any(isfile(join(folder, case + ".json")) for folder, case in cases):
        yield Finding(
            WARNING,
            raw,
            "no case of this TIFF dataset has a spacing file: nnU-Net takes (1, 1, 1)",
            "<case>.json beside the images if their spacings differ",
        )
