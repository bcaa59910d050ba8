"""The command line of a training: nnUNetv2_train's, and what can be wrong with it, told before any work."""

from __future__ import annotations

import argparse
import inspect
import os
from os.path import isdir, isfile, join
from typing import Any

from nnssl.datasets import dataset_number, plans_of
from nnssl.files import read_json
from nnssl.training.lookup import check_trainer, dataset_name, meant, nnunet_folder

NNUNET_FOLDS = 5
FINAL, BEST = "checkpoint_final.pth", "checkpoint_best.pth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All of nnUNetv2_train's."""
    add = parser.add_argument
    add("dataset_name_or_id", metavar="DATASET", help="number or name of the dataset")
    add("configuration", metavar="CONFIG", help="2d, 3d_fullres, ...")
    add("fold", type=fold_name, metavar="FOLD", help="number of the fold, or all")
    add("-tr", required=True, metavar="TRAINER", help="one of `nnssl trainers`, nnU-Net's or your own")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="plans name (default: nnUNetPlans)")
    add("-pretrained_weights", metavar="FILE", help="checkpoint to start from")
    add("-num_gpus", type=int, default=1, metavar="N", help="GPUs of this computer (default: 1)")
    add("-device", default="cuda", metavar="DEVICE", help="cuda (default), cpu or mps")
    add("--npz", action="store_true", help="save probabilities of the final validation, for ensembles")
    add("--c", action="store_true", help="resume from the last checkpoint")
    add("--val", action="store_true", help="validation of a finished training only")
    add("--val_best", action="store_true", help=f"validate with {BEST}")
    add("--disable_checkpointing", action="store_true", help="write no checkpoints")


def check_names(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The dataset and its plan; ValueError where an option contradicts another or names what is not there."""
    for wrong, reason in (
        (args.c and args.val, "--c and --val exclude each other: --c trains on, --val only validates."),
        (args.c and args.pretrained_weights, "--c and -pretrained_weights exclude each other."),
        (args.val_best and args.disable_checkpointing, "--val_best needs a checkpoint to be written."),
        (args.num_gpus < 1, f"-num_gpus {args.num_gpus}: expected at least 1."),
        (args.device not in ("cuda", "cpu", "mps"), f"-device {args.device}: expected cuda, cpu or mps. "
         "Choose a GPU with CUDA_VISIBLE_DEVICES."),
        (args.num_gpus > 1 and args.device != "cuda", f"-num_gpus {args.num_gpus} needs -device cuda, "
         "torchrun starts several processes on CPU."),
    ):  # fmt: skip
        if wrong:
            raise ValueError(reason)
    check_fold_name(args.fold)
    if args.pretrained_weights and not isfile(args.pretrained_weights):
        raise ValueError(f"-pretrained_weights {args.pretrained_weights}: no such file.")
    folder, _ = nnunet_folder("nnUNet_preprocessed"), nnunet_folder("nnUNet_results")
    if not isdir(folder):
        raise ValueError(f"nnUNet_preprocessed={folder} does not exist. Correct the variable.")
    check_trainer(args.tr)
    dataset = dataset_name(args.dataset_name_or_id)
    preprocessed = join(folder, dataset)
    plans_file = join(preprocessed, args.p + ".json")
    if not isfile(plans_file):
        raise ValueError(_no_plan(args, dataset, preprocessed))
    if not isfile(join(preprocessed, "dataset.json")):
        command = _preprocess(args, dataset)
        raise ValueError(f"{join(preprocessed, 'dataset.json')} does not exist. Run {command}")
    read_json(join(preprocessed, "dataset.json"))  # for the error that names it
    plans = read_json(plans_file)
    configurations = plans.get("configurations") if isinstance(plans, dict) else None
    if not isinstance(configurations, dict):
        raise ValueError(f"{plans_file}: no key configurations, expected a plan that nnU-Net wrote.")
    if args.configuration not in configurations:
        raise ValueError(
            f"{args.configuration}: no configuration of {plans_file}. "
            f"{meant(args.configuration, configurations)}"
        )
    return dataset, plans


def _no_plan(args: argparse.Namespace, dataset: str, preprocessed: str) -> str:
    plans = plans_of(preprocessed)
    planned = plans_of_planner(args.p)
    if planned is not None:
        made = "" if planned in plans else f" Make it with {_preprocess(args, dataset)} -pl {args.p}"
        return f"-p {args.p} is a planner, expected the name of its plan: -p {planned}.{made}"
    if not plans:
        return f"{dataset} is not planned: no plan in {preprocessed}. Run {_preprocess(args, dataset)}"
    return f"-p {args.p}: no such plan in {preprocessed}. {meant(args.p, plans)}"


def _preprocess(args: argparse.Namespace, dataset: str) -> str:
    plans = "" if args.p == "nnUNetPlans" or plans_of_planner(args.p) else f" -p {args.p}"
    return f"nnssl plan-and-preprocess -d {dataset_number(dataset)} -c {args.configuration}{plans}"


def plans_of_planner(planner: str) -> str | None:
    """Name of the plans that a planner of nnU-Net makes; None if there is no such planner."""
    if "lanner" not in planner:
        return None
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = join(nnunetv2.__path__[0], "experiment_planning")
    found = recursive_find_python_class(folder, planner, "nnunetv2.experiment_planning")
    return str(inspect.signature(found).parameters["plans_name"].default) if found else None


def check_data(args: argparse.Namespace, dataset: str, plans: dict[str, Any], ranks: int) -> None:
    """ValueError where the plan is sound, but what the training needs beside it is not there."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    preprocessed = join(os.environ["nnUNet_preprocessed"], dataset)
    configuration = PlansManager(plans).get_configuration(args.configuration)
    folder = join(preprocessed, configuration.data_identifier)
    # what a killed preprocessing left is hidden
    if not isdir(folder) or all(name.startswith(".") for name in os.listdir(folder)):
        command = _preprocess(args, dataset)
        raise ValueError(f"{args.configuration} is not preprocessed: nothing in {folder}. Run {command}")
    splits_file = join(preprocessed, "splits_final.json")
    check_fold(args.fold, splits_file)
    if ranks > configuration.batch_size:
        raise ValueError(
            f"{ranks} processes share a batch of {configuration.batch_size}, expected a sample for each at "
            f"least. Use fewer, or raise batch_size of {args.configuration} in the plans file."
        )
    check_device(args.device, args.num_gpus)
    folder = join(
        os.environ["nnUNet_results"],
        dataset,
        f"{args.tr}__{plans['plans_name']}__{args.configuration}",
        f"fold_{args.fold}",
    )
    if args.val and not isfile(join(folder, FINAL)):
        raise ValueError(f"--val: no {FINAL} in {folder}, the training is not finished. Resume it with --c.")
    if args.val and args.val_best and not isfile(join(folder, BEST)):
        raise ValueError(f"--val_best: no {BEST} in {folder}.")


def fold_name(text: str) -> str:
    """As nnU-Net names its folder: 00 is fold 0."""
    return str(int(text)) if text.isdecimal() else text


def check_fold_name(fold: str) -> None:
    if fold != "all" and not fold.isdecimal():
        raise ValueError(f"fold {fold}: expected a number or all.")


def check_fold(fold: str, splits_file: str) -> None:
    """ValueError where the split has no such fold."""
    check_fold_name(fold)
    if fold == "all":
        return
    splits = read_json(splits_file) if isfile(splits_file) else [None] * NNUNET_FOLDS
    if not isinstance(splits, list) or not splits:
        return  # the inspection of the split tells it
    folds = len(splits)
    if int(fold) >= folds:
        which, choice = (f"0 to {folds - 1}", "one of these") if folds > 1 else ("0 alone", "fold 0")
        source = splits_file if isfile(splits_file) else "nnU-Net's own split"
        raise ValueError(f"fold {fold}: {source} has {which}. Choose {choice}.")


def check_device(device: str, number: int = 1) -> None:
    """ValueError with the remedy where PyTorch cannot use it."""
    import torch

    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("-device mps: PyTorch finds no Apple GPU. Use -device cpu.")
    if device != "cuda":
        return
    if not torch.cuda.is_available():
        reason = (
            f"finds no GPU (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})"
            if torch.version.cuda or torch.version.hip
            else "was built without CUDA"
        )
        other = "mps or -device cpu" if torch.backends.mps.is_available() else "cpu"
        raise ValueError(f"-device cuda: PyTorch {torch.__version__} {reason}. Use -device {other}.")
    if number > torch.cuda.device_count():
        raise ValueError(f"-num_gpus {number}: PyTorch finds {torch.cuda.device_count()}.")
