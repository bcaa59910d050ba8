"""`python -m nnssl.demo`: from raw images to a report on two trainings with synthetic scans, every step a
command that works on real data too.

Everything is written below one folder. nnU-Net's environment variables are set for the commands started here
only, so nothing that they already point at is read or written. Finished stages are skipped on the next call;
an interrupted training resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnssl.commands.launch import launcher
from nnssl.commands.trainers import trainers_folder
from nnssl.data.parallel import usable_cores
from nnssl.demo.phantoms import LABELS, write_dataset
from nnssl.files import read_json, write_json

DATASET = "Dataset900_Phantoms"
STRUCTURES = [name for name, value in LABELS.items() if value]
CONFIGURATION = "3d_fullres"
BASELINE = "nnUNetTrainerSupervised"
SCANS = {"labeled": 6, "validation": 6, "unlabeled": 24}
EPOCHS = 8
SCHEDULE = {"num_iterations_per_epoch": 60, "num_val_iterations_per_epoch": 4, "save_every": 1}
FEATURES = 8  # of the first stage, doubled per stage: a quarter of nnU-Net's
STATE = "demo.json"  # marks a demo's folder: settings and finished stages
MOST_CORES = 8  # more do not help small patches
OWN = (STATE, "raw", "preprocessed", "results", "report", "logs")


class Demo:
    """One demo folder: `raw`, `preprocessed`, `results`, `report`, `logs` and `demo.json`."""

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
        self.trainers = list(dict.fromkeys([BASELINE, self.settings["trainer"]]))
        self.raw = self.folder / "raw" / DATASET
        self.preprocessed = self.folder / "preprocessed" / DATASET

    def _save(self) -> None:
        write_json({"settings": self.settings, "done": self.done}, self.folder / STATE)

    def run(self) -> None:
        """All stages that are not done yet, then the result."""
        stages = (self.generate, self.plan, self.shorten, self.train, self.report)
        for number, stage in enumerate(stages, 1):
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
        self.say()

    def generate(self) -> None:
        """Draw the scans: 6 labeled, 6 to validate on, 24 unlabeled"""
        if not self.raw.exists():
            write_dataset(
                self.raw,
                SCANS["labeled"] + SCANS["validation"],
                SCANS["unlabeled"],
                test=0,
                seed=self.settings["seed"],
                progress=sys.stderr.isatty(),
            )

    def plan(self) -> None:
        """Plan and preprocess, labeled and unlabeled"""
        few = ["-np", "1", "-npfp", "1"]  # to start more processes takes longer
        self.commands({"plan": ["nnssl", "plan-and-preprocess", "-d", "900", "-c", CONFIGURATION, *few]})

    def shorten(self) -> None:
        """Write the split, a short schedule, a small network and a small patch"""
        cases = sorted(path.name.removesuffix(".nii.gz") for path in (self.raw / "labelsTr").iterdir())
        fold = {"train": cases[: SCANS["labeled"]], "val": cases[SCANS["labeled"] :]}
        write_json([fold], self.preprocessed / "splits_final.json")
        plans = read_json(self.preprocessed / "nnUNetPlans.json")
        configuration = plans["configurations"][CONFIGURATION]
        network = configuration["architecture"]["arch_kwargs"]
        network["features_per_stage"] = [FEATURES * 2**i for i in range(network["n_stages"])]
        strides = np.prod(network["strides"], axis=0)
        configuration["patch_size"] = [
            min(planned, 4 * int(s)) for planned, s in zip(configuration["patch_size"], strides, strict=True)
        ]
        plans["nnssl"] = {
            "num_epochs": self.settings["epochs"],
            **SCHEDULE,
            "seed": self.settings["seed"],
            "mirror_axes": "auto",  # the lesion has its place in the organ
            "DiffCL": {"hfm_max_tokens": 4096},
        }
        write_json(plans, self.preprocessed / "nnUNetPlans.json")

    def train(self) -> None:
        """Train on CPU, side by side, and predict the validation scans"""
        commands = {}
        for trainer in self.trainers:
            if not self.summary(trainer).is_file():
                there = any((self.model(trainer) / "fold_0").glob("checkpoint_*.pth"))
                flags = ["-tr", trainer, "-device", "cpu", *["--c"] * there]
                commands[f"train_{trainer}"] = ["nnssl", "train", "900", CONFIGURATION, "0", *flags]
        epochs = len(commands) * self.settings["epochs"]
        self.commands(commands, epochs, {"nnUNet_n_proc_DA": "0"})

    def report(self) -> None:
        """Compare them"""
        what = ["-d", "900", "-c", CONFIGURATION, "-f", "0", "-tr", *self.trainers]
        self.commands({"report": ["nnssl", "report", *what, "-o", str(self.folder / "report")]})

    def say(self) -> None:
        """Print the Dice of every structure and where everything is."""
        print(f"\nDice on {SCANS['validation']} validation scans, by nnU-Net")
        width = max(map(len, self.trainers))
        print(f"  {'':{width}}" + "".join(f"{name:>8}" for name in [*STRUCTURES, "mean"]))
        for trainer, dice in self.dice().items():
            values = [*dice.values(), float(np.mean(list(dice.values())))]
            print(f"  {trainer:{width}}" + "".join(f"{value:8.3f}" for value in values))
        print(f"  report, pictures beside it: {self.folder / 'report' / 'report.html'}")
        print(f"  models: {self.folder / 'results'}")
        print(f"  output of the commands: {self.folder / 'logs'}")

    def dice(self) -> dict[str, dict[str, float]]:
        """{trainer: {structure: mean Dice}}."""
        means = {trainer: read_json(self.summary(trainer))["mean"] for trainer in self.trainers}
        return {
            trainer: {name: mean[str(LABELS[name])]["Dice"] for name in STRUCTURES}
            for trainer, mean in means.items()
        }

    def model(self, trainer: str) -> Path:
        return self.folder / "results" / DATASET / f"{trainer}__nnUNetPlans__{CONFIGURATION}"

    def summary(self, trainer: str) -> Path:
        """Scores of the final validation."""
        return self.model(trainer) / "fold_0" / "validation" / "summary.json"

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

    def commands(
        self,
        commands: Mapping[str, Sequence[str]],
        epochs: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Run commands side by side, the output of each in `logs/<name>.log`, and end all where one fails;
        `epochs` of all of them: with a bar.

        Raises RuntimeError with the last lines and the log's path where a command fails.
        """
        entries = {
            entry.name: entry.value for entry in importlib.metadata.entry_points(group="console_scripts")
        } | {"nnssl": "nnssl.commands.cli:main"}
        cores = max(1, min(MOST_CORES, usable_cores()) // max(1, len(commands)))
        logs = {name: self.folder / "logs" / f"{name}.log" for name in commands}
        running: dict[str, subprocess.Popen[bytes]] = {}
        with ExitStack() as stack:
            for name, command in commands.items():
                settings = [f"{key}={value}" for key, value in (environment or {}).items()]
                print(f"      $ {shlex.join([*settings, *command])}", flush=True)
                if command[0] not in entries:
                    raise RuntimeError(
                        f"the command {command[0]} is not installed for {sys.executable}: install this "
                        "project with pip there"
                    )
                running[name] = process = subprocess.Popen(
                    [*launcher(cores), entries[command[0]], *command],
                    env={**self.environment(), **(environment or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=stack.enter_context(open(logs[name], "wb")),
                    stderr=subprocess.STDOUT,
                )
                stack.callback(process.wait)
                stack.callback(process.terminate)
            bar = tqdm(
                total=epochs,
                unit="epoch",
                desc="      epochs",
                disable=epochs is None,
                mininterval=0.1 if sys.stderr.isatty() else 20,
            )
            while running:
                time.sleep(0.2)
                bar.update(sum(map(epochs_in, logs.values())) - bar.n)
                for name, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[name]
                    if process.returncode:
                        bar.close()
                        end = logs[name].read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
                        raise RuntimeError(
                            f"{commands[name][0]} failed with status {process.returncode}; the end of "
                            f"{logs[name]}:\n" + "\n".join(end)
                        )
            bar.close()


def epochs_in(log: Path) -> int:
    """Epochs that a log has seen the end of, those before a resumption among them."""
    found = re.findall(r"Epoch (\d+) \(", log.read_text(encoding="utf-8", errors="replace"))
    return int(found[-1]) + 1 if found else 0


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
        "--trainer", default="nnUNetTrainerSemi", help="any of `nnssl trainers` (default: %(default)s)"
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
