"""``dataset.json``: every key that nnU-Net reads, its type and its meaning."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from os.path import expandvars, isabs, normpath
from typing import Any

from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES, recursive_find_reader_writer_by_name

from nnssl.data.findings import ERROR, WARNING, Finding

Content = Mapping[str, Any]
Check = Callable[[str, Content], Iterator[Finding]]
KEYS = (
    *("channel_names", "modality", "labels", "numTraining", "file_ending"),
    *("regions_class_order", "overwrite_image_reader_writer", "dataset"),
)
DETACHED = (".mhd", ".nhdr", ".hdr", ".img")
NOT_IN_CAPITALS = (".nii.gz", ".nii", ".gipl", ".mha")  # read by SimpleITK, not written
DESCRIPTIVE = (
    "name",
    "description",
    "reference",
    "licence",
    "license",
    "release",
    "citation",
    "dataset_name",
)


def inspect_dataset_json(file: str, content: Any) -> Iterator[Finding]:
    """Findings about the content of a dataset.json; `file` is its path, for the messages."""
    if not isinstance(content, dict):
        yield Finding(ERROR, file, f"holds {type(content).__name__}", "a JSON object with nnU-Net's keys")
    elif "file_ending" not in content and ({"modality", "training"} & content.keys()):
        yield Finding(
            ERROR,
            file,
            "format of nnU-Net v1 (modality, training; no file_ending)",
            "channel_names, labels {name: value}, numTraining, file_ending",
            "Convert the dataset with nnUNetv2_convert_old_nnUNet_dataset",
        )
    else:
        for check in CHECKS:
            yield from check(file, content)


def inspect_duplicate_keys(file: str) -> Iterator[Finding]:
    """Keys that stand twice in one JSON object: of the two values JSON keeps the last, without a word."""
    doubled: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [key for key, _ in pairs]
        doubled.extend(sorted({key for key in names if names.count(key) > 1}) if len(names) < 1000 else [])
        return dict(pairs)

    with open(file, encoding="utf-8") as stream:
        json.load(stream, object_pairs_hook=collect)
    for key in doubled:
        yield Finding(ERROR, f"{file}, key {key}", "stands twice in one object", "once", "Remove one of them")


def declared_labels(content: Content) -> set[int]:
    """All values that a label map may hold, the ignore label among them."""
    values = content["labels"].values()
    return {int(v) for value in values for v in (value if isinstance(value, (list, tuple)) else [value])}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _unknown_keys(file: str, content: Content) -> Iterator[Finding]:
    for key in content:
        if key.lower() == "nnssl":
            yield Finding(
                ERROR,
                f"{file}, key {key}",
                "not read there",
                "the key nnssl at the top of the plans file",
                "Move it there",
            )
            continue
        near = difflib.get_close_matches(key.lower(), [k.lower() for k in KEYS], 1, 0.8)
        if key not in KEYS and key not in DESCRIPTIVE and near:
            meant = next(k for k in KEYS if k.lower() == near[0])
            yield Finding(WARNING, f"{file}, key {key}", "nnU-Net ignores it", remedy=f"Is {meant} meant?")


def _channel_names(file: str, content: Content) -> Iterator[Finding]:
    both = [content[key] for key in ("channel_names", "modality") if key in content]
    if len(both) == 2 and both[0] != both[1]:
        yield Finding(
            ERROR, f"{file}, key modality", "differs from channel_names", "channel_names alone", "Remove it"
        )
    key = "channel_names" if "channel_names" in content or "modality" not in content else "modality"
    place, names, expected = f"{file}, key {key}", content.get(key), '{"0": name of channel 0, "1": ...}'
    if key not in content:
        yield Finding(ERROR, place, "absent", expected, "Add it")
    elif not isinstance(names, dict) or not names:
        yield Finding(ERROR, place, f"is {names!r}", expected, "Correct it")
    elif not any(map(str.isdigit, names)) and all(str(v).isdigit() for v in names.values()):
        yield Finding(
            ERROR, place, f"turned round: {names}", expected, "Exchange names and numbers of the channels"
        )
    elif list(names) != [str(i) for i in range(len(names))]:
        yield Finding(
            ERROR,
            place,
            f"keys {', '.join(names)}",
            f"{', '.join(str(i) for i in range(len(names)))}, in this order (the numbers of the files)",
            "Correct the keys",
        )
    elif wrong := [k for k, v in names.items() if not isinstance(v, str)]:
        yield Finding(ERROR, place, f"{wrong[0]}: {names[wrong[0]]!r}", "a name (text)", "Correct it")


def _labels(file: str, content: Content) -> Iterator[Finding]:
    place, labels, expected = (
        f"{file}, key labels",
        content.get("labels"),
        '{"background": 0, "organ": 1, ...}',
    )
    if "labels" not in content:
        yield Finding(ERROR, place, "absent", expected, "Add it")
        return
    if not isinstance(labels, dict) or not labels:
        yield Finding(ERROR, place, f"is {labels!r}", expected, "Correct it")
        return
    if all(name.isdigit() for name in labels) and not any(map(_is_int, labels.values())):
        yield Finding(
            ERROR,
            place,
            f"turned round: {labels}",
            expected,
            "Exchange names and values (v2 has the name first)",
        )
        return
    wrong = [
        (name, value)
        for name, value in labels.items()
        if not (_is_int(value) or (isinstance(value, list) and value and all(map(_is_int, value))))
    ]
    for name, value in wrong:
        yield Finding(ERROR, f"{place}.{name}", f"is {value!r}", "an integer, or a list of integers (region)")
    if wrong:
        return
    if labels.get("background") != 0:
        found = f"background is {labels['background']}" if "background" in labels else "no background"
        yield Finding(ERROR, place, found, '"background": 0', "Declare label 0 as background")
        return
    if not declared_labels({"labels": {k: v for k, v in labels.items() if k != "ignore"}}) - {0}:
        yield Finding(ERROR, place, "no class beside background", expected, "Declare the classes")
        return
    yield from _values(place, labels)
    yield from _regions(file, place, labels, content.get("regions_class_order"))


def _values(place: str, labels: dict[str, Any]) -> Iterator[Finding]:
    """Consecutive from 0, the ignore label the one above."""
    ignore = labels.get("ignore")
    if isinstance(ignore, list):
        yield Finding(
            ERROR, f"{place}.ignore", f"is {ignore}", "one integer", "The ignore label is no region"
        )
        return
    used = sorted(declared_labels({"labels": {k: v for k, v in labels.items() if k != "ignore"}}))
    if ignore is not None and ignore != max(used) + 1:
        yield Finding(
            ERROR,
            f"{place}.ignore",
            f"is {ignore}",
            "one above all other labels",
            "Renumber the labels here and in the label maps of labelsTr",
        )
    elif used != list(range(len(used))):
        yield Finding(
            ERROR,
            place,
            f"values {', '.join(map(str, used))}",
            "0, 1, 2, ... without a gap",
            "Renumber the labels here and in the label maps of labelsTr",
        )
    single = [value for value in labels.values() if _is_int(value)]
    for value in sorted({value for value in single if single.count(value) > 1}):
        names = ", ".join(name for name, v in labels.items() if v == value)
        yield Finding(WARNING, place, f"{names} all have the value {value}", "one name per value")


def _regions(file: str, place: str, labels: dict[str, Any], order: Any) -> Iterator[Finding]:
    where = f"{file}, key regions_class_order"
    if not any(isinstance(v, list) and len(v) > 1 for name, v in labels.items() if name != "ignore"):
        return
    regions = [
        name
        for name, value in labels.items()
        if name != "ignore" and set(value if isinstance(value, list) else [value]) != {0}
    ]
    expected = f"a list of {len(regions)} labels, one per region ({', '.join(regions)})"
    if order is None:
        yield Finding(
            ERROR,
            where,
            f"absent, and {place.rpartition(' ')[2]} has regions",
            expected,
            "The value that a region's voxels get in the prediction; later entries overwrite earlier ones",
        )
    elif not (isinstance(order, list) and all(map(_is_int, order)) and len(order) == len(regions)):
        yield Finding(ERROR, where, f"is {order!r}", expected, "Correct it")
    elif unknown := sorted(set(order) - declared_labels({"labels": labels})):
        yield Finding(ERROR, where, f"names {', '.join(map(str, unknown))}", "values that labels declares")


def _num_training(file: str, content: Content) -> Iterator[Finding]:
    place, number = f"{file}, key numTraining", content.get("numTraining")
    if "numTraining" not in content:
        yield Finding(ERROR, place, "absent", "the number of labeled cases", "Add it")
    elif not isinstance(number, int) or isinstance(number, bool) or number < 0:
        yield Finding(ERROR, place, f"is {number!r}", "the number of labeled cases", "Correct it")


def _file_ending(file: str, content: Content) -> Iterator[Finding]:
    place, ending = f"{file}, key file_ending", content.get("file_ending")
    supported = sorted({e for reader in LIST_OF_IO_CLASSES for e in reader.supported_file_endings})
    expected = f"one of {', '.join(supported)}"
    reader = content.get("overwrite_image_reader_writer", "None")
    if "file_ending" not in content:
        yield Finding(ERROR, place, "absent", expected, "Add it")
    elif not isinstance(ending, str) or not ending.startswith(".") or {"/", "\\"} & set(ending):
        yield Finding(ERROR, place, f"is {ending!r}", expected, "Correct it (with the dot)")
    elif ending.lower() in DETACHED:
        yield Finding(
            ERROR,
            place,
            f"{ending} keeps its voxels in a second file, without which nnU-Net copies label maps",
            expected,
            "Convert the images, e.g. to .mha or .nii.gz",
        )
    elif ending != ending.lower() and ending.lower() in NOT_IN_CAPITALS and reader in ("None", "SimpleITKIO"):
        small = ending.lower()
        yield Finding(
            ERROR,
            place,
            f"is {ending}: SimpleITK reads such files, but can write no segmentations under this name",
            small,
            f"Rename the files and correct the key to {small}",
        )
    elif reader == "None" and ending.lower() not in supported:
        yield Finding(ERROR, place, f"no reader for {ending}", expected, "Convert the images")
    if not isinstance(reader, str):
        yield Finding(ERROR, f"{file}, key overwrite_image_reader_writer", f"is {reader!r}", "a class name")
    elif reader != "None" and isinstance(ending, str) and ending not in supported:
        yield Finding(
            WARNING,
            place,
            f"no reader of nnU-Net lists {ending}",
            expected,
            "Files cut short are not recognised; convert the images if you can",
        )
    if isinstance(reader, str) and reader != "None" and not reader_exists(reader):
        names = ", ".join(cls.__name__ for cls in LIST_OF_IO_CLASSES)
        yield Finding(ERROR, f"{file}, key overwrite_image_reader_writer", f"is {reader}", f"one of {names}")


def reader_exists(name: str) -> bool:
    try:
        recursive_find_reader_writer_by_name(name)
    except Exception:  # nnU-Net raises what the import of the name raises
        return False
    return True


def _entries(file: str, content: Content) -> Iterator[Finding]:
    """The key `dataset`, which lists the labeled cases instead of imagesTr and labelsTr."""
    if "dataset" not in content:
        return
    entries, place = content["dataset"], f"{file}, key dataset"
    expected = '{case: {"images": [file, ...], "label": file}}'
    if not isinstance(entries, dict):
        yield Finding(ERROR, place, f"holds {type(entries).__name__}", expected)
        return
    for case, entry in entries.items():
        here = f"{place}.{case}"
        yield from inspect_case_name(case, here)
        images, label = (entry.get("images"), entry.get("label")) if isinstance(entry, dict) else (None, None)
        if not (
            isinstance(images, list)
            and images
            and all(isinstance(image, str) and image for image in images)
            and isinstance(label, str)
            and label
        ):
            yield Finding(ERROR, here, f"is {entry!r}"[:200], expected)
            continue
        ending = content.get("file_ending")
        if isinstance(ending, str) and not label.endswith(ending):
            yield Finding(
                ERROR,
                here,
                f"the label is {label}, which nnU-Net copies as {case}{ending} and then cannot read",
                f"a file that ends in {ending} (file_ending)",
                "Convert it",
            )
        for path in dict.fromkeys((*images, label)):
            expanded = normpath(expandvars(path))
            # beside the dataset (../Dataset002_Other/...) is what nnU-Net documents, further up is not
            if not isabs(expanded) and expanded.split(os.sep)[:2] == ["..", ".."]:
                yield Finding(ERROR, here, f"{path} leaves nnUNet_raw", "a path below it, or an absolute one")


def inspect_case_name(case: str, place: str) -> Iterator[Finding]:
    """Names of cases become names of files."""
    if not case or {"/", "\\", "\0"} & set(case) or case.startswith(".") or case != case.strip():
        yield Finding(
            ERROR,
            place,
            f"the case is named {case!r}",
            "a plain file name without path, leading dot or space at an end",
            "Rename the case",
        )
    elif case.endswith("_seg"):
        yield Finding(
            ERROR,
            place,
            f"the case is named {case}",
            "a name that does not end in _seg: so nnU-Net names the segmentation of another case",
            "Rename the case",
        )


CHECKS: list[Check] = [_unknown_keys, _channel_names, _labels, _num_training, _file_ending, _entries]
