"""`python -m nnssl.demo`: from raw images to a tested model on synthetic scans, every step a command that
works on real data too.

Everything is written below one folder. nnU-Net's environment variables are set for the commands started here
only, so nothing that they already point at is read or written. Finished stages are skipped on the next call;
an interrupted training resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnssl.commands.launch import launcher
from nnssl.commands.trainers import trainers_folder
from nnssl.data.parallel import usable_cores
from nnssl.demo.figures import draw_curve, draw_overlay
from nnssl.demo.phantoms import LABELS, write_dataset
from nnssl.files import read_json, write_json

DATASET = "Dataset900_Phantoms"
STRUCTURES = [name for name, value in LABELS.items() if value]
CONFIGURATION = "3d_fullres"
SCANS = {"labeled": 6, "unlabeled": 24, "test": 6}
EPOCHS = 24
SCHEDULE = {"num_iterations_per_epoch": 25, "num_val_iterations_per_epoch": 4, "save_every": 1}
FEATURES = 8  # of the first stage, doubled per stage: a quarter of nnU-Net's
STATE = "demo.json"  # marks a demo's folder: settings and finished stages
MOST_CORES = 8  # more do not help small patches
OWN = (STATE, "raw", "preprocessed", "results", "predictions", "logs", "overlay.png", "curve.png")


class Demo:
    """One demo folder: `raw`, `preprocessed`, `results`, `predictions`, `logs`, two pictures and
    `demo.json`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], fresh: bool = False) -> None:
        """`fresh` removes an earlier demo's own files. ValueError where `folder` holds anything but a demo of
        the same `settings`."""
        self.folder, self.settings = folder.resolve(), dict(settings)
        state = self.folder / STATE
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file: choose another --folder")
        if self.folder.exists() and any(self.folder.iterdir()) and not state.is_file():
            raise ValueError(
                f"{self.folder} is not empty and not a demo's folder (no {STATE} in it): choose another "
                "--folder"
            )
        if fresh and state.is_file():
            for name in reversed(OWN):  # the mark last
                path = self.folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.done: list[str] = []
        if state.is_file():
            found = read_json(state)
            if found["settings"] != self.settings:
                raise ValueError(
                    f"{self.folder} holds a demo with {found['settings']}, but {self.settings} was asked "
                    "for: choose another --folder, or --fresh"
                )
            self.done = found["done"]
        for name in ("raw", "preprocessed", "results", "logs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._save()
        self.model = (
            self.folder / "results" / DATASET / f"{self.settings['trainer']}__nnUNetPlans__{CONFIGURATION}"
        )
        self.raw = self.folder / "raw" / DATASET
        self.plans = self.folder / "preprocessed" / DATASET / "nnUNetPlans.json"

    def _save(self) -> None:
        write_json({"settings": self.settings, "done": self.done}, self.folder / STATE)

    def run(self) -> None:
        """All stages that are not done yet, then the result."""
        for number, stage in enumerate(
            stages := (
                self.generate,
                self.plan,
                self.shorten,
                self.train,
                self.predict,
                self.evaluate,
                self.draw,
            ),
            1,
        ):
            title = f"[{number}/{len(stages)}] {stage.__doc__}"
            if stage.__name__ in self.done:
                print(f"{title}: already done", flush=True)
                continue
            print(title, flush=True)
            start = time.monotonic()
            stage()
            self.done.append(stage.__name__)
            self._save()
            print(f"      {time.monotonic() - start:.0f} s", flush=True)
        self.report()

    def generate(self) -> None:
        """Draw the scans: 6 labeled, 24 unlabeled, 6 to test on"""
        if not self.raw.exists():
            write_dataset(
                self.raw,
                SCANS["labeled"],
                SCANS["unlabeled"],
                SCANS["test"],
                seed=self.settings["seed"],
                progress=sys.stderr.isatty(),
            )

    def plan(self) -> None:
        """Plan and preprocess, labeled and unlabeled"""
        self.command(
            "plan", "nnssl", "plan-and-preprocess", "-d", "900", "-c", CONFIGURATION, "-np", "1", "-npfp", "1"
        )

    def shorten(self) -> None:
        """Write a short schedule, a small network and a small patch into the plans file"""
        plans = read_json(self.plans)
        configuration = plans["configurations"][CONFIGURATION]
        network = configuration["architecture"]["arch_kwargs"]
        network["features_per_stage"] = [FEATURES * 2**i for i in range(network["n_stages"])]
        strides = np.prod(network["strides"], axis=0)
        configuration["patch_size"] = [
            min(planned, 4 * int(s)) for planned, s in zip(configuration["patch_size"], strides, strict=True)
        ]
        method = {"DiffCL": {"ddim_steps": 2, "hfm_max_tokens": 4096}}
        plans["nnssl"] = {
            "num_epochs": self.settings["epochs"],
            **SCHEDULE,
            "seed": self.settings["seed"],
            **method,
        }
        write_json(plans, self.plans)

    def train(self) -> None:
        """Train on CPU"""
        goes_on = ["--c"] if any((self.model / "fold_all").glob("checkpoint_*.pth")) else []
        trainer = ["-tr", self.settings["trainer"], "-device", "cpu", *goes_on]
        bar = (r"Epoch \d+ \(", self.settings["epochs"], "epoch")
        self.command(
            "train",
            "nnUNetv2_train",
            "900",
            CONFIGURATION,
            "all",
            *trainer,
            bar=bar,
            environment={"nnUNet_n_proc_DA": "0"},
        )

    def predict(self) -> None:
        """Predict the test scans"""
        folders = ["-i", str(self.raw / "imagesTs"), "-o", str(self.folder / "predictions")]
        model = [
            "-d",
            "900",
            "-c",
            CONFIGURATION,
            "-f",
            "all",
            "-tr",
            self.settings["trainer"],
            "-device",
            "cpu",
        ]
        bar = (r"^done with ", len(self.cases()), "scan")
        self.command("predict", "nnUNetv2_predict", *folders, *model, "-npp", "1", "-nps", "1", bar=bar)

    def evaluate(self) -> None:
        """Compare with the ground truth"""
        files = ["-djfile", str(self.raw / "dataset.json"), "-pfile", str(self.plans), "-np", "1"]
        self.command(
            "evaluate",
            "nnUNetv2_evaluate_folder",
            str(self.raw / "labelsTs"),
            str(self.folder / "predictions"),
            *files,
        )

    def draw(self) -> None:
        """Draw overlay.png and curve.png"""
        summary = self.summary()
        ranked = sorted(
            summary["metric_per_case"],
            key=lambda case: np.nanmean([m["Dice"] for m in case["metrics"].values()]),
        )
        chosen = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
        cases = {
            name: Path(case["prediction_file"]).name.removesuffix(".nii.gz") for name, case in chosen.items()
        }
        draw_overlay(
            {f"{name}, {case}": self.arrays(case) for name, case in cases.items()},
            STRUCTURES,
            self.folder / "overlay.png",
        )
        import torch

        log = torch.load(
            self.model / "fold_all" / "checkpoint_final.pth", map_location="cpu", weights_only=False
        )["logging"]
        with open(self.model / "fold_all" / "losses.csv", encoding="utf-8", newline="") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        draw_curve(rows, log["dice_per_class_or_region"], STRUCTURES, self.folder / "curve.png")

    def report(self) -> None:
        """Print the Dice of every structure and where everything is."""
        mean = {name: self.summary()["mean"][str(LABELS[name])]["Dice"] for name in STRUCTURES}
        print(
            f"\n{self.settings['trainer']}: Dice on {len(self.cases())} test scans, by "
            "nnUNetv2_evaluate_folder"
        )
        for name, dice in {**mean, "mean": float(np.mean(list(mean.values())))}.items():
            print(f"  {name:<8} {dice:.3f}")
        places = {
            "pictures": "overlay.png, curve.png",
            "model": str(self.model.relative_to(self.folder) / "fold_all"),
            "masks": "predictions",
        }
        for what, where in {"folder": str(self.folder), **places, "output of the commands": "logs"}.items():
            print(f"  {what}: {where}")

    def summary(self) -> dict[str, Any]:
        return read_json(self.folder / "predictions" / "summary.json")

    def cases(self) -> list[str]:
        return sorted(p.name.removesuffix(".nii.gz") for p in (self.raw / "labelsTs").glob("*.nii.gz"))

    def arrays(self, case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image, truth and prediction (D, H, W) of a test case."""
        files = (
            self.raw / "imagesTs" / f"{case}_0000.nii.gz",
            self.raw / "labelsTs" / f"{case}.nii.gz",
            self.folder / "predictions" / f"{case}.nii.gz",
        )
        image, truth, prediction = (sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for f in files)
        return image, truth, prediction

    def environment(self) -> dict[str, str]:
        """The caller's environment without its nnU-Net variables, with those of this folder."""
        folders = {f"nnUNet_{name}": str(self.folder / name) for name in ("raw", "preprocessed", "results")}
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")},
            **folders,
            "nnUNet_extTrainer": trainers_folder(),
            "nnUNet_def_n_proc": "1",
            "nnUNet_compile": "f",
            # spinning threads are 50 times slower where another process wants a core
            "OMP_WAIT_POLICY": "PASSIVE",
            "MALLOC_MMAP_MAX_": "0",  # keep freed memory: page faults cost a fifth of a step
            "MALLOC_TRIM_THRESHOLD_": "1000000000000",
            "MPLBACKEND": "Agg",
            "PYTHONUNBUFFERED": "1",
        }

    def command(
        self,
        stage: str,
        *command: str,
        bar: tuple[str, int, str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Run a command, its output to `logs/<stage>.log`; `bar` = (pattern of a line that means one more,
        how many, their unit).

        Raises RuntimeError with the last lines and the log's path where the command fails.
        """
        print(
            f"      $ {shlex.join([*(f'{k}={v}' for k, v in (environment or {}).items()), *command])}",
            flush=True,
        )
        pattern, total, unit = bar or (r"(?!)", None, "line")
        log = self.folder / "logs" / f"{stage}.log"
        entries = {
            entry.name: entry.value for entry in importlib.metadata.entry_points(group="console_scripts")
        } | {"nnssl": "nnssl.commands.cli:main"}
        if command[0] not in entries:
            raise RuntimeError(
                f"the command {command[0]} is not installed for {sys.executable}: install this project with "
                "pip there"
            )
        environment = {**self.environment(), **(environment or {})}
        lines: list[str] = []
        with (
            open(log, "w", encoding="utf-8") as file,
            tqdm(
                total=total,
                unit=unit,
                desc=f"      {stage}",
                disable=bar is None,
                mininterval=0.1 if sys.stderr.isatty() else 20,
            ) as shown,
            subprocess.Popen(
                [*launcher(min(MOST_CORES, usable_cores())), entries[command[0]], *command],
                env=environment,
                encoding="utf-8",
                errors="replace",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            try:
                for line in process.stdout or ():
                    file.write(line)
                    file.flush()
                    lines = [*lines[-19:], line]
                    if resumed := re.search(r"Epoch (\d+) \(", line) if unit == "epoch" else None:
                        shown.update(int(resumed[1]) - shown.n)
                    if re.search(pattern, line):
                        shown.update()
            except BaseException:
                process.terminate()
                raise
        if process.returncode:
            raise RuntimeError(
                f"{command[0]} failed with status {process.returncode}; the end of {log}:\n{''.join(lines)}"
            )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nnssl.demo", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("demo"), help="folder for everything (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the scans and of the training (default: %(default)s)"
    )
    parser.add_argument(
        "--trainer", default="nnUNetTrainerDiffCL", help="any of `nnssl trainers` (default: %(default)s)"
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=EPOCHS,
        help=f"of {SCHEDULE['num_iterations_per_epoch']} steps (default: %(default)s)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="remove the previous demo in this folder and start over"
    )
    given = parser.parse_args(arguments)
    try:
        Demo(
            given.folder, {"seed": given.seed, "trainer": given.trainer, "epochs": given.epochs}, given.fresh
        ).run()
    except (OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: rerun the same command to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
