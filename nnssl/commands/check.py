"""``nnssl check``: installation, dataset and split, one line each with what to fix."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from os.path import isdir, isfile, join, realpath, samefile
from typing import Any

from nnunetv2.paths import nnUNet_extTrainer

import nnssl
from nnssl.commands.trainers import list_trainers, trainers_folder
from nnssl.data.raw import num_channels, plans_in, training_files
from nnssl.data.split import absent_classes, hidden_cases, load_splits
from nnssl.files import read_json

Finding = tuple[str, str]  # "ok" | "warn" | "FAIL", text


def run_checks(
    dataset_id: int | None = None, configuration: str | None = None, plans_name: str = "nnUNetPlans"
) -> int:
    """Print every finding as it is made; 1 if something must be fixed before a training can run, else 0."""
    failed = False
    for level, text in _findings(dataset_id, configuration, plans_name):
        print(f"{level:4}  {text}", flush=True)
        failed |= level == "FAIL"
    return int(failed)


def _findings(dataset_id: int | None, configuration: str | None, plans_name: str) -> Iterator[Finding]:
    yield from _versions()
    yield from _environment()
    yield from _trainers()
    yield from _devices()
    if dataset_id is not None:
        yield from _dataset(dataset_id, configuration, plans_name)


def _versions() -> Iterator[Finding]:
    names = ("torch", "nnunetv2", "batchgeneratorsv2", "dynamic-network-architectures")
    yield (
        "ok",
        f"nnssl {nnssl.__version__}, python {platform.python_version()}, "
        + ", ".join(f"{n} {metadata.version(n)}" for n in names),
    )
    version = metadata.version("nnunetv2")
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 8):
        yield "FAIL", f"nnunetv2 {version} has no nnUNet_extTrainer: pip install 'nnunetv2>=2.8,<3'"
    own = realpath(nnssl.__path__[0])
    others = {
        realpath(join(path or ".", "nnssl"))
        for path in sys.path
        if isfile(join(path or ".", "nnssl", "__init__.py"))
    } - {own}
    if others or _installed("nnssl"):
        where = ", ".join(sorted(others)) or "distribution nnssl"
        yield (
            "warn",
            f"another package is called nnssl, too ({where}): the two cannot share an environment; make a "
            f"new one for nnunet-semi",
        )


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _environment() -> Iterator[Finding]:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        value = os.environ.get(name)
        if not value:
            level = "warn" if name == "nnUNet_raw" else "FAIL"  # training can do with preprocessed data alone
            yield level, f"{name} is not set: export {name}=/where/you/keep/{name}"
        elif not isdir(value):
            yield "FAIL", f"{name}={value} does not exist: mkdir -p '{value}', or correct the variable"
        else:
            yield "ok", f"{name}={value}"


def _trainers() -> Iterator[Finding]:
    folder = trainers_folder()
    export = f"export nnUNet_extTrainer='{folder}'"
    paths = [path for path in (nnUNet_extTrainer.get() or "").split(os.pathsep) if path.strip()]
    if not paths:
        yield "FAIL", f"nnUNet_extTrainer is not set: {export}"
    elif not any(isdir(path) and samefile(path, folder) for path in paths):
        yield (
            "FAIL",
            f"nnUNet_extTrainer={os.pathsep.join(paths)} is not the folder of the trainers: {export}",
        )
    else:
        yield "ok", f"nnUNet_extTrainer={os.pathsep.join(paths)}"
    names = list_trainers(folder)
    for name in names:
        try:
            importlib.import_module(f"nnssl_trainers.{name}")
        except Exception as error:
            yield (
                "FAIL",
                f"{name} cannot be imported, which hides every trainer after it from nnU-Net: "
                f"{type(error).__name__}: {error}",
            )
    yield "ok", f"trainers: {', '.join(names)}"


def _devices() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield "ok", f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    elif torch.backends.mps.is_available():
        yield "ok", "no CUDA device; train with -device mps"
    else:
        yield (
            "warn",
            f"no GPU: train with -device cpu, {torch.get_num_threads()} threads; expect hours to days with "
            f"nnU-Net's default plan",
        )
    try:
        from nnssl.ssm import available_backends

        for backend in available_backends():
            broken = "broken" in backend.reason
            state = "usable" if backend.usable else f"not used ({backend.reason})"
            yield "warn" if broken else "ok", f"state-space backend {backend.name}: {state}"
    except Exception as error:
        yield "warn", f"state-space backends cannot be queried: {type(error).__name__}: {error}"


def _dataset(dataset_id: int, configuration: str | None, plans_name: str) -> Iterator[Finding]:
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    try:
        name = str(convert_id_to_dataset_name(dataset_id))
    except RuntimeError as error:
        yield "FAIL", f"dataset {dataset_id}: {' '.join(str(error).split())}"
        return
    raw, preprocessed = (
        join(os.environ.get(variable) or "", name) for variable in ("nnUNet_raw", "nnUNet_preprocessed")
    )
    yield from _raw(name, raw)
    plans_file = join(preprocessed, plans_name + ".json")
    if not (isfile(plans_file) and isfile(join(preprocessed, "dataset.json"))):
        yield (
            "FAIL",
            f"no plan {plans_file} (found: {plans_in(preprocessed)}): nnssl plan-and-preprocess -d "
            f"{dataset_id}, or name one with -p",
        )
        return
    plans_manager, dataset_json = PlansManager(plans_file), read_json(join(preprocessed, "dataset.json"))
    available = plans_manager.available_configurations
    if configuration is not None and configuration not in available:
        yield "FAIL", f"-c {configuration} is not in {plans_file}, which has {', '.join(available)}"
        return
    folders = {c: join(preprocessed, plans_manager.get_configuration(c).data_identifier) for c in available}
    chosen = [configuration] if configuration else [c for c in available if isdir(folders[c])]
    yield "ok", f"plan {plans_file}: {', '.join(available)}"
    if not any(isdir(folders[c]) for c in chosen):
        wanted = f" -c {configuration}" if configuration else ""
        yield (
            "FAIL",
            f"nothing is preprocessed for {plans_name}: nnssl plan-and-preprocess -d {dataset_id} -p "
            f"{plans_name}{wanted}",
        )
        return
    for c in chosen:
        remedy = f"nnssl plan-and-preprocess -d {dataset_id} -p {plans_name} -c {c}"
        for level, text in _configuration(plans_manager, c, dataset_json, raw, folders[c], remedy):
            yield level, f"{c}: {text}"


def _raw(name: str, raw: str) -> Iterator[Finding]:
    from nnssl.data.unlabeled import find_unlabeled_images

    if not isfile(join(raw, "dataset.json")):
        yield "warn", f"{name}: no raw dataset at {raw}; the preprocessed data must then be complete"
        return
    try:
        dataset_json = read_json(join(raw, "dataset.json"))
        training, scans = training_files(raw, dataset_json), find_unlabeled_images(raw, dataset_json)
    except KeyError as error:
        yield "FAIL", f"{join(raw, 'dataset.json')}: key {error} is missing"
    except ValueError as error:
        yield "FAIL", str(error)
    else:
        yield (
            "ok",
            f"{name}: {num_channels(dataset_json)} channel(s), {len(training)} labeled cases, {len(scans)} "
            f"scans in imagesUn",
        )


def _configuration(
    plans_manager: Any, configuration: str, dataset_json: dict[str, Any], raw: str, folder: str, remedy: str
) -> Iterator[Finding]:
    """Labeled and unlabeled data of one configuration, then the folds; `remedy` is the command that
    preprocesses."""
    from nnssl.data.freshness import stale_reason
    from nnssl.data.labeled import labeled_cases, removed_cases
    from nnssl.data.unlabeled import unlabeled_cases

    known = (
        sorted(file.removesuffix(".pkl") for file in os.listdir(folder) if file.endswith(".pkl"))
        if isdir(folder)
        else []
    )
    if isdir(raw):
        target, every = labeled_cases(plans_manager, configuration, dataset_json, raw)
        cases = [case for case in every if all(isfile(source) for source in case.sources)]
        reasons = [reason for case in cases if (reason := stale_reason(case, target))]
        if lost := [source for case in every for source in case.images if not isfile(source)]:
            yield "FAIL", f"{len(lost)} images are missing: {', '.join(lost[:3])}"
        if without := [case.name for case in every if case.label and not isfile(case.label)]:
            shown = ", ".join(without[:3])
            yield (
                "FAIL",
                f"{len(without)} cases of imagesTr have no label ({shown}): add it, or move the scans "
                f"into imagesUn",
            )
        if not every:
            yield "warn", f"imagesTr is empty; the {len(known)} preprocessed cases are used as they are"
        elif reasons:
            yield (
                "FAIL",
                f"{len(reasons)} of {len(cases)} labeled cases are missing or stale "
                f"({', '.join(sorted(set(reasons)))}): {remedy}",
            )
        else:
            yield "ok", f"{len(cases)} labeled cases preprocessed"
        removed = removed_cases(target, every)
        if every and removed:
            shown = ", ".join(removed[:3])
            yield (
                "warn",
                f"{len(removed)} preprocessed cases are not in imagesTr ({shown}) and would be trained on; "
                f"{remedy} moves them aside",
            )

    splits_file = join(os.path.dirname(folder), "splits_final.json")
    folds: list[Any] = []
    hidden: set[str] = set()
    try:
        folds = load_splits(splits_file) if isfile(splits_file) else []
        for index in range(len(folds)):
            hidden.update(hidden_cases(splits_file, index, known))
    except ValueError as error:
        yield "FAIL", str(error)
    try:
        target, cases = unlabeled_cases(plans_manager, configuration, dataset_json, sorted(hidden))
        stale = sum(bool(stale_reason(case, target)) for case in cases)
        if not cases:
            yield (
                "FAIL",
                f"no unlabeled case: put scans into {join(raw, 'imagesUn')}, or hide labels with `nnssl "
                f"split`",
            )
        elif stale:
            yield (
                "warn",
                f"{stale} of {len(cases)} unlabeled cases are missing or stale; training preprocesses "
                f"them at start, or: {remedy}",
            )
        else:
            yield (
                "ok",
                f"{len(cases)} unlabeled cases preprocessed ({len(hidden)} of them with hidden labels)",
            )
    except ValueError as error:
        yield "FAIL", str(error)

    label_manager = plans_manager.get_label_manager(dataset_json)
    for index, fold in enumerate(folds or [{"train": known, "val": []}]):
        what = f"fold {index}" if folds else "no splits_final.json yet (nnU-Net makes 5 folds)"
        counts = ", ".join(f"{len(fold.get(key, []))} {key}" for key in ("train", "val", "unlabeled"))
        try:
            absent = absent_classes(folder, fold["train"], label_manager)
        except ValueError as error:
            yield "FAIL", f"{what}: {error}"
            continue
        if absent:
            yield (
                "FAIL",
                f"{what}: {counts}; no labeled case has class {absent}: label one, or choose other labeled "
                f"cases (`nnssl split`)",
            )
        else:
            yield "ok", f"{what}: {counts}"
            yield from _mirroring(plans_manager, configuration, folder, fold["train"], label_manager, what)


def _mirroring(
    plans_manager: Any, configuration: str, folder: str, cases: list[str], label_manager: Any, what: str
) -> Iterator[Finding]:
    """Axes whose mirroring swaps classes, where the plans file does not say what may be mirrored."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    from nnssl.data.mirroring import allowed_axes, offsets_of

    if plans_manager.plans.get("nnssl", {}).get("mirror_axes") is not None:
        return
    dim = len(plans_manager.get_configuration(configuration).patch_size)
    offsets = offsets_of(infer_dataset_class(folder)(folder, list(cases)), cases, label_manager, dim)
    if harmful := [o for o in offsets if o.harmful]:
        shown = "; ".join(map(str, harmful[:3])) + ("; ..." if len(harmful) > 3 else "")
        yield (
            "warn",
            f"{what}: mirroring looks harmful, it may swap classes ({shown}). Compare with "
            f'"nnssl": {{"mirror_axes": "auto"}} in the plans file, here '
            f"{list(allowed_axes(offsets, dim))}",
        )
