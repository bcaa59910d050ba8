"""Trainings on the tiny dataset, planned and preprocessed."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nnunetv2.utilities.utils
import pytest
import torch
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.run.run_training import get_trainer_from_args

from nnssl.commands.cli import main
from nnssl.commands.trainers import trainers_folder
from tests.raw_dataset import write_dataset

SHORT: dict[str, Any] = {
    "num_epochs": 2,
    "num_iterations_per_epoch": 2,
    "num_val_iterations_per_epoch": 1,
    "save_every": 1,
    "seed": 0,
}
SMALL: dict[str, Any] = {
    "ddim_steps": 2,
    "embedding": 8,
    "bank_size": 64,
    "bank_per_step": 16,
    "candidates": 128,
    "num_positives": 16,
    "num_negatives": 32,
}

MEAN_TEACHER = "nnUNetTrainerMeanTeacher"
ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 3,
        "features_per_stage": [4, 8, 8],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}


class Place:
    """One dataset below a folder of its own; nnU-Net's variables point at it."""

    def __init__(self, folder: Path) -> None:
        self.raw = folder / "raw" / "Dataset777_Tiny"
        self.preprocessed = folder / "preprocessed" / "Dataset777_Tiny"
        self.results = folder / "results" / "Dataset777_Tiny"

    def plan(self, name: str = "nnUNetPlans", **nnssl: Any) -> None:
        """Write a small-network copy of the plan under `name`, with the given `nnssl` section."""
        plans = json.loads((self.preprocessed / "nnUNetPlans.json").read_text(encoding="utf-8"))
        plans["plans_name"] = name
        plans["nnssl"] = nnssl
        for configuration in plans["configurations"].values():
            if "architecture" in configuration:
                kwargs = configuration["architecture"]["arch_kwargs"]
                kwargs["features_per_stage"] = [4, 8, 8, 8, 8, 8, 8][: kwargs["n_stages"]]
                configuration["batch_size"] = 2
        (self.preprocessed / f"{name}.json").write_text(json.dumps(plans))

    def trainer(
        self,
        trainer: str | type = "nnUNetTrainerDiffCL",
        plans: str = "nnUNetPlans",
        fold: Any = 0,
        resume: bool = False,
        config: str = "3d_fullres",
    ) -> Any:
        if isinstance(trainer, str):
            return get_trainer_from_args("777", config, fold, trainer, plans, resume, torch.device("cpu"))
        content = {
            **json.loads((self.preprocessed / f"{plans}.json").read_text(encoding="utf-8")),
            "continue_training": resume,
        }
        dataset = json.loads((self.preprocessed / "dataset.json").read_text(encoding="utf-8"))
        return trainer(content, config, fold, dataset, torch.device("cpu"))

    def split(self, hidden: int = 2) -> None:
        cases = sorted(p.name.removesuffix(".nii.gz") for p in (self.raw / "labelsTr").iterdir())
        fold = {"train": cases[: 5 - hidden], "val": cases[5:], "unlabeled": cases[5 - hidden : 5]}
        (self.preprocessed / "splits_final.json").write_text(json.dumps([fold]))


def point_at(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let nnU-Net's variables point below `folder` and at our trainers."""
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir(exist_ok=True)
        patch.setenv(f"nnUNet_{name}", str(folder / name))
    patch.setenv("nnUNet_extTrainer", trainers_folder())
    patch.setenv("nnUNet_def_n_proc", "1")


def plan_and_preprocess(folder: Path) -> None:
    """The tiny dataset below `folder`, planned and preprocessed in 2D and 3D by the real command."""
    with pytest.MonkeyPatch.context() as patch:
        point_at(folder, patch)
        patch.delenv("nnUNet_n_proc_DA", raising=False)
        lean_nnunet(patch)
        write_dataset(folder / "raw")
        one_process = ("-np", "1", "-npfp", "1", "--no_pbar")
        status = main(["plan-and-preprocess", "-d", "777", "-c", "2d", "3d_fullres", *one_process])
        assert status == 0


def losses(trainer: Any) -> list[dict[str, float]]:
    with open(os.path.join(trainer.output_folder, "losses.csv"), encoding="utf-8") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def run(trainer: Any) -> Any:
    trainer.run_training()
    return trainer


def dies_in_epoch(trainer: Any, epoch: int) -> Callable[[], None]:
    """An `on_epoch_start` that interrupts the training at the start of this epoch."""
    begin = trainer.on_epoch_start

    def on_epoch_start() -> None:
        if trainer.current_epoch == epoch:
            raise KeyboardInterrupt
        begin()

    return on_epoch_start


def fork_pools(patch: pytest.MonkeyPatch) -> None:
    """nnU-Net's worker processes as copies of this one."""
    context = multiprocessing.get_context
    patch.setattr(multiprocessing, "get_context", lambda *_: context("fork"))


def lean_nnunet(patch: pytest.MonkeyPatch) -> None:
    """nnU-Net's worker processes as threads: a new interpreter takes seconds to import. And of each case a
    thousand intensities in the fingerprint, not twenty million."""
    patch.setattr(multiprocessing, "get_context", lambda *_: SimpleNamespace(Pool=ThreadPool))
    patch.setattr(nnunetv2.utilities.utils, "Pool", ThreadPool)
    collect = DatasetFingerprintExtractor.collect_foreground_intensities

    def few(*args: Any, num_samples: int = 0, **kwargs: Any) -> Any:
        return collect(*args, num_samples=1000, **kwargs)

    patch.setattr(DatasetFingerprintExtractor, "collect_foreground_intensities", few)


def trained(drawn: Place, name: str = MEAN_TEACHER, checkpoint: str = "checkpoint_final.pth") -> Any:
    """A trainer whose model folder is written as at the end of a training, without one."""
    trainer = drawn.trainer(name)
    trainer.initialize()
    trainer.inference_allowed_mirroring_axes = (0, 2)
    trainer._used = trainer._cases_now()  # as the start of the loaders does
    trainer.save_checkpoint(os.path.join(trainer.output_folder, checkpoint))
    for file, content in (
        ("plans.json", trainer.plans_manager.plans),
        ("dataset.json", trainer.dataset_json),
    ):
        Path(trainer.output_folder_base, file).write_text(json.dumps(content), encoding="utf-8")
    return trainer
