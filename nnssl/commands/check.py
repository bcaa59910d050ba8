"""``nnssl check``: installation, dataset and split, one line each with what to fix."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from os.path import isdir, isfile, join, realpath, samefile
from typing import Any

from nnunetv2.paths import nnUNet_extTrainer
from tqdm import tqdm

import nnssl
from nnssl.commands.costs import step_costs
from nnssl.commands.environment import environment
from nnssl.commands.trainers import list_trainers, trainers_folder
from nnssl.data.findings import ERROR, OK, WARNING, Finding, errors_of, listed
from nnssl.data.inspection import (
    PLAN,
    closed_folders,
    inspect_contents,
    inspect_files,
    inspect_preprocessed,
    inspect_split,
    read_dataset_json,
)
from nnssl.data.names import unlabeled_files
from nnssl.data.raw import cases_in, num_channels, plans_in, training_files
from nnssl.data.split import absent_classes, hidden_cases, load_splits
from nnssl.files import read_json
from nnssl.training.lookup import dataset_name

PREFIX = {OK: "ok", WARNING: "warn", ERROR: "FAIL"}


def run_checks(
    dataset_id: int | None = None,
    configuration: str | None = None,
    plans_name: str = "nnUNetPlans",
    as_json: bool = False,
    trainer: str | None = None,
) -> int:
    """Print all findings, the gravest last; 1 if something must be fixed before a training, else 0.

    trainer: what a step of it costs is found out too.
    """
    costs: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr):  # nnU-Net's readers print
        findings = list(_findings(dataset_id, configuration, plans_name, trainer, costs))
    number = {level: sum(finding.level == level for finding in findings) for level in PREFIX}
    if as_json:
        content = {"errors": number[ERROR], "warnings": number[WARNING], "environment": environment()}
        content |= {"costs": costs} if trainer is not None else {}
        print(json.dumps({**content, "findings": [dataclasses.asdict(f) for f in findings]}, indent=2))
    else:
        for finding in sorted(findings, key=lambda finding: list(PREFIX).index(finding.level)):
            print(f"{PREFIX[finding.level]:4}  {finding}")
    return int(number[ERROR] > 0)


def _findings(
    dataset_id: int | None,
    configuration: str | None,
    plans_name: str,
    trainer: str | None,
    costs: dict[str, Any],
) -> Iterator[Finding]:
    yield from _versions()
    yield from _environment()
    yield from _trainers()
    yield from _devices()
    if dataset_id is not None:
        yield from _dataset(dataset_id, configuration, plans_name, trainer, costs)


def _versions() -> Iterator[Finding]:
    names = ("torch", "nnunetv2", "batchgeneratorsv2", "dynamic-network-architectures")
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in names)
    yield Finding(
        OK, "installation", f"nnssl {nnssl.__version__}, python {platform.python_version()}, {versions}"
    )
    version = metadata.version("nnunetv2")
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 8):
        yield Finding(
            ERROR,
            "installation",
            f"nnunetv2 {version} has no nnUNet_extTrainer",
            remedy="pip install 'nnunetv2>=2.8,<3'",
        )
    own = realpath(nnssl.__path__[0])
    others = {
        realpath(join(path or ".", "nnssl"))
        for path in sys.path
        if isfile(join(path or ".", "nnssl", "__init__.py"))
    } - {own}
    if others or _installed("nnssl"):
        where = ", ".join(sorted(others)) or "distribution nnssl"
        yield Finding(
            WARNING,
            "installation",
            f"another package is called nnssl, too ({where})",
            remedy="The two cannot share an environment; make a new one for nnunet-semi",
        )


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _environment() -> Iterator[Finding]:
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    for name in names:
        value = os.environ.get(name)
        if not value:  # a training can do with preprocessed data alone
            level, remedy = (
                WARNING if name == "nnUNet_raw" else ERROR,
                f"export {name}=/where/you/keep/{name}",
            )
            yield Finding(level, "environment", f"{name} is not set", remedy=remedy)
        elif not isdir(value):
            remedy = f"mkdir -p '{value}', or correct the variable"
            yield Finding(ERROR, "environment", f"{name}={value} does not exist", remedy=remedy)
        elif same := [k for k in names[: names.index(name)] if _same_folder(os.environ.get(k), value)]:
            remedy = "Set them to two folders: the files of a dataset would get mixed up"
            level = ERROR if name == "nnUNet_preprocessed" else WARNING
            yield Finding(level, "environment", f"{same[0]} and {name} are both {value}", remedy=remedy)
        else:
            yield Finding(OK, "environment", f"{name}={value}")


def _same_folder(one: str | None, other: str) -> bool:
    return bool(one) and isdir(str(one)) and samefile(str(one), other)


def _trainers() -> Iterator[Finding]:
    folder = trainers_folder()
    export = f"export nnUNet_extTrainer='{folder}'"
    paths = [path for path in (nnUNet_extTrainer.get() or "").split(os.pathsep) if path.strip()]
    given = f"nnUNet_extTrainer={os.pathsep.join(paths)}"
    if not paths:
        yield Finding(ERROR, "environment", "nnUNet_extTrainer is not set", remedy=export)
    elif not any(isdir(path) and samefile(path, folder) for path in paths):
        yield Finding(ERROR, "environment", f"{given} is not the folder of the trainers", remedy=export)
    else:
        yield Finding(OK, "environment", given)
    names = list_trainers(folder)
    for name in names:
        try:
            importlib.import_module(f"nnssl_trainers.{name}")
        except Exception as error:
            found = f"cannot be imported, which hides every trainer after it from nnU-Net: {_named(error)}"
            yield Finding(ERROR, name, found)
    yield Finding(OK, "trainers", ", ".join(names))


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _devices() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            yield Finding(OK, f"cuda:{index}", f"{properties.name}, {memory}")
    elif torch.backends.mps.is_available():
        yield Finding(OK, "device", "no CUDA device; train with -device mps")
    else:
        yield Finding(
            WARNING,
            "device",
            "no GPU",
            remedy=f"Train with -device cpu, {torch.get_num_threads()} threads, and on few cores with "
            "nnUNet_n_proc_DA=0 (set after planning); expect hours to days with nnU-Net's default plan",
        )
    try:
        from nnssl.ssm import available_backends

        for backend in available_backends():
            state = "usable" if backend.usable else f"not used ({backend.reason})"
            level = WARNING if "broken" in backend.reason else OK
            yield Finding(level, f"state-space backend {backend.name}", state)
    except Exception as error:
        yield Finding(WARNING, "state-space backends", f"cannot be queried: {_named(error)}")


def _dataset(
    dataset_id: int,
    configuration: str | None,
    plans_name: str,
    trainer: str | None,
    costs: dict[str, Any],
) -> Iterator[Finding]:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnssl.methods import method_classes

    try:
        name = dataset_name(dataset_id)
    except ValueError as error:
        yield Finding(ERROR, "-d", str(error))
        return
    raw, preprocessed = (
        join(os.environ.get(variable) or "", name) for variable in ("nnUNet_raw", "nnUNet_preprocessed")
    )
    sections = {section: method.config_class for section, method in method_classes().items()}
    findings = list(inspect_files(raw, preprocessed, plans_name, sections))
    yield from findings
    if closed_folders(raw, preprocessed):
        return
    plans_file = join(preprocessed, plans_name + ".json")
    plans = _sound_plans(plans_file)
    yield from _raw(name, raw, preprocessed, plans, configuration)
    copy, command = join(preprocessed, "dataset.json"), f"nnssl plan-and-preprocess -d {dataset_id}"
    if not (isfile(plans_file) and isfile(copy)):
        if isfile(plans_file):
            expected = "nnU-Net's copy of dataset.json beside its plan"
            yield Finding(ERROR, copy, "missing", expected, f"Run {command} -p {plans_name}, or restore it")
        elif (found := plans_in(preprocessed)) == "none":
            yield Finding(WARNING, name, "not planned yet", remedy=f"Next: {command}")
        else:
            remedy = f"Run {command}, or name one with -p"
            yield Finding(ERROR, plans_file, "no plan", f"a plan (found: {found})", remedy)
        return
    broken, dataset_json = read_dataset_json(copy)
    if plans is None or errors_of(broken):
        return  # told above
    plans_manager = PlansManager(plans)
    available = plans_manager.available_configurations
    if configuration is not None and configuration not in available:
        yield Finding(ERROR, f"-c {configuration}", f"not in {plans_file}", f"one of {', '.join(available)}")
        return
    folders = {c: join(preprocessed, plans_manager.get_configuration(c).data_identifier) for c in available}
    chosen = [configuration] if configuration else [c for c in available if isdir(folders[c])]
    yield Finding(OK, f"plan {plans_file}", ", ".join(available))
    if trainer is not None and not errors_of(findings):
        for c in [configuration] if configuration else chosen or available:
            yield from step_costs(trainer, plans, c, dataset_json, costs)
    if not any(isdir(folders[c]) for c in chosen):
        wanted = f" -c {configuration}" if configuration else ""
        yield Finding(
            ERROR,
            preprocessed,
            f"nothing is preprocessed for {plans_name}",
            remedy=f"Run nnssl plan-and-preprocess -d {dataset_id} -p {plans_name}{wanted}",
        )
        return
    for c in chosen:
        remedy = f"nnssl plan-and-preprocess -d {dataset_id} -p {plans_name} -c {c}"
        yield from _configuration(plans_manager, c, dataset_json, raw, folders[c], remedy)


def _sound_plans(plans_file: str) -> dict[str, Any] | None:
    """The plan, where nothing is wrong with it but perhaps a size or a key of its section nnssl."""
    try:
        plans = read_json(plans_file)
        reader, configurations = plans["image_reader_writer"], plans["configurations"]
        identified = all(
            c["inherits_from"] in configurations if "inherits_from" in c else "data_identifier" in c
            for c in configurations.values()
        ) and isinstance(plans.get("nnssl", {}), dict)
        identified = identified and PLAN["label_manager"](plans.get("label_manager"))
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return plans if isinstance(reader, str) and identified else None


def _raw(
    name: str, raw: str, preprocessed: str, plans: dict[str, Any] | None, configuration: str | None
) -> Iterator[Finding]:
    """The raw dataset: images and label maps, and how many there are."""
    if not isfile(join(raw, "dataset.json")):
        if not isdir(raw):  # else told already
            remedy = "The preprocessed data must then be complete"
            yield Finding(WARNING, name, f"no raw dataset at {raw}", remedy=remedy)
        return
    findings, dataset_json = read_dataset_json(join(raw, "dataset.json"))
    if errors_of(findings):
        return  # told already
    bar = partial(tqdm, desc="inspection", unit="file", mininterval=0.5, disable=None)
    yield from inspect_contents(raw, preprocessed, dataset_json, plans, configuration, progress=bar)
    yield Finding(
        OK,
        name,
        f"{num_channels(dataset_json)} channel(s), {len(training_files(raw, dataset_json))} labeled cases, "
        f"{len(unlabeled_files(raw, dataset_json)[0])} scans in imagesUn",
    )


def _configuration(
    plans_manager: Any, configuration: str, dataset_json: dict[str, Any], raw: str, folder: str, remedy: str
) -> Iterator[Finding]:
    """Labeled and unlabeled data of one configuration, then the folds; `remedy` is the command that
    preprocesses."""
    from nnssl.data.freshness import stale_reason
    from nnssl.data.labeled import labeled_cases, removed_cases

    yield from inspect_preprocessed(folder)
    known = cases_in(folder, ".pkl") if isdir(folder) else []
    if isdir(raw):
        target, every = labeled_cases(plans_manager, configuration, dataset_json, raw)
        cases = [case for case in every if all(isfile(source) for source in case.sources)]
        reasons = [reason for case in cases if (reason := stale_reason(case, target))]
        if not every:
            found = f"imagesTr is empty; the {len(known)} preprocessed cases are used as they are"
            yield Finding(WARNING, configuration, found)
        elif reasons:
            yield Finding(
                ERROR,
                configuration,
                f"{len(reasons)} of {len(cases)} labeled cases are missing or stale "
                f"({', '.join(sorted(set(reasons)))})",
                remedy=f"Run {remedy}",
            )
        else:
            yield Finding(OK, configuration, f"{len(cases)} labeled cases preprocessed")
        removed = [case for case in removed_cases(target, every) if not case.startswith(".")]
        if every and removed:
            yield Finding(
                WARNING,
                configuration,
                f"{len(removed)} preprocessed cases are not in imagesTr ({listed(removed)}) and would be "
                "trained on",
                remedy=f"{remedy} moves them aside",
            )

    splits_file = join(os.path.dirname(folder), "splits_final.json")
    folds: list[Any] = []
    hidden: set[str] = set()
    try:
        folds = load_splits(splits_file) if isfile(splits_file) else []
        for index in range(len(folds)):
            hidden.update(hidden_cases(splits_file, index, known))
    except (ValueError, TypeError) as error:
        yield Finding(ERROR, configuration, str(error))
    yield from _unlabeled(plans_manager, configuration, dataset_json, raw, sorted(hidden), remedy)
    label_manager = plans_manager.get_label_manager(dataset_json)
    for index, fold in enumerate(folds or [{"train": known, "val": []}]):
        if folds and errors_of(inspect_split(splits_file, known, only=index)):
            continue  # told already
        what = f"fold {index}" if folds else "no splits_final.json yet (nnU-Net makes 5 folds)"
        counts = ", ".join(f"{len(fold.get(key, []))} {key}" for key in ("train", "val", "unlabeled"))
        try:
            absent = absent_classes(folder, fold["train"], label_manager)
        except ValueError as error:
            yield Finding(ERROR, configuration, f"{what}: {error}")
            continue
        if absent:
            yield Finding(
                ERROR,
                configuration,
                f"{what}: {counts}; no labeled case has class {absent}",
                remedy="Label one, or choose other labeled cases (`nnssl split`)",
            )
        else:
            yield Finding(OK, configuration, f"{what}: {counts}")
            yield from inspect_mirroring(
                plans_manager, configuration, folder, fold["train"], label_manager, what
            )


def inspect_mirroring(
    plans_manager: Any, configuration: str, folder: str, cases: list[str], label_manager: Any, what: str
) -> Iterator[Finding]:
    """Axes whose mirroring swaps classes, where the plans file does not say what may be mirrored."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    from nnssl.data.mirroring import allowed_axes, offsets_of

    if plans_manager.plans.get("nnssl", {}).get("mirror_axes") is not None:
        return
    dim = len(plans_manager.get_configuration(configuration).patch_size)
    try:
        offsets = offsets_of(infer_dataset_class(folder)(folder, list(cases)), cases, label_manager, dim)
    except Exception:  # blosc2 has no error class of its own; incomplete cases are told already
        return
    if harmful := [o for o in offsets if o.harmful]:
        shown = "; ".join(map(str, harmful[:3])) + ("; ..." if len(harmful) > 3 else "")
        yield Finding(
            WARNING,
            configuration,
            f"{what}: mirroring looks harmful, it may swap classes ({shown})",
            remedy='Compare with "nnssl": {"mirror_axes": "auto"} in the plans file, here '
            f"{list(allowed_axes(offsets, dim))}",
        )


def _unlabeled(
    plans_manager: Any,
    configuration: str,
    dataset_json: dict[str, Any],
    raw: str,
    hidden: list[str],
    remedy: str,
) -> Iterator[Finding]:
    from nnssl.data.freshness import stale_reason
    from nnssl.data.unlabeled import unlabeled_cases

    try:
        target, cases = unlabeled_cases(plans_manager, configuration, dataset_json, hidden)
    except ValueError as error:
        yield Finding(ERROR, configuration, str(error).replace("\n", " "))
        return
    if not cases:
        yield Finding(
            ERROR,
            configuration,
            "no unlabeled case",
            remedy=f"Put scans into {join(raw, 'imagesUn')}, or hide labels with `nnssl split`",
        )
    elif stale := sum(bool(stale_reason(case, target)) for case in cases):
        yield Finding(
            WARNING,
            configuration,
            f"{stale} of {len(cases)} unlabeled cases are missing or stale",
            remedy=f"Training preprocesses them when it starts, or: {remedy}",
        )
    else:
        yield Finding(
            OK,
            configuration,
            f"{len(cases)} unlabeled cases preprocessed ({len(hidden)} of them with hidden labels)",
        )
