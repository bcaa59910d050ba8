"""What trainings left in their output folders, finished or not: of our trainers and of nnU-Net's own."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nnssl.data.structures import structures
from nnssl.files import read_object, torch_damage

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
RECORD = "training.json"
ALL = "fold_all"  # trained on every case, and nnU-Net validates it on the same


@dataclass(frozen=True)
class Run:
    """One fold of one model.

    model   name of the model in the report, the same for all of its folds
    folder  .../DATASET/TRAINER__PLANS__CONFIG/fold_X
    """

    model: str
    folder: Path

    @property
    def fold(self) -> str:
        return self.folder.name.removeprefix("fold_")

    @property
    def dataset(self) -> str:
        return self.folder.parent.parent.name

    @cached_property
    def dataset_json(self) -> dict[str, Any]:
        path = self.folder.parent / "dataset.json"
        content = read_object(path)
        if not isinstance(content.get("labels"), dict):
            raise ValueError(
                f"{path}, key labels: absent or of the wrong kind. Restore it from the raw dataset."
            )
        return content

    @cached_property
    def notes(self) -> list[str]:
        """What could not be read, a line each; complete once the page is made."""
        return []

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @cached_property
    def record(self) -> dict[str, Any]:
        """training.json; empty where a trainer of nnU-Net's own or an older version of ours left none."""
        path = self.folder / RECORD
        try:
            return read_object(path) if path.is_file() else {}
        except ValueError as error:
            self.note(str(error))
            return {}

    @cached_property
    def checkpoint(self) -> dict[str, Any]:
        """`logging` and `nnssl` of the newest sound checkpoint: read only where there is no record."""
        for name in CHECKPOINTS:
            path = self.folder / name
            if not os.path.lexists(path):
                continue
            if damage := torch_damage(path):
                self.note(f"{path} is not read: {damage}")
                continue
            import torch

            content = torch.load(path, map_location="cpu", weights_only=False)
            return {key: content.get(key, {}) for key in ("logging", "nnssl")}
        return {}

    @cached_property
    def logging(self) -> dict[str, list[Any]]:
        """nnU-Net's log, a value per epoch."""
        return self.record.get("logging") or self.checkpoint.get("logging") or {}

    @cached_property
    def rows(self) -> list[dict[str, float]]:
        """losses.csv, a row per epoch."""
        path = self.folder / "losses.csv"
        if not path.is_file():
            return []
        try:
            with open(path, encoding="utf-8", newline="") as stream:
                return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]
        except (ValueError, TypeError) as error:  # a wrong or a missing value
            self.note(f"{path} is not read: {error}")
            return []

    @property
    def epochs_done(self) -> int:
        return len(self.logging.get("epoch_end_timestamps") or [])

    @property
    def epochs(self) -> int | None:
        """Of the whole training; None where nothing says."""
        if "num_epochs" in self.record:
            return int(self.record["num_epochs"])
        return self.epochs_done if self.finished else None

    @property
    def finished(self) -> bool:
        """Not where the checkpoint is that of a training before this one, in the same folder."""
        if not (self.folder / "checkpoint_final.pth").is_file():
            return False
        return self.epochs_done >= int(self.record.get("num_epochs", 0))

    @property
    def seconds(self) -> list[float]:
        """Of every epoch, training and validation on patches."""
        starts, ends = (self.logging.get(f"epoch_{k}_timestamps") or [] for k in ("start", "end"))
        return [end - start for start, end in zip(starts, ends, strict=False)]

    @cached_property
    def dice(self) -> dict[str, list[float]]:
        """Dice per epoch on patches of the validation cases, of every structure."""
        names = self.record.get("classes") or list(structures(self.dataset_json))
        values = self.logging.get("dice_per_class_or_region") or []
        return {name: [number(v[i]) for v in values if i < len(v)] for i, name in enumerate(names)}

    @cached_property
    def predictions(self) -> dict[str, Path]:
        """Predictions of the final validation by case; some while it runs, none before."""
        if (self.folder / "validation").is_dir() and not self.finished:
            self.note(f"{self.folder / 'validation'} is not read: it is of a training before this one")
            return {}
        folder, ending = self.folder / "validation", self.dataset_json["file_ending"]
        found = sorted(folder.glob(f"*{ending}")) if folder.is_dir() else []
        return {path.name.removesuffix(ending): path for path in found}

    @property
    def validated(self) -> bool:
        return self.finished and (self.folder / "validation" / "summary.json").is_file()

    @property
    def status(self) -> str:
        """One sentence."""
        if self.finished:
            validated = "validated" if self.validated else "not validated yet"
            return f"finished after {self.epochs_done} epochs, {validated}"
        of = "" if self.epochs is None else f" of {self.epochs}"
        return f"{self.epochs_done}{of} epochs so far: running or interrupted"

    @cached_property
    def config(self) -> dict[str, dict[str, Any]]:
        """Resolved configuration: general keys under "", those of the method under its name."""
        if "config" in self.record:
            return self.record["config"]
        stored = (self.checkpoint.get("nnssl") or {}).get("config")
        return {"": stored["general"], "method": stored["method"]} if stored else {}


def number(value: Any) -> float:
    """NaN for None."""
    return math.nan if value is None else float(value)


def find_runs(
    dataset: str, configuration: str, folds: Sequence[str] | None, trainers: Sequence[str], plans: str
) -> list[Run]:
    """The folds of these trainers below nnUNet_results; ValueError naming what is not there."""
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    name = str(maybe_convert_to_dataset_name(int(dataset)))
    folders = [get_output_folder(name, trainer, plans, configuration) for trainer in trainers]
    return runs_in_folders(folders, folds)


def runs_in_folders(folders: Iterable[str | os.PathLike[str]], folds: Sequence[str] | None) -> list[Run]:
    """The folds of models, or the folds themselves; ValueError naming what is not there, or two datasets."""
    chosen: dict[Path, list[Path]] = {}
    copies: dict[Path, list[str]] = {}
    apart: list[Path] = []  # models whose fold all stays out of the others
    for given in folders:
        folder = Path(os.path.abspath(given))
        if folder.name.startswith("fold_") and folder.is_dir():
            chosen.setdefault(folder.parent, []).append(folder)
            continue
        there = sorted(p for p in folder.glob("fold_*") if is_fold(p)) if folder.is_dir() else []
        if not there:
            beside = sorted(p.name for p in folder.parent.glob("*__*__*")) if folder.parent.is_dir() else []
            raise ValueError(
                f"no training in {folder}: expected the folder of a model (TRAINER__PLANS__CONFIG) with "
                f"fold_0 and so on in it. Trained there: {', '.join(beside) or 'nothing'}"
            )
        if folds is not None:
            wanted = [folder / f"fold_{fold}" for fold in folds]
            if missing := [p.name for p in wanted if not p.is_dir()]:
                raise ValueError(
                    f"{folder}: {', '.join(missing)} not there, found {', '.join(p.name for p in there)}. "
                    "Choose with -f"
                )
            there = wanted
        else:
            copies[folder] = sorted(p.name for p in folder.glob("fold_*") if not is_fold(p))
            if len(there) > 1 and folder / ALL in there:
                there.remove(folder / ALL)
                apart.append(folder)
        chosen.setdefault(folder, []).extend(there)
    names = model_names(list(chosen))
    runs = [Run(names[model], fold) for model, found in chosen.items() for fold in dict.fromkeys(found)]
    for run in runs:
        if not (run.folder.parent / "dataset.json").is_file():
            raise ValueError(
                f"{run.folder.parent} has no dataset.json: it is not the output folder of a training"
            )
    for model, left_out in copies.items():
        if left_out:
            run = next(run for run in runs if run.folder.parent == model)
            run.note(f"{model}: not read, expected fold_0 and so on or fold_all: {', '.join(left_out)}")
    for model in apart:
        run = next(run for run in runs if run.folder.parent == model)
        run.note(f"{model / ALL}: not read beside other folds, whose validation it trained on (-f all)")
    for run in (run for run in runs if run.folder.name == ALL):
        run.note(f"{run.model}, fold all: the cases of its validation were trained on, its scores flatter")
    first = runs[0]
    for run in runs:
        if run.dataset != first.dataset:
            raise ValueError(
                f"{run.folder} and {first.folder} are of two datasets, {run.dataset} and {first.dataset}: "
                "compare trainings on one"
            )
        if structures(run.dataset_json) != structures(first.dataset_json):
            raise ValueError(
                f"{run.folder} and {first.folder} have different labels: compare trainings on one dataset"
            )
    return runs


def is_fold(path: Path) -> bool:
    """A copy, as fold_0_backup, counts its cases twice."""
    return path.is_dir() and re.fullmatch(r"fold_(all|\d+)", path.name) is not None


def model_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Short names that differ: the trainer's, and what else it takes to tell the folders apart."""
    parts = {folder: folder.name.split("__") for folder in folders}
    for depth in (1, 2, 3):
        names = {
            folder: ", ".join([re.sub("^nnUNetTrainer(?=.)", "", part[0]), *part[1:depth]])
            for folder, part in parts.items()
        }
        if len(set(names.values())) == len(names):
            return names
    return {folder: f"{name} ({folder.parent})" for folder, name in names.items()}
