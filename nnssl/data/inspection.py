"""One inspection of a dataset, for ``nnssl check``, ``nnssl plan-and-preprocess`` and the start of a
training.

`inspect_files` looks at dataset.json, names, plan and split, and opens no image; `inspect_contents` reads
what has changed since the last time. Both yield findings and raise nothing.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from os.path import basename, dirname, getsize, isdir, isfile, join, lexists, normpath
from typing import Any

import nnunetv2
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnssl.config import GeneralConfig, constraints, resolve, sections_of_others
from nnssl.data.dataset_json import (
    declared_labels,
    inspect_dataset_json,
    inspect_duplicate_keys,
    reader_exists,
)
from nnssl.data.findings import ERROR, WARNING, Finding, errors_of, listed
from nnssl.data.formats import SourceError, inspect_file, is_utf8
from nnssl.data.labeled import old_files
from nnssl.data.names import (
    FOLDERS,
    HIDDEN_REMEDY,
    inspect_access,
    inspect_adoption,
    inspect_names,
    inspect_spacing_files,
    inspect_unlabeled_names,
    missing_spacing_files,
    unlabeled_files,
)
from nnssl.data.raw import cases_in, channel_files, num_channels, training_files
from nnssl.data.scans import Scan, inspect_labels, inspect_scans, measure
from nnssl.data.sizes import inherited, inspect_sizes
from nnssl.data.split import NNUNET_FOLDS
from nnssl.datasets import dataset_number
from nnssl.files import read_json

FOLD_KEYS = ("train", "val", "unlabeled")
KEYS_OF_LABELS = ("labels", "regions_class_order")
KEYS_OF_PLAN = ("channel_names", "modality", "file_ending")  # a plan is made for them


def inspect_files(
    raw: str,
    preprocessed: str,
    plans_name: str = "nnUNetPlans",
    sections: Mapping[str, type] | None = None,
    planning: bool = False,
    fold: int | str | None = None,
) -> Iterator[Finding]:
    """Everything that can be told without opening an image.

    sections  configuration class of every method, to check the key ``nnssl`` of the plan
    planning  a split that a training would miss may still be written, the copy of dataset.json renewed
    fold      the one to train, which for `all` needs no split; None: look at all folds
    """
    if closed := closed_folders(raw, preprocessed):
        yield from closed
        return
    sound = content = None
    if isfile(join(raw, "dataset.json")):
        findings, content = read_dataset_json(join(raw, "dataset.json"))
        yield from findings
        yield from inspect_adoption(raw)
        if not errors_of(findings):
            sound = content
            yield from inspect_names(raw, content)
            if not training_files(raw, content) and not isdir(join(preprocessed, "gt_segmentations")):
                remedy = "Name the labeled images so, and their label maps in labelsTr"
                expected = f"<case>_0000{content['file_ending']}, ..."
                yield Finding(ERROR, join(raw, "imagesTr"), "no labeled case", expected, remedy)
    elif isdir(raw):
        near = [name for name in os.listdir(raw) if name.lower() == "dataset.json"]
        remedy = f"Rename {near[0]}" if near else "Write it, or restore it"
        yield Finding(ERROR, join(raw, "dataset.json"), "missing", remedy=remedy)
    if isfile(join(preprocessed, "dataset.json")) and not planning:
        findings, copy = read_dataset_json(join(preprocessed, "dataset.json"))
        if copy != content:  # the same errors need not be told twice
            yield from findings
        if sound is not None and not errors_of(findings):
            yield from _differences(raw, preprocessed, sound, copy)
    plans_file = join(preprocessed, plans_name + ".json")
    if isfile(plans_file):
        findings = list(inspect_plans(plans_file, sections or {}, basename(normpath(preprocessed))))
        yield from findings
        if sound is not None and not errors_of(findings):
            plans = read_json(plans_file)
            yield from inspect_plan_reader(plans_file, plans, sound)
            if not planning:
                yield from inspect_plan_channels(plans_file, plans, sound)
    cases = _labeled_names(raw, preprocessed, plans_file, sound)
    if cases is not None and not isinstance(fold, str):
        yield from inspect_split(join(preprocessed, "splits_final.json"), cases, planning, fold)


def closed_folders(raw: str, preprocessed: str) -> list[Finding]:
    """Findings about folders without the permission to read them: nothing else can be told then."""
    folders = [raw, *(join(raw, name) for name in FOLDERS), preprocessed]
    return list(inspect_access(*folders, join(preprocessed, "gt_segmentations")))


def _differences(
    raw: str, preprocessed: str, new: Mapping[str, Any], old: Mapping[str, Any]
) -> Iterator[Finding]:
    """What was edited since planning: trainings go by the copy beside the plan."""
    number = dataset_number(basename(normpath(preprocessed)))
    command = f"nnssl plan-and-preprocess -d {'ID' if number is None else number}"
    for key in (*KEYS_OF_LABELS, *KEYS_OF_PLAN):
        if new.get(key) != old.get(key):
            yield Finding(
                ERROR,
                f"{join(raw, 'dataset.json')}, key {key}",
                f"is {new.get(key)!r}, and {old.get(key)!r} in the copy {join(preprocessed, 'dataset.json')}",
                "the same",
                f"Run `{command}{' --replan --clean' * (key in KEYS_OF_PLAN)}`, or take the change back",
            )


def read_dataset_json(file: str) -> tuple[list[Finding], Any]:
    """Findings about a dataset.json, and its content (None where it cannot be read)."""
    try:
        content = read_json(file)
    except (ValueError, OSError, RecursionError) as error:
        return [Finding(ERROR, "dataset.json", str(error))], None
    return [*inspect_dataset_json(file, content), *inspect_duplicate_keys(file)], content


def _labeled_names(
    raw: str, preprocessed: str, plans_file: str, dataset_json: dict[str, Any] | None
) -> list[str] | None:
    """Labeled cases of the raw dataset, or else of what was preprocessed; None where neither is here."""
    if dataset_json is not None and (cases := training_files(raw, dataset_json)):
        return sorted(cases)
    folder = join(preprocessed, "gt_segmentations")
    file = join(preprocessed, "dataset.json")
    if not (isdir(folder) and isfile(file)):
        return None
    findings, content = read_dataset_json(file)
    if errors_of(findings):
        return None
    return cases_in(folder, content["file_ending"])


def inspect_plans(
    plans_file: str, sections: Mapping[str, type], dataset: str | None = None
) -> Iterator[Finding]:
    """The keys of a plans file that every command needs, and its section ``nnssl``.

    dataset  name of the dataset that it must be for, since nnU-Net takes folders by the plan; None: any
    """
    try:
        plans = read_json(plans_file)
    except (ValueError, OSError, RecursionError) as error:
        yield Finding(ERROR, "plan", str(error))
        return
    if not isinstance(plans, dict):
        yield Finding(ERROR, plans_file, f"holds {type(plans).__name__}", "the plan that nnU-Net wrote")
        return
    yield from inspect_duplicate_keys(plans_file)
    for key, fits in PLAN.items():
        if not fits(plans.get(key)):
            yield _wrong_plan(f"{plans_file}, key {key}", plans, key)
    planned_for = plans.get("dataset_name")
    if dataset is not None and isinstance(planned_for, str) and planned_for != dataset:
        yield Finding(
            ERROR,
            f"{plans_file}, key dataset_name",
            f"is {planned_for!r}, whose data and results would be used",
            repr(dataset),
            "Remove the file, and take the plan over with nnUNetv2_move_plans_between_datasets",
        )
    yield from inspect_plans_name(plans_file, plans.get("plans_name"))
    found = plans.get("configurations")
    configurations: dict[str, Any] = found if isinstance(found, dict) else {}
    for name, configuration in configurations.items():
        place = f"{plans_file}, key configurations.{name}"
        if not isinstance(configuration, dict):
            yield _wrong_plan(place, configurations, name)
        elif "inherits_from" in configuration:
            if configuration["inherits_from"] not in {*configurations} - {name}:
                yield _wrong_plan(f"{place}.inherits_from", configuration, "inherits_from")
        else:
            yield from _complete(place, configuration)
        if isinstance(configuration, dict):
            yield from _code(place, configuration)
            yield from inspect_sizes(place, configuration, inherited(configurations, name))
    yield from _intensities(plans_file, plans, configurations)
    yield from misplaced_keys(plans_file, plans, set(sections))
    yield from _section(f"{plans_file}, key nnssl", plans.get("nnssl", {}), sections)


def misplaced_keys(source: str, plans: Mapping[str, Any], methods: Collection[str]) -> Iterator[Finding]:
    """Keys of the section ``nnssl`` that stand outside of it, where nobody reads them.

    source  the plans file, for the messages
    """
    general = {name.lower(): name for name in constraints(GeneralConfig)}
    sections = {name.lower(): name for name in methods}
    found = plans.get("configurations")
    configurations = found if isinstance(found, dict) else {}
    places = {"": plans, **{f"configurations.{name}.": content for name, content in configurations.items()}}
    for place, content in places.items():
        for key in content if isinstance(content, dict) else ():
            small = str(key).lower()
            if small == "nnssl" and (place or key != "nnssl"):
                expected, remedy = "the key nnssl at the top of the plan", "Move its content there"
            elif name := general.get(small) or sections.get(small):
                expected, remedy = f'"nnssl": {{"{name}": ...}} at the top of the plan', "Move it there"
            else:
                continue
            yield Finding(ERROR, f"{source}, key {place}{key}", "not read there", expected, remedy)


def inspect_plans_name(plans_file: str, name: Any) -> Iterator[Finding]:
    """A copied plan whose name was left as it was: nnU-Net names the folder of results by the key."""
    expected = basename(plans_file).removesuffix(".json")
    if isinstance(name, str) and name != expected:
        shared = isfile(join(dirname(plans_file), f"{name}.json"))
        yield Finding(
            ERROR if shared else WARNING,
            f"{plans_file}, key plans_name",
            f"is {name!r}, after which the folder of results is named"
            + (f": trainings of {name}.json would be mixed up or overwritten" if shared else ""),
            f"{expected!r}, as the file",
            "Correct the key (and the name of a folder of results that a training has made already)",
        )


def inspect_plan_channels(
    plans_file: str, plans: Mapping[str, Any], dataset_json: Mapping[str, Any]
) -> Iterator[Finding]:
    """A plan normalizes channel by channel: one that was made for another number serves no case."""
    numbers: dict[int, list[str]] = {}
    for name, configuration in plans["configurations"].items():
        if isinstance(schemes := configuration.get("normalization_schemes"), list):
            numbers.setdefault(len(schemes), []).append(name)
    for number, names in numbers.items():
        if number != num_channels(dataset_json):
            yield Finding(
                ERROR,
                f"{plans_file}, key normalization_schemes of {', '.join(names)}",
                f"{number} channel{'s' * (number != 1)}",
                f"{num_channels(dataset_json)} (channel_names in dataset.json)",
                "Plan anew with `nnssl plan-and-preprocess --replan --clean`, or correct channel_names",
            )


@functools.cache
def _is_there(module: str, name: str) -> bool:
    """Whether nnU-Net finds a class or function of this name below one of its modules."""
    folder = join(nnunetv2.__path__[0], *module.split("."))
    try:
        return recursive_find_python_class(folder, name, f"nnunetv2.{module}") is not None
    except Exception:  # what the import of one of its files raises
        return False


CODE = {  # keys that name code of nnU-Net: where it is looked for, and an example
    "preprocessor_name": ("preprocessing", "DefaultPreprocessor"),
    "normalization_schemes": ("preprocessing.normalization", "ZScoreNormalization"),
    **dict.fromkeys(
        ("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities"),
        ("preprocessing.resampling", "resample_data_or_seg_to_shape"),
    ),
}


def _code(place: str, configuration: Mapping[str, Any]) -> Iterator[Finding]:
    """Names that nnU-Net does not have: it would fail with every case, and the files would be blamed."""
    for key, (module, example) in CODE.items():
        value = configuration.get(key)
        names = value if isinstance(value, list) else [value] if isinstance(value, str) else []
        if absent := [name for name in names if not (isinstance(name, str) and _is_there(module, name))]:
            yield Finding(
                ERROR,
                f"{place}.{key}",
                f"names {listed([repr(name) for name in absent])}, which nnU-Net does not have",
                f"a name in nnunetv2.{module}, such as {example}",
                "Correct it",
            )


def _intensities(
    plans_file: str, plans: Mapping[str, Any], configurations: Mapping[str, Any]
) -> Iterator[Finding]:
    """Every normalization gets those of its channel, whether it uses them or not."""
    key = "foreground_intensity_properties_per_channel"
    schemes = [c.get("normalization_schemes") for c in configurations.values() if isinstance(c, dict)]
    wanted = {str(i) for names in schemes if isinstance(names, list) for i in range(len(names))}
    if isinstance(plans.get(key), dict) and (absent := sorted(wanted - plans[key].keys())):
        found, remedy = f"channel {', '.join(absent)} absent", _wrong_plan("", plans, key).remedy
        yield Finding(ERROR, f"{plans_file}, key {key}", found, "an entry for every channel", remedy)


def inspect_plan_reader(
    plans_file: str, plans: Mapping[str, Any], dataset_json: Mapping[str, Any]
) -> Iterator[Finding]:
    """Everything is read with the reader of the plan: another one in dataset.json came too late."""
    wanted = dataset_json.get("overwrite_image_reader_writer", "None")
    if wanted not in ("None", plans["image_reader_writer"]):
        yield Finding(
            ERROR,
            f"{plans_file}, key image_reader_writer",
            f"is {plans['image_reader_writer']!r}, with which all images are read",
            f"{wanted!r} (overwrite_image_reader_writer in dataset.json)",
            "Plan anew with `nnssl plan-and-preprocess --replan --clean`, or take the change of dataset.json "
            "back",
        )


def _is_permutation(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) for i in value) and sorted(value) == [0, 1, 2]


PLAN: dict[str, Callable[[Any], bool]] = {
    "dataset_name": lambda value: isinstance(value, str),
    "plans_name": lambda value: isinstance(value, str),
    "image_reader_writer": lambda value: isinstance(value, str) and reader_exists(value),
    "label_manager": lambda value: isinstance(value, str) and _is_there("utilities.label_handling", value),
    "transpose_forward": _is_permutation,
    "transpose_backward": _is_permutation,
    "foreground_intensity_properties_per_channel": lambda value: isinstance(value, dict),
    "configurations": lambda value: isinstance(value, dict) and len(value) > 0,
}

# of a configuration that inherits from none; what stands in the others is looked at by `inspect_sizes`
CONFIGURATION: dict[str, Callable[[Any], bool]] = {
    "data_identifier": lambda value: isinstance(value, str),
    "preprocessor_name": lambda value: isinstance(value, str),
    "normalization_schemes": lambda value: isinstance(value, list),
    "use_mask_for_norm": lambda value: isinstance(value, list),
    "architecture": lambda value: isinstance(value, dict),
    **dict.fromkeys(("batch_size", "patch_size", "spacing"), lambda value: True),
}


def _complete(place: str, configuration: Mapping[str, Any]) -> Iterator[Finding]:
    # plans before nnU-Net 2.4 say UNet_class_name instead, and are translated
    wanted = CONFIGURATION.keys() - ({"architecture"} if "UNet_class_name" in configuration else set())
    if absent := sorted(wanted - configuration.keys()):
        yield _wrong_plan(f"{place}.{', '.join(absent)}", configuration, "")
    for key in sorted(wanted & configuration.keys()):
        if not CONFIGURATION[key](configuration[key]):
            yield _wrong_plan(f"{place}.{key}", configuration, key)


def _wrong_plan(place: str, content: Mapping[str, Any], key: str) -> Finding:
    return Finding(
        ERROR,
        place,
        f"is {content[key]!r}"[:100] if key in content else "absent",
        "what nnU-Net's planning wrote",
        "Restore it, or plan anew with `nnssl plan-and-preprocess --replan`",
    )


def _section(place: str, section: Any, methods: Mapping[str, type]) -> Iterator[Finding]:
    """The general keys, and the section of every method."""
    if methods and isinstance(section, dict):
        for key in sections_of_others(section, set(methods)):
            remedy = "If it is a method of your own, all is well"
            yield Finding(WARNING, f"{place}.{key}", "no method of this library", remedy=remedy)
    messages = set()
    for name in [None, *(name for name in methods if isinstance(section, dict) and name in section)]:
        try:
            resolve(section, name, methods[name] if name else None, set(methods))
        except ValueError as error:
            messages.add(str(error))
    for message in sorted(messages):
        yield Finding(ERROR, place, message)


def inspect_split(
    splits_file: str, cases: Collection[str], planning: bool = False, only: int | None = None
) -> Iterator[Finding]:
    """splits_final.json against the labeled cases; without the file nnU-Net makes five folds, if it can.

    only  the fold to look at; None: all
    """
    known = set(cases)
    if not isfile(splits_file):
        if 0 < len(known) < NNUNET_FOLDS:
            yield few_cases(splits_file, len(known), WARNING if planning else ERROR)
        return
    expected = "a list of folds {train: [case, ...], val: [...], unlabeled: [...] (optional)}"
    try:
        folds = read_json(splits_file)
    except (ValueError, OSError, RecursionError) as error:
        yield Finding(ERROR, "split", str(error))
        return
    if not isinstance(folds, list) or not folds:
        yield Finding(ERROR, splits_file, f"holds {type(folds).__name__}", expected, "Repair or remove it")
        return
    listed_somewhere: set[str] = set()
    for index, fold in enumerate(folds):
        if only not in (None, index):
            continue
        place = f"{splits_file}, fold {index}"
        if not isinstance(fold, dict):
            yield Finding(ERROR, place, f"is {type(fold).__name__}", expected, "Repair or remove the file")
            continue
        wrong = False
        for key in sorted(fold.keys() - set(FOLD_KEYS)):
            if near := difflib.get_close_matches(key.lower(), FOLD_KEYS, 1, 0.8):
                remedy = f"Is {near[0]} meant? Rename it"
                yield Finding(WARNING, f"{place}, key {key}", "not read", remedy=remedy)
        for key in FOLD_KEYS:
            names = fold.get(key, [] if key == "unlabeled" else None)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                wrong = True
                found = "absent" if key not in fold else f"is {names!r}"[:100]
                yield Finding(ERROR, f"{place}, key {key}", found, "a list of case names", "Repair it")
            elif not names and key != "unlabeled":
                yield Finding(ERROR, f"{place}, key {key}", "empty", "at least one case", "Add one")
            else:
                yield from _names_of_fold(f"{place}, key {key}", names, known)
        if not wrong:
            yield from _overlaps(place, fold)
            listed_somewhere |= {name for key in FOLD_KEYS for name in fold.get(key, [])}
    if only is None and (left := sorted(known - listed_somewhere)) and listed_somewhere:
        remedy = "Add them to a fold (`nnssl split` makes a new file), or leave them out on purpose"
        yield Finding(WARNING, splits_file, f"{listed(left)}: labeled, and in no fold", remedy=remedy)


def few_cases(splits_file: str, number: int, level: str = ERROR) -> Finding:
    """Too few labeled cases for nnU-Net's automatic split."""
    several = (
        f"`nnssl split -d ID --labeled {number - 1}` leaves one out per fold, "
        "`nnssl split --val` names validation cases, "
        if number > 1
        else ""
    )
    cases = f"{number} labeled cases are" if number > 1 else "one labeled case is"
    return Finding(
        level,
        splits_file,
        f"absent, and {cases} too few for the {NNUNET_FOLDS} folds that nnU-Net makes",
        "a split, or a training on all cases",
        f"{several}{'fold' if several else 'Fold'} all trains on every case",
    )


def _names_of_fold(place: str, names: list[str], known: set[str]) -> Iterator[Finding]:
    if unknown := sorted(set(names) - known):
        yield Finding(
            ERROR,
            place,
            f"{listed(unknown)}: no labeled case",
            "names of imagesTr",
            "Remove from the list, or add to imagesTr (scans in imagesUn are always used and never listed)",
        )
    if doubled := sorted(
        {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()
    ):
        yield Finding(WARNING, place, f"{listed(doubled)} twice", "every case once", "Remove one of them")


def _overlaps(place: str, fold: Mapping[str, list[str]]) -> Iterator[Finding]:
    hidden = set(fold.get("unlabeled", []))
    for key in ("train", "val"):
        if both := sorted(hidden & set(fold[key])):
            yield Finding(
                ERROR, place, f"{listed(both)} in unlabeled and in {key}", remedy="Remove from one of the two"
            )
    if both := sorted(set(fold["train"]) & set(fold["val"])):
        yield Finding(
            WARNING,
            place,
            f"{listed(both)} in train and in val: the validation is not on unseen cases",
            remedy="Remove from one of the two unless that is meant",
        )


KINDS = (".b2nd", ".pkl", ".npz", ".npy")  # of preprocessed files, today's and older ones


def inspect_preprocessed(folder: str) -> Iterator[Finding]:
    """Files among the preprocessed cases that are none, or that an older nnU-Net left: nnU-Net reads one kind
    only."""
    names = os.listdir(folder) if isdir(folder) else []
    if hidden := sorted(n for n in names if n.startswith(".") and n.endswith(KINDS)):
        found = f"{listed(hidden)}: hidden, but nnU-Net takes every file here for one of a case"
        yield Finding(ERROR, folder, found, remedy=HIDDEN_REMEDY)
    if strays := sorted(n for n in names if not n.endswith(KINDS) and isfile(join(folder, n))):
        yield Finding(
            ERROR,
            folder,
            f"{listed(strays)} among the preprocessed cases, by which nnU-Net no longer knows their kind",
            f"names that end in {', '.join(KINDS)}",
            "Remove what is no case",
        )
    if old := [name for name in old_files(folder) if not name.endswith(".pkl")]:
        mixed = any(name.endswith(".b2nd") for name in os.listdir(folder))
        yield Finding(
            ERROR if mixed else WARNING,
            folder,
            f"{len(old)} file{'s' * (len(old) > 1)} of an nnU-Net before 2.6 ({old[0]}, ...)"
            + " among newer ones" * mixed,
            ".b2nd files alone",
            "`nnssl plan-and-preprocess` sets them aside and preprocesses anew",
        )


def inspect_contents(
    raw: str,
    preprocessed: str,
    dataset_json: dict[str, Any],
    plans: Mapping[str, Any] | None = None,
    configuration: str | None = None,
    with_labels: bool = True,
    num_processes: int | None = None,
    progress: Callable[[Any], Any] = iter,
) -> Iterator[Finding]:
    """Images and label maps themselves: each is read once and its statistics are kept in `preprocessed`.

    plans        the plan, where there is one: its reader, and the normalization of `configuration`
    with_labels  open label maps; a training leaves them alone
    """
    training = training_files(raw, dataset_json)
    unlabeled, _ = unlabeled_files(raw, dataset_json)
    scans = [Scan(name, "imagesTr", tuple(images)) for name, (images, _) in training.items()]
    scans += [
        Scan(name, "imagesUn", tuple(files[channel] for channel in sorted(files)))
        for name, files in unlabeled.items()
    ]
    scans += _perhaps_tested_on(raw, dataset_json["file_ending"], unlabeled)
    if with_labels:
        scans += [Scan(name, "labelsTr", (label,)) for name, (_, label) in training.items()]
    # what is missing, or named so that readers abort, the names have told
    scans = [scan for scan in scans if all(is_utf8(file) and isfile(file) for file in scan.files)]
    if not scans:
        return
    images = [scan.files[0] for scan in scans if scan.origin != "labelsTr"]
    reader = (plans or {}).get("image_reader_writer") or reader_of(dataset_json, images)
    if reader == "Tiff3DIO":
        yield from missing_spacing_files(raw, dataset_json)
    measured = measure(scans, reader, num_channels(dataset_json), preprocessed, num_processes, progress)
    schemes = _schemes(plans, configuration, dataset_json)
    yield from inspect_scans(measured, schemes)
    if with_labels:
        yield from inspect_labels(measured, declared_labels(dataset_json))


def _perhaps_tested_on(raw: str, ending: str, unlabeled: Mapping[str, Mapping[int, str]]) -> list[Scan]:
    """Scans of imagesTs that may be in imagesUn under another name: sizes of their files occur there."""
    sizes = {getsize(file) for files in unlabeled.values() for file in files.values()}
    tests, _ = channel_files(join(raw, "imagesTs"), ending)
    return [
        Scan(name, "imagesTs", tuple(files[channel] for channel in sorted(files)))
        for name, files in tests.items()
        if name not in unlabeled and all(isfile(file) and getsize(file) in sizes for file in files.values())
    ]


def inspect_scans_of_training(
    raw: str, preprocessed: str, dataset_json: dict[str, Any], plans: Mapping[str, Any], configuration: str
) -> Iterator[Finding]:
    """What a training asks of the raw dataset: its unlabeled scans. The labeled images serve to compare; what
    is wrong with them is a warning, for they are preprocessed already. No label map is opened."""
    yield from inspect_adoption(raw)
    if not lexists(join(raw, "imagesUn")):
        return
    yield from inspect_unlabeled_names(raw, dataset_json)
    yield from inspect_spacing_files(raw, dataset_json)
    labeled = {file for images, _ in training_files(raw, dataset_json).values() for file in images}
    for finding in inspect_contents(raw, preprocessed, dataset_json, plans, configuration, with_labels=False):
        about_labeled = finding.level == ERROR and any(file in finding.place for file in labeled)
        yield replace(finding, level=WARNING) if about_labeled else finding


def reader_of(dataset_json: dict[str, Any], examples: Iterable[str]) -> str:
    """Name of nnU-Net's reader for a dataset without a plan: the one that reads the first sound example;
    where none is, the first of the file ending, which then names every file."""
    for example in examples:
        try:
            inspect_file(example, strict=False)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                reader = determine_reader_writer_from_dataset_json(dataset_json, example, verbose=False)
        except (SourceError, RuntimeError):
            continue  # told when it is read
        return str(reader.__name__)
    return str(determine_reader_writer_from_dataset_json(dataset_json, verbose=False).__name__)


def _schemes(
    plans: Mapping[str, Any] | None, configuration: str | None, dataset_json: Mapping[str, Any]
) -> list[str]:
    """Normalization of the channels by the plan, or else as nnU-Net will plan it."""
    configurations = (plans or {}).get("configurations", {})
    chosen = [configuration] if configuration in configurations else list(configurations)
    for name in chosen:
        if "normalization_schemes" in configurations[name]:
            return list(configurations[name]["normalization_schemes"])
    names = dataset_json.get("channel_names") or dataset_json["modality"]
    return [get_normalization_scheme(name).__name__ for name in names.values()]
