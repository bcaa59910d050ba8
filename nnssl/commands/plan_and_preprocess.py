"""``nnssl plan-and-preprocess``: nnU-Net's fingerprint, plan and preprocessing of the labeled part, then
imagesUn with the same plan.

Unlike nnU-Net's own command it uses a plans file that already exists (``--replan`` makes a new one,
keeps a backup and carries the key ``nnssl`` over), and redoes only cases that are missing or stale.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from os.path import abspath, dirname, isfile, join
from types import SimpleNamespace
from typing import Any

import nnunetv2
from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor
from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnssl.data.findings import WARNING, Finding, listed, raise_errors
from nnssl.data.inspection import KEYS_OF_PLAN, inspect_contents, inspect_files, inspect_plan_channels
from nnssl.data.labeled import copy_ground_truth, ensure_labeled
from nnssl.data.parallel import usable_cores
from nnssl.data.raw import plans_in, training_files
from nnssl.data.split import backup, load_splits
from nnssl.data.unlabeled import ensure_unlabeled, find_unlabeled_images, set_removed_aside
from nnssl.files import copy_file, read_json, write_text
from nnssl.methods import method_classes
from nnssl.training.arguments import plans_of_planner
from nnssl.training.lookup import dataset_name, nnunet_folder

NNUNET_PROCESSES = {
    "2d": 8,
    "3d_fullres": 4,
    "3d_lowres": 8,
}  # nnU-Net's defaults per configuration, 4 for any other
PLANNING_OPTIONS = ("gpu_memory_target", "preprocessor_name", "overwrite_target_spacing")


def plan_and_preprocess(args: argparse.Namespace) -> None:
    """Carry out the command for every dataset of ``args.d``; ValueError or RuntimeError with file and remedy
    where that is impossible."""
    if args.np is not None and len(args.np) not in (1, len(args.c)):
        raise ValueError(
            f"-np: {len(args.np)} numbers for {len(args.c)} configurations. Give one number, or one per "
            "configuration."
        )
    _check_values(args)
    for dataset_id, name in [(one, dataset_name(one)) for one in args.d]:  # all names before any work
        raw, preprocessed = (
            join(nnunet_folder(variable), name) for variable in ("nnUNet_raw", "nnUNet_preprocessed")
        )
        if not isfile(join(raw, "dataset.json")):
            raise ValueError(
                f"{join(raw, 'dataset.json')} does not exist. Set nnUNet_raw to the folder of raw datasets."
            )
        plans_name = args.p or args.overwrite_plans_name or _plans_name(args.pl)
        plans_file = join(preprocessed, plans_name + ".json")
        _check_options(args, raw, preprocessed, plans_file)
        dataset_json = _inspect(args, raw, preprocessed, plans_name)  # before hours of work
        scans = find_unlabeled_images(raw, dataset_json)
        _plan(args, dataset_id, raw, preprocessed, plans_file)
        used = 0
        if not args.no_pp:
            used = _preprocess(args, PlansManager(plans_file), raw, preprocessed)
            print(
                f"{name}: the labeled cases and {len(scans)} scans of imagesUn are preprocessed for "
                f"{os.path.basename(plans_file)}."
            )
        if not scans and not used:
            print(
                f"There are no unlabeled scans yet: put them into {join(raw, 'imagesUn')}, or hide labels "
                "with `nnssl split`."
            )


def _check_values(args: argparse.Namespace) -> None:
    """Refuse values that nnU-Net would take, and fail with, hang at or write into a plan."""
    spacing, memory, name = args.overwrite_target_spacing, args.gpu_memory_target, args.overwrite_plans_name
    for option, number in [("-np", n) for n in args.np or []] + [("-npfp", args.npfp)]:
        if number is not None and number < 1:
            raise ValueError(f"{option} {number}: expected 1 or more processes.")
    if spacing and not all(0 < mm < math.inf for mm in spacing):
        raise ValueError(f"-overwrite_target_spacing {' '.join(map(str, spacing))}: expected mm above 0.")
    if memory is not None and not 0 < memory < math.inf:
        raise ValueError(f"-gpu_memory_target {memory:g}: expected GB above 0.")
    if name is not None and (
        not name.strip() or {"/", "\\"} & set(name) or name.endswith(".json") or "__" in name
    ):
        raise ValueError(
            f"-overwrite_plans_name {name}: expected a plain name, without folder, .json and the __ that "
            "parts the names of models."
        )
    if args.preprocessor_name:
        _find_class(args.preprocessor_name, "-preprocessor_name", "preprocessing")


def _check_options(args: argparse.Namespace, raw: str, preprocessed: str, plans_file: str) -> None:
    """Refuse what the options name and is not there."""
    if args.p and not isfile(plans_file):
        if (plans := plans_of_planner(args.p)) is not None:
            raise ValueError(
                f"-p {args.p} is a planner: plan with -pl {args.p}, then -p {plans} names the plan."
            )
        raise ValueError(
            f"-p {args.p}: {plans_file} does not exist. Plans here: {plans_in(preprocessed)}; leave "
            "-p out to make one."
        )
    if args.replan or not isfile(plans_file):
        _find_class(args.fpe, "-fpe")
        _check_split(join(raw, "splits_final.json"), join(preprocessed, "splits_final.json"))


def _inspect(args: argparse.Namespace, raw: str, preprocessed: str, plans_name: str) -> dict[str, Any]:
    """Print what is odd about a dataset and refuse what is wrong, before anything is written; its
    dataset.json."""
    sections = {name: method.config_class for name, method in method_classes().items()}
    findings = inspect_files(raw, preprocessed, plans_name, sections, planning=True)
    if args.replan:  # what is wrong with the old plan goes with it, all but the section that is kept
        old = join(preprocessed, plans_name + ".json") + ", key "
        findings = (f for f in findings if not f.place.startswith(old) or f.place == f"{old}nnssl")
    _report(findings)
    dataset_json: dict[str, Any] = read_json(join(raw, "dataset.json"))
    if not args.no_pp:
        plans_file = join(preprocessed, plans_name + ".json")
        plans = read_json(plans_file) if isfile(plans_file) and not args.replan else None
        if plans and not any(configuration in plans["configurations"] for configuration in args.c):
            raise ValueError(f"-c {' '.join(args.c)}: the plan has {', '.join(plans['configurations'])}.")
        bar = partial(tqdm, desc="inspection", unit="file", disable=args.no_pbar, mininterval=0.5)
        processes = max(args.np) if args.np else None
        _report(
            inspect_contents(
                raw, preprocessed, dataset_json, plans, args.c[0], num_processes=processes, progress=bar
            )
        )
    return dataset_json


def _report(findings: Iterable[Finding]) -> None:
    """Print the warnings; ValueError with all errors."""
    found = list(findings)
    for finding in found:
        if finding.level == WARNING:
            print(f"WARNING: {finding}")
    raise_errors(found)


def _plan(args: argparse.Namespace, dataset_id: int, raw: str, preprocessed: str, plans_file: str) -> None:
    """Plan where the plan is absent or ``--replan`` is given; else check the plan that is there."""
    processes = args.npfp or min(8, usable_cores())
    if isfile(plans_file) and not args.replan:
        unused = [f"-{option}" for option in PLANNING_OPTIONS if getattr(args, option)] + [
            "--clean"
        ] * args.clean
        ignored = f"; ignored: {', '.join(unused)}" if unused else ""
        print(f"Using the existing plan {plans_file} (--replan makes a new one and keeps a backup{ignored}).")
        _renew_copy(plans_file, raw, preprocessed)
        _take_split(join(raw, "splits_final.json"), join(preprocessed, "splits_final.json"))
        if args.verify_dataset_integrity:
            verify_dataset_integrity(raw, processes)
        return

    kept: dict[str, Any] = {}
    fingerprint = join(preprocessed, "dataset_fingerprint.json")
    old = _outdated(fingerprint, raw) if isfile(fingerprint) else ""
    if old:
        print(f"{fingerprint} is extracted anew: {old}.")
    elif isfile(fingerprint) and not args.clean:
        print(f"Using {fingerprint}, since which no case has changed (--clean extracts it anew).")
    with _planning_threads(), _whole_files(plans_file, kept):
        if old or args.clean or not isfile(fingerprint):
            print("Fingerprint extraction ...")
        extract_fingerprints(
            [dataset_id],
            args.fpe,
            processes,
            args.verify_dataset_integrity,
            args.clean or bool(old),
            args.verbose,
            show_progress_bar=not args.no_pbar,
        )
        if isfile(plans_file) and not args.replan:
            print(f"Using the plan {plans_file}, which another process has made meanwhile.")
            return
        if isfile(plans_file):
            kept.update({key: value for key, value in read_json(plans_file).items() if key == "nnssl"})
            print(f"The old plan was saved as {backup(plans_file)}.")
        print("Experiment planning ...")
        preprocessor = args.preprocessor_name or "DefaultPreprocessor"
        plan_experiments(
            [dataset_id],
            args.pl,
            args.gpu_memory_target,
            preprocessor,
            args.overwrite_target_spacing,
            args.overwrite_plans_name,
        )


def _outdated(fingerprint: str, raw: str) -> str:
    """Why nnU-Net's fingerprint is not that of today's cases, by number and times; empty where it is."""
    dataset_json = join(raw, "dataset.json")
    cases = training_files(raw, read_json(dataset_json))
    try:
        number = len(read_json(fingerprint)["spacings"])
    except (ValueError, KeyError, TypeError) as error:
        return f"it cannot be used ({error})"
    if number != len(cases):
        return f"it is of {number} cases, the dataset has {len(cases)}"
    files = [file for images, label in cases.values() for file in (*images, label)]
    folders = sorted({dirname(file) for file in files})  # newer where a file came, went or was renamed
    written = os.stat(fingerprint).st_mtime_ns
    newer = [path for path in (dataset_json, *files, *folders) if os.stat(path).st_mtime_ns > written]
    return f"{listed(newer, 5)} changed after it was written" if newer else ""


@contextmanager
def _whole_files(plans_file: str, kept: Mapping[str, Any]) -> Iterator[None]:
    """nnU-Net's planning writes in place, and half a plan would stop the next run: here whole files or none,
    the plan with the keys of `kept`."""

    def save(content: dict[str, Any], file: str, indent: int = 4, sort_keys: bool = True) -> None:
        if abspath(file) == abspath(plans_file):
            content = {**content, **kept}
        write_text(json.dumps(content, indent=indent, sort_keys=sort_keys), file)

    own = [
        (module, "save_json", module.save_json)
        for module in (fingerprint_extractor, default_experiment_planner)
    ]
    own.append((default_experiment_planner, "shutil", default_experiment_planner.shutil))
    try:
        for module, name, _ in own:
            setattr(module, name, SimpleNamespace(copy=copy_file) if name == "shutil" else save)
        yield
    finally:
        for module, name, value in own:
            setattr(module, name, value)


@contextmanager
def _planning_threads() -> Iterator[None]:
    """nnU-Net plans with nnUNet_n_proc_DA threads; 0, which suits trainings, is no number of threads."""
    given = os.environ.get("nnUNet_n_proc_DA")
    if given is not None and int(given) == 0:
        os.environ["nnUNet_n_proc_DA"] = "1"
    try:
        yield
    finally:
        if given is not None:
            os.environ["nnUNet_n_proc_DA"] = given


def _plans_name(planner: str) -> str:
    return str(inspect.signature(_find_class(planner, "-pl")).parameters["plans_name"].default)


def _find_class(name: str, option: str, package: str = "experiment_planning") -> type:
    folder = join(nnunetv2.__path__[0], package)
    found = recursive_find_python_class(folder, name, f"nnunetv2.{package}")
    if found is None:
        raise ValueError(f"{option} {name}: nnU-Net has no such class in {folder}.")
    return found


def _renew_copy(plans_file: str, raw: str, preprocessed: str) -> None:
    """Bring nnU-Net's copy of dataset.json up to date, as planning would; refuse what needs a new plan."""
    source, copy = join(raw, "dataset.json"), join(preprocessed, "dataset.json")
    new = read_json(source)
    raise_errors(inspect_plan_channels(plans_file, read_json(plans_file), new))
    old = read_json(copy) if isfile(copy) else new
    for key in KEYS_OF_PLAN:
        if old.get(key) != new.get(key):
            raise ValueError(
                f"{source}: {key} is {new.get(key)}, but was {old.get(key)} when the plan was made. Use "
                "--replan --clean."
            )
    if old != new or not isfile(copy):
        copy_file(source, copy)


def _check_split(source: str, copy: str) -> None:
    """nnU-Net's planner stops without a word where the raw dataset brings a split that differs from the one
    in use."""
    if _splits_differ(source, copy):
        raise ValueError(
            f"{source} and {copy} differ. Keep one: remove the former to use the latter, or the latter to "
            "use the former."
        )


def _splits_differ(source: str, copy: str) -> bool:
    """Whether both are there, with other training or validation cases."""
    if not (isfile(source) and isfile(copy)):
        return False
    theirs, ours = (
        [(set(fold["train"]), set(fold["val"])) for fold in load_splits(file)] for file in (source, copy)
    )
    return ours[: len(theirs)] != theirs


def _take_split(source: str, copy: str) -> None:
    """Copy a split that the raw dataset brings, as nnU-Net's planner does; say where another is in use."""
    if isfile(source) and not isfile(copy):
        load_splits(source)
        copy_file(source, copy)
        print(f"The split {source} was copied to {copy}.")
    elif _splits_differ(source, copy):
        print(
            f"WARNING: {source} and {copy} differ, and trainings use the latter. Remove it to use the former "
            "with the next run of this command."
        )


def _preprocess(args: argparse.Namespace, plans_manager: PlansManager, raw: str, preprocessed: str) -> int:
    """Every configuration of ``args.c`` that the plan has; those that share data (a cascade with full
    resolution) once. Returns the largest number of unlabeled cases that one of them has."""
    dataset_json = read_json(join(preprocessed, "dataset.json"))
    processes = args.np or [
        min(NNUNET_PROCESSES.get(configuration, 4), usable_cores()) for configuration in args.c
    ]
    splits_file = join(preprocessed, "splits_final.json")
    listed = (
        {case for fold in load_splits(splits_file) for case in fold.get("unlabeled", [])}
        if isfile(splits_file)
        else set()
    )
    hidden = sorted(listed & training_files(raw, dataset_json).keys())
    done: set[str] = set()
    used = 0
    for configuration, number in zip(
        args.c, processes if len(processes) > 1 else processes * len(args.c), strict=True
    ):
        if configuration not in plans_manager.available_configurations:
            print(f"Configuration {configuration} is not in the plan and was skipped.")
            continue
        identifier = plans_manager.get_configuration(configuration).data_identifier
        if identifier not in done:
            print(f"Configuration {configuration} ...")
            ensure_labeled(
                plans_manager,
                configuration,
                dataset_json,
                raw,
                number,
                verbose=args.verbose,
                show_progress=not args.no_pbar,
            )
            set_removed_aside(plans_manager, configuration, dataset_json, raw, hidden)
            unlabeled = ensure_unlabeled(
                plans_manager,
                configuration,
                dataset_json,
                hidden,
                number,
                verbose=args.verbose,
                show_progress=not args.no_pbar,
            )
            used = max(used, len(unlabeled))
        done.add(identifier)
    if not done:
        raise ValueError(
            f"-c {' '.join(args.c)}: the plan has {', '.join(plans_manager.available_configurations)}."
        )
    copy_ground_truth(raw, dataset_json, preprocessed)
    return used
