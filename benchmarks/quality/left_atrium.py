"""Left atrium, few labels, one CPU thread: the methods beside nnU-Net alone, from raw scans to a table and
pictures.

    python -m benchmarks.quality.left_atrium prepare --data DATA --work WORK    # plan, split, preprocess
    python -m benchmarks.quality.left_atrium run --work WORK --trainer DiffCL --seed 0    # rerun to resume
    python -m benchmarks.quality.left_atrium report --work WORK

DATA holds Dataset501_LeftAtrium, the 80 training scans of the papers in their order. The first `--labeled`
keep their labels, the last 20 are validation, the others are unlabeled. Plan: 2.5 mm, half of the planned
features, batch 2, 15 x 100 iterations, nnU-Net's augmentation, bfloat16; ACTION, whose first quarter sees no
label, 20 x 100, so that all see equally many labeled patches, and with a moving average that reaches back
over as small a share of the run as the paper's. Dice: nnU-Net's own evaluation of the validation cases with
the last checkpoint.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

import nnssl
from nnssl.commands.launch import launcher
from nnssl.files import read_json, write_json, write_text

DATASET, CONFIGURATION, BASE = "Dataset501_LeftAtrium", "3d_fullres", "nnUNetPlans25"
RESULTS = Path(__file__).parent / "results"
SCHEDULE: dict[str, Any] = {
    "num_epochs": 15,
    "num_iterations_per_epoch": 100,
    "num_val_iterations_per_epoch": 4,
    "save_every": 1,
    "amp": "bfloat16",
    "DiffCL": {"hfm_max_tokens": 4096},
    "ACTION": {"ema_decay": 0.9},
}
EPOCHS = {"ACTION": 20}
TRAINERS = ("Supervised", "FixMatch", "DiffCL", "CAML", "SemSim", "ACTION")


def environment(work: Path) -> dict[str, str]:
    folders = {f"nnUNet_{n}": str(work / n) for n in ("raw", "preprocessed", "results")}
    trainers = subprocess.run(
        [sys.executable, "-m", "nnssl.commands.cli", "trainers", "--path"],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    single = {"OMP_NUM_THREADS": "1", "nnUNet_def_n_proc": "1", "nnUNet_extTrainer": trainers.stdout.strip()}
    return {**os.environ, **folders, **single}


def plans_name(trainer: str, labeled: int, seed: int) -> str:
    return f"la{labeled}s{seed}" + (f"e{EPOCHS[trainer]}" if trainer in EPOCHS else "")


def prepare(data: Path, work: Path, labeled: int) -> None:
    for name in ("raw", "preprocessed", "results"):
        (work / name).mkdir(parents=True, exist_ok=True)
    if not (work / "raw" / DATASET).exists():
        shutil.copytree(data / DATASET, work / "raw" / DATASET)
    nnssl_command = [sys.executable, "-m", "nnssl.commands.cli"]
    spacing = ["-overwrite_target_spacing", "2.5", "2.5", "2.5", "-overwrite_plans_name", BASE]
    split = [
        "split",
        "-d",
        "501",
        "--labeled",
        str(labeled),
        "--first",
        "--val",
        *(f"LA_{i:03d}" for i in range(61, 81)),
    ]
    for arguments in (["plan-and-preprocess", "-d", "501", "-c", CONFIGURATION, *spacing], split):
        subprocess.run([*nnssl_command, *arguments], env=environment(work), check=True)


def run(work: Path, trainer: str, labeled: int, seed: int) -> None:
    folder = work / "preprocessed" / DATASET
    plans = read_json(folder / f"{BASE}.json")
    plans["plans_name"] = name = plans_name(trainer, labeled, seed)
    configuration = plans["configurations"][CONFIGURATION]
    configuration["batch_size"] = 2
    kwargs = configuration["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [f // 2 for f in kwargs["features_per_stage"]]
    plans["nnssl"] = {**SCHEDULE, "num_epochs": EPOCHS.get(trainer, SCHEDULE["num_epochs"]), "seed": seed}
    write_json(plans, folder / f"{name}.json", indent=1)
    train = ["nnunetv2.run.run_training:run_training_entry", "nnUNetv2_train", "501", CONFIGURATION, "0"]
    options = ["-tr", f"nnUNetTrainer{trainer}", "-p", name, "--c", "-device", "cpu"]
    variables = {**environment(work), "nnUNet_n_proc_DA": "0"}
    subprocess.run([*launcher(cores=1), *train, *options], env=variables, check=True)


def fold_folder(work: Path, trainer: str, labeled: int, seed: int) -> Path:
    return (
        work
        / "results"
        / DATASET
        / f"nnUNetTrainer{trainer}__{plans_name(trainer, labeled, seed)}__{CONFIGURATION}"
        / "fold_0"
    )


def collect(work: Path, labeled: int, seeds: list[int]) -> list[dict[str, Any]]:
    import torch

    rows = []
    for trainer in TRAINERS:
        for seed in seeds:
            folder = fold_folder(work, trainer, labeled, seed)
            if not (folder / "validation" / "summary.json").is_file():
                continue
            summary = read_json(folder / "validation" / "summary.json")
            state = torch.load(folder / "checkpoint_final.pth", map_location="cpu", weights_only=False)[
                "nnssl"
            ]
            dice = [case["metrics"]["1"]["Dice"] for case in summary["metric_per_case"]]
            rows.append(
                {
                    "method": trainer,
                    "dataset": DATASET,
                    "labeled": labeled,
                    "seed": seed,
                    "fold": 0,
                    "dice": float(np.mean(dice)),
                    "dice_per_case": dice,
                    "status": "finished",
                    "config": state["config"],
                    "versions": {**state["versions"], "python": platform.python_version()},
                }
            )
    return rows


def table(rows: list[dict[str, Any]], labeled: int) -> str:
    seeds = sorted({r["seed"] for r in rows})
    lines = [
        f"| {labeled} labels | {' | '.join(f'seed {s}' for s in seeds)} | mean |",
        "|---|" + "---|" * (len(seeds) + 1),
    ]
    for trainer in TRAINERS:
        found = {r["seed"]: 100 * r["dice"] for r in rows if r["method"] == trainer}
        if found:
            cells = [f"{found[s]:.2f}" if s in found else "" for s in seeds]
            lines.append(
                f"| nnUNetTrainer{trainer} | {' | '.join(cells)} | {np.mean(list(found.values())):.2f} |"
            )
    versions = {k: v for r in rows for k, v in r["versions"].items()}
    note = (
        f"Validation Dice (%) of 20 scans, last checkpoint, nnU-Net's own evaluation. {DATASET} at 2.5 mm, "
        "features/2, batch 2, "
        "15 x 100 iterations (ACTION 20 x 100, a quarter of them without labels), bfloat16, one thread of a "
        "CPU with AMX; "
        f"{', '.join(f'{k} {v}' for k, v in sorted(versions.items()))}. Commands: "
        "`benchmarks/quality/left_atrium.py`."
    )
    return "\n".join([*lines, "", note, ""])


def pictures(work: Path, labeled: int, seed: int) -> None:
    import torch

    from nnssl.demo.figures import draw_curve, draw_overlay

    folders = {t: fold_folder(work, t, labeled, seed) for t in TRAINERS}
    folders = {t: f for t, f in folders.items() if (f / "validation" / "summary.json").is_file()}
    read = lambda path: sitk.GetArrayFromImage(sitk.ReadImage(str(path)))  # noqa: E731
    summary = read_json(next(iter(folders.values())) / "validation" / "summary.json")
    dice = [case["metrics"]["1"]["Dice"] for case in summary["metric_per_case"]]
    name = Path(
        summary["metric_per_case"][int(np.argsort(dice)[len(dice) // 2])]["prediction_file"]
    ).name  # the first method's median case
    raw = work / "raw" / DATASET
    image, truth = (
        read(raw / "imagesTr" / name.replace(".nii.gz", "_0000.nii.gz")),
        read(raw / "labelsTr" / name),
    )
    rows = {f"{t}, {name[:6]}": (image, truth, read(f / "validation" / name)) for t, f in folders.items()}
    draw_overlay(rows, ["left atrium"], RESULTS / f"left_atrium_{labeled}_overlay.png")
    for trainer, folder in folders.items():
        with open(folder / "losses.csv", encoding="utf-8", newline="") as file:
            losses = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        log = torch.load(folder / "checkpoint_final.pth", map_location="cpu", weights_only=False)["logging"]
        draw_curve(
            losses,
            log["dice_per_class_or_region"],
            ["left atrium"],
            RESULTS / f"left_atrium_{labeled}_{trainer.lower()}.png",
        )


def report(work: Path, labeled: int, seeds: list[int]) -> None:
    RESULTS.mkdir(exist_ok=True)
    rows = collect(work, labeled, seeds)
    if not rows:
        raise SystemExit(f"no finished run below {work / 'results' / DATASET}: use `run` first")
    text = table(rows, labeled)
    print(text)
    write_text(text, RESULTS / f"left_atrium_{labeled}.md")
    content = {"nnssl": nnssl.__version__, "rows": rows}
    write_json(content, RESULTS / f"left_atrium_{labeled}.json", indent=1)
    pictures(work, labeled, seeds[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["prepare", "run", "report"])
    parser.add_argument("--data", type=Path, help="folder with Dataset501_LeftAtrium (prepare)")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--labeled", type=int, default=4)
    parser.add_argument("--trainer", choices=TRAINERS, default="DiffCL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="for the report")
    args = parser.parse_args()
    if args.command == "prepare":
        if args.data is None:
            parser.error("prepare needs --data")
        prepare(args.data, args.work, args.labeled)
    elif args.command == "run":
        run(args.work, args.trainer, args.labeled, args.seed)
    else:
        report(args.work, args.labeled, args.seeds)


if __name__ == "__main__":
    main()
