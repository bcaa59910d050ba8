"""The columns of the matrix: what nnU-Net can be asked to train, each a tiny dataset, plan and run."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nnunetv2.inference.predict_from_raw_data
import nnunetv2.run.run_training
import numpy as np
import pytest
import torch
from nnunetv2.ensembling.ensemble import ensemble_folders
from nnunetv2.evaluation.find_best_configuration import find_best_configuration
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args, run_training
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.commands.cli import main
from nnssl.training.history import History
from tests.matrix.datasets import LABELED, Dataset
from tests.place import lean_nnunet, point_at

ID, NAME = "777", "Dataset777_Matrix"
CPU = torch.device("cpu")
GENERAL: dict[str, Any] = {
    "num_epochs": 1,
    "num_iterations_per_epoch": 3,
    "num_val_iterations_per_epoch": 1,
    "seed": 0,
}
SMALL: dict[str, dict[str, Any]] = {
    "DiffCL": {"embedding": 8, "bank_size": 64, "bank_per_step": 16, "candidates": 128},
    "SemSim": {"width": 16, "max_tokens": 256},
    "CAML": {"embedding": 8, "rows": 16, "queries": 64},
    "ACTION": {"embedding": 8, "num_queries": 16, "num_negatives": 32, "candidates": 64},
    "UAMT": {"passes": 2},
}
TWO_CLASSES = Dataset()
FOLDS = (0, 1, 2, 3, 4)
LOWRES, FULLRES, CASCADE = "3d_lowres", "3d_fullres", "3d_cascade_fullres"


class Workspace:
    """A planned and preprocessed phantom dataset, at which nnU-Net's variables point."""

    def __init__(self, folder: Path, plans: str) -> None:
        self.folder, self.plans = folder, plans
        self.raw, self.preprocessed = folder / "raw" / NAME, folder / "preprocessed" / NAME

    def train(self, trainer: str, config: str, fold: Any = 0, **options: Any) -> Path:
        """nnU-Net's own `run_training`, with its validation; the folder of the model."""
        run_training(ID, config, fold, trainer, self.plans, device=CPU, **options)
        model = self.folder / "results" / NAME / f"{trainer}__{self.plans}__{config}"
        run = model / f"fold_{fold}"
        rows = np.loadtxt(run / "losses.csv", delimiter=",", skiprows=1, ndmin=2)
        header = (run / "losses.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
        for name, value in zip(header, rows[-1], strict=True):
            assert np.isfinite(value) or not name.startswith(("loss/", "weight/")), f"{name} is {value}"
        summary = json.loads((run / "validation" / "summary.json").read_text(encoding="utf-8"))
        assert summary["metric_per_case"], "no case was validated"
        return model

    def predict(self, model: Path, folds: tuple[Any, ...] = (0,), **options: Any) -> Path:
        """A prediction of one scan by nnU-Net's predictor, checked."""
        images = sorted(str(f) for f in (self.raw / "imagesUn").glob("scan_0_*"))
        output = self.folder / "predicted" / model.name
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        predictor = nnUNetPredictor(device=CPU, perform_everything_on_device=False, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), folds, "checkpoint_final.pth")
        predictor.predict_from_files_sequential([images], [str(output / "scan_0")], **options)
        self.check(output)
        return output

    def check(self, output: Path) -> None:
        """Size and values of the predicted scan."""
        dataset = json.loads((self.preprocessed / "dataset.json").read_text(encoding="utf-8"))
        manager = PlansManager(str(self.preprocessed / f"{self.plans}.json"))
        reader = manager.image_reader_writer_class()
        ending = dataset["file_ending"]
        found = reader.read_seg(str(output / f"scan_0{ending}"))[0]
        scan = reader.read_images([str(self.raw / "imagesUn" / f"scan_0_0000{ending}")])[0]
        assert found.shape[1:] == scan.shape[1:], (found.shape, scan.shape)
        allowed = {0, *manager.get_label_manager(dataset).foreground_labels}
        assert set(np.unique(found).tolist()) <= allowed, np.unique(found)


Run = Callable[[Workspace, str], None]


def plain(config: str, fold: Any = 0) -> Run:
    """Training, validation, prediction."""

    def run(place: Workspace, trainer: str) -> None:
        place.predict(place.train(trainer, config, fold), (fold,))

    return run


def cascade(place: Workspace, trainer: str) -> None:
    """3d_lowres, its predictions, 3d_cascade_fullres; predicted in two steps, too."""
    low = place.predict(place.train(trainer, LOWRES, "all"), ("all",))
    model = place.train(trainer, CASCADE, "all")
    place.predict(model, ("all",), folder_with_segs_from_prev_stage=str(low))


def five_folds(place: Workspace, trainer: str) -> None:
    """2d and 3d_fullres in five folds each, `find_best_configuration`, an ensemble of both."""
    outputs, models = [], []
    for config in ("2d", FULLRES):
        for fold in FOLDS:
            model = place.train(trainer, config, fold, export_validation_probabilities=True)
        models.append({"plans": place.plans, "configuration": config, "trainer": trainer})
        outputs.append(place.predict(model, FOLDS, save_probabilities=True))
    find_best_configuration(int(ID), tuple(models), num_processes=1, folds=FOLDS)
    assert (place.folder / "results" / NAME / "inference_information.json").is_file()
    output = place.folder / "predicted" / f"{trainer}_ensemble"
    ensemble_folders([str(folder) for folder in outputs], str(output), num_processes=1)
    place.check(output)


def pretrained(place: Workspace, trainer: str) -> None:
    """From a model of plain nnU-Net's."""
    first = get_trainer_from_args(ID, FULLRES, 1, "nnUNetTrainer", place.plans, device=CPU)
    first.initialize()
    path = os.path.join(first.output_folder, "checkpoint_final.pth")
    first.save_checkpoint(path)
    place.predict(place.train(trainer, FULLRES, pretrained_weights=path))


@dataclass(frozen=True)
class Column:
    """What is trained and how.

    title     in the table
    hidden    whether a split hides a label; else nnU-Net's own folds
    planner   nnU-Net's class
    """

    title: str
    run: Run
    dataset: Dataset = TWO_CLASSES
    configurations: tuple[str, ...] = (FULLRES,)
    hidden: bool = True
    planner: str = "ExperimentPlanner"

    def prepare(self, folder: Path) -> Workspace:
        """Write, plan and preprocess; nnU-Net's variables point below `folder`."""
        plans = "nnUNetPlans" if self.planner == "ExperimentPlanner" else "nnUNetResEncUNetMPlans"
        place = Workspace(folder, plans)
        self.dataset.write(place.raw)
        command = ["plan-and-preprocess", "-d", ID, "-np", "1", "-npfp", "1", "--no_pbar"]
        assert main([*command, "-pl", self.planner, "--no_pp"]) == 0
        self._shrink(place.preprocessed / f"{plans}.json")
        stages = [c for c in self.configurations if c != CASCADE]
        assert main([*command, "-p", plans, "-c", *stages]) == 0
        splits = place.preprocessed / "splits_final.json"
        cases = [f"lab_{number}" for number in range(LABELED)]
        if self.hidden:
            splits.write_text(
                json.dumps([{"train": cases[:3], "val": cases[3:4], "unlabeled": cases[4:]}] * 2)
            )
        return place

    def _shrink(self, path: Path) -> None:
        """Thin networks, short runs, and a 3d_lowres as nnU-Net's planner writes it for large scans."""
        plans = json.loads(path.read_text(encoding="utf-8"))
        for configuration in plans["configurations"].values():
            if "architecture" in configuration:
                kwargs = configuration["architecture"]["arch_kwargs"]
                kwargs["features_per_stage"] = [4, 8, 8, 8, 8, 8, 8][: kwargs["n_stages"]]
                for key in ("n_blocks_per_stage", "n_conv_per_stage"):
                    if key in kwargs:
                        kwargs[key] = [1] * kwargs["n_stages"]
                configuration["batch_size"] = 2
        if LOWRES in self.configurations:
            full = plans["configurations"][FULLRES]
            low = {"data_identifier": f"{plans['plans_name']}_{LOWRES}", "next_stage": CASCADE}
            spacing = [1.3 * s for s in full["spacing"]]
            plans["configurations"][LOWRES] = {**full, **low, "spacing": spacing}
            plans["configurations"][CASCADE] = {"inherits_from": FULLRES, "previous_stage": LOWRES}
        plans["nnssl"] = {**GENERAL, **SMALL}
        path.write_text(json.dumps(plans))


ANISOTROPIC = Dataset(shape=(6, 32, 32), spacing=(8.0, 1.0, 1.0))
MODALITIES = Dataset(channels=("T1", "CT", "noNorm", "rescale_to_0_1"))
WHOLE_AND_CORE = {"background": 0, "whole": [1, 2], "core": 2}
REGIONS = Dataset(labels=WHOLE_AND_CORE, regions_class_order=(1, 2))
IGNORE = Dataset(labels={"background": 0, "a": 1, "b": 2, "ignore": 3})
BOTH = Dataset(labels={**WHOLE_AND_CORE, "ignore": 3}, regions_class_order=(1, 2))
ONE_CLASS = Dataset(labels={"background": 0, "a": 1}, classes=1)
SIX_CLASSES = Dataset(labels={"background": 0, **{f"c{k}": k for k in range(1, 7)}}, classes=6)
PNG = Dataset(channels=("R", "G", "B"), shape=(32, 32), spacing=(1.0, 1.0), ending=".png")
TIFF = Dataset(ending=".tif")

COLUMNS = {
    "2d": Column("2d", plain("2d"), configurations=("2d",)),
    "3d_fullres": Column("3d_fullres", plain(FULLRES)),
    "3d_lowres": Column("3d_lowres", plain(LOWRES), configurations=(FULLRES, LOWRES)),
    "cascade": Column(
        "3d_lowres, then 3d_cascade_fullres", cascade, configurations=(FULLRES, LOWRES, CASCADE), hidden=False
    ),
    "resenc": Column("residual encoder preset (M)", plain(FULLRES), planner="nnUNetPlannerResEncM"),
    "modalities": Column("four channels, four normalizations", plain(FULLRES), MODALITIES),
    "anisotropic": Column("anisotropic, dummy 2D", plain(FULLRES), ANISOTROPIC),
    "regions": Column("regions", plain(FULLRES), REGIONS),
    "ignore": Column("ignore label", plain(FULLRES), IGNORE),
    "regions_ignore": Column("regions and ignore label", plain(FULLRES), BOTH),
    "one_class": Column("one class", plain(FULLRES), ONE_CLASS),
    "six_classes": Column("six classes", plain(FULLRES), SIX_CLASSES),
    "fold_all": Column("fold all", plain(FULLRES, "all"), hidden=False),
    "five_folds": Column(
        "2d and 3d_fullres in 5 folds, best configuration, ensemble",
        five_folds,
        configurations=("2d", FULLRES),
        hidden=False,
    ),
    "png": Column("PNG, RGB", plain("2d"), PNG, configurations=("2d",)),
    "tiff": Column("TIFF", plain(FULLRES), TIFF),
    "pretrained": Column("pretrained weights of plain nnU-Net", pretrained),
}


def surroundings(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """nnU-Net's variables for a column in `folder`.

    What costs time and says nothing about a cell is left out: interpreters for workers, figures, a new search
    for the same trainer.
    """
    point_at(folder, patch)
    lean_nnunet(patch)
    patch.setattr(MetaLogger, "plot_progress_png", lambda _, run: Path(run, "progress.png").touch())
    patch.setattr(History, "_plot", lambda *_: None)
    find = functools.cache(recursive_find_trainer_class_by_name)
    for module in (nnunetv2.run.run_training, nnunetv2.inference.predict_from_raw_data):
        patch.setattr(module, "recursive_find_trainer_class_by_name", find)
    patch.delenv("nnUNet_n_proc_DA", raising=False)  # planning does not work with it
    patch.setenv("nnUNet_compile", "f")


def training_surroundings(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("nnUNet_n_proc_DA", "0")
