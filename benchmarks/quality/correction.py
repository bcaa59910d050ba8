"""Does `nnssl pseudo-label` find the scans worth correcting? Measured on scans whose labels were hidden.

    python -m benchmarks.quality.correction prepare SET --data DATA --work WORK    # hide most labels
    python -m benchmarks.quality.correction train SET --work WORK                  # rerun to resume
    python -m benchmarks.quality.correction predict SET --work WORK                # nnssl pseudo-label
    python -m benchmarks.quality.correction report --data DATA --work WORK

SET: hippocampus or left_atrium. The first scans in name order keep their labels and train two of nnU-Net's
folds (of fewer than five cases each fold leaves one out), the last ones are kept apart, the others go into
`imagesUn` without their labels. `report` alone opens the hidden labels.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy.stats import spearmanr

from nnssl.commands.launch import launcher
from nnssl.commands.pseudo_label import dice
from nnssl.commands.trainers import trainers_folder
from nnssl.files import read_json, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
BASE, PLANS, CONFIGURATION, TRAINER = "nnUNetPlansBase", "correction", "3d_fullres", "nnUNetTrainerSupervised"
FOLDS = ("0", "1")
SHARES, CURVES = (0.1, 0.25, 0.5), ("as told", "random", "worst truly")
SCHEDULE: dict[str, Any] = {"num_val_iterations_per_epoch": 2, "save_every": 1, "amp": "bfloat16", "seed": 0}


@dataclass(frozen=True)
class Set:
    """A dataset, how many scans keep their labels and how many are kept apart, plan and schedule."""

    dataset: str
    labeled: int
    apart: int
    spacing: float  # mm, of all axes
    divisor: int  # of the planned features
    schedule: Mapping[str, Any] = field(default_factory=dict)


SETS = {
    "hippocampus": Set(
        "Dataset504_Hippocampus",
        10,
        40,
        1.5,
        2,
        {"num_epochs": 9, "num_iterations_per_epoch": 100, "initial_lr": 0.03, "mirror_axes": "auto"},
    ),
    "left_atrium": Set(
        "Dataset501_LeftAtrium",
        4,
        20,
        2.5,
        4,
        {"num_epochs": 9, "num_iterations_per_epoch": 80, "channels_last": True},
    ),
}


class Space:
    """nnU-Net's three folders of one set."""

    def __init__(self, name: str, work: Path) -> None:
        self.set, self.folder = SETS[name], work.resolve() / name
        self.raw = self.folder / "raw" / self.set.dataset
        self.preprocessed = self.folder / "preprocessed" / self.set.dataset
        self.output = self.folder / "pseudo"
        self.identifier = str(int(self.set.dataset[7:10]))

    def environment(self) -> dict[str, str]:
        folders = {f"nnUNet_{n}": str(self.folder / n) for n in ("raw", "preprocessed", "results")}
        single = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "nnUNet_def_n_proc")}
        others = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {
            **others,
            **folders,
            **single,
            "nnUNet_extTrainer": trainers_folder(),
            "nnUNet_compile": "f",
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": path,
        }

    def nnssl(self, *arguments: str, **variables: str) -> None:
        command = [sys.executable, "-m", "nnssl.commands.cli", *arguments]
        subprocess.run(command, env={**self.environment(), **variables}, check=True)


def prepare(space: Space, data: Path) -> None:
    """Link the scans into their folders, plan, split and preprocess."""
    chosen, source = space.set, data.resolve() / space.set.dataset
    dataset = read_json(source / "dataset.json")
    ending = dataset["file_ending"]
    cases = sorted(p.name.removesuffix(ending) for p in (source / "labelsTr").glob(f"*{ending}"))
    for name in ("raw", "preprocessed", "results"):
        (space.folder / name).mkdir(parents=True, exist_ok=True)
    for case in cases[: -chosen.apart]:
        part = "Tr" if case in cases[: chosen.labeled] else "Un"
        link(source / "imagesTr" / f"{case}_0000{ending}", space.raw / f"images{part}")
        if part == "Tr":
            link(source / "labelsTr" / f"{case}{ending}", space.raw / "labelsTr")
    write_json({**dataset, "numTraining": chosen.labeled}, space.raw / "dataset.json")
    d, c = ["-d", space.identifier], ["-c", CONFIGURATION, "-np", "1", "-npfp", "1"]
    spacing = ["-overwrite_target_spacing", *[str(chosen.spacing)] * 3]
    space.nnssl("plan-and-preprocess", *d, *c, *spacing, "-overwrite_plans_name", BASE)
    space.nnssl("split", *d, "--labeled", str(min(chosen.labeled * 4 // 5, chosen.labeled - 1)))
    plans = read_json(space.preprocessed / f"{BASE}.json")
    configuration = plans["configurations"][CONFIGURATION]
    configuration["batch_size"] = 2
    network = configuration["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [f // chosen.divisor for f in network["features_per_stage"]]
    plans |= {"plans_name": PLANS, "nnssl": {**SCHEDULE, **chosen.schedule}}
    write_json(plans, space.preprocessed / f"{PLANS}.json")


def link(file: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / file.name).is_symlink():
        (folder / file.name).symlink_to(file)


def train(space: Space) -> None:
    entry = ["nnunetv2.run.run_training:run_training_entry", "nnUNetv2_train"]
    for fold in FOLDS:
        what = [space.identifier, CONFIGURATION, fold, "-tr", TRAINER, "-p", PLANS]
        command = [*launcher(cores=1), *entry, *what, "--c", "-device", "cpu"]
        subprocess.run(command, env={**space.environment(), "nnUNet_n_proc_DA": "0"}, check=True)


def predict(space: Space) -> None:
    what = ["-d", space.identifier, "-c", CONFIGURATION, "-f", *FOLDS, "-tr", TRAINER, "-p", PLANS]
    space.nnssl("pseudo-label", *what, "-o", str(space.output), "-device", "cpu")


# what came of it


def true_dice(space: Space, data: Path) -> list[dict[str, Any]]:
    """A row per predicted scan: mean Dice over the classes against the hidden label, and both guesses."""
    labels = data / space.set.dataset / "labelsTr"
    dataset = read_json(space.raw / "dataset.json")
    values = [value for value in dataset["labels"].values() if value]
    rows = []
    for case, record in read_json(space.output / "pseudo_labels.json")["cases"].items():
        truth, found = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
            for file in (labels / f"{case}{dataset['file_ending']}", space.output / record["files"][0])
        )
        scores = [dice(found == value, truth == value) for value in values]
        known = [score for score in scores if score is not None]
        guesses = {key: record[key] for key in ("agreement", "confidence")}
        rows.append({"case": case, "dice": float(np.mean(known)), **guesses})
    return rows


def measures(rows: list[dict[str, Any]], resamples: int = 2000) -> dict[str, Any]:
    """Rank correlations, and the pool's mean Dice after correcting its first scans in several orders."""
    true = np.array([row["dice"] for row in rows])
    ranked = {key: np.array([row[key] for row in rows]) for key in ("agreement", "confidence")}
    random = np.random.default_rng(0)
    orders = {
        "as told": np.lexsort((ranked["confidence"], ranked["agreement"])),
        "worst truly": np.argsort(true, kind="stable"),
    }
    curves = {name: corrected(true, order) for name, order in orders.items()}
    curves["random"] = np.linspace(true.mean(), 1.0, len(true) + 1).tolist()  # on average over all orders
    found: dict[str, Any] = {"scans": len(rows), "mean_dice": float(true.mean()), "curves": curves}
    for key, guess in ranked.items():
        result = spearmanr(guess, true)
        draws = [random.integers(len(true), size=len(true)) for _ in range(resamples)]
        values = [spearmanr(guess[d], true[d]).statistic for d in draws]
        low, high = np.nanpercentile(values, [2.5, 97.5])
        found[f"spearman_{key}"] = [float(result.statistic), float(low), float(high)]
    return found


def corrected(true: np.ndarray, order: np.ndarray) -> list[float]:
    """Mean Dice of the pool with the first k scans of the order corrected, k = 0, 1, ..."""
    gains = np.concatenate([[0.0], np.cumsum((1 - true)[order])])
    return [float(x) for x in true.mean() + gains / len(true)]


def markdown(found: dict[str, dict[str, Any]]) -> str:
    heads = ["", "scans", "mean Dice", "Spearman, agreement", "Spearman, confidence", "corrected"]
    heads += ["Dice gained per corrected scan", "at random", "by true Dice"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, one in found.items():
        rho = ["{:.2f} [{:.2f}, {:.2f}]".format(*one[f"spearman_{k}"]) for k in ("agreement", "confidence")]
        for share in SHARES:
            k = max(1, round(share * one["scans"]))
            gains = [one["scans"] * (one["curves"][c][k] - one["curves"][c][0]) / k for c in CURVES]
            head = (
                [name, str(one["scans"]), f"{100 * one['mean_dice']:.1f}", *rho]
                if share == SHARES[0]
                else [""] * 5
            )
            lines.append(f"| {' | '.join([*head, f'{k} ({share:.0%})', *(f'{g:.2f}' for g in gains)])} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, dict[str, Any]], rows: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Per set: agreement against true Dice, and the pool's Dice over the corrected scans."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(found), 2, figsize=(9, 3.6 * len(found)), squeeze=False, layout="constrained"
    )
    for (name, one), (left, right) in zip(found.items(), axes, strict=True):
        left.scatter(
            *([row[key] for row in rows[name]] for key in ("agreement", "dice")), s=14, color="#0072B2"
        )
        left.set(xlabel="agreement", ylabel="Dice with the hidden label", title=name.replace("_", " "))
        for curve, style in zip(CURVES, ("-", "--", ":"), strict=True):
            right.plot(one["curves"][curve], style, label=curve, color="#333333")
        right.set(xlabel="scans corrected", ylabel="mean Dice of the pool")
        right.legend(frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def report(work: Path, data: Path) -> None:
    rows = {}
    for name in SETS:
        space = Space(name, work)
        if (space.output / "pseudo_labels.json").is_file():
            rows[name] = true_dice(space, data)
    if not rows:
        raise SystemExit(f"nothing is predicted below {work}: use `predict` first")
    found = {name: measures(one) for name, one in rows.items()}
    text = markdown(found)
    print(text)
    write_text(text, RESULTS / "correction.md")
    write_json(
        {name: {"rows": rows[name], **found[name]} for name in rows}, RESULTS / "correction.json", indent=1
    )
    draw(found, rows, RESULTS / "correction.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["prepare", "train", "predict", "report"])
    parser.add_argument("set", nargs="?", choices=list(SETS))
    parser.add_argument("--data", type=Path, help="folder with the raw datasets (prepare, report)")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "report":
        report(args.work, args.data)
        return
    space = Space(args.set, args.work)
    if args.command == "prepare":
        prepare(space, args.data)
    elif args.command == "train":
        train(space)
    else:
        predict(space)


if __name__ == "__main__":
    main()
