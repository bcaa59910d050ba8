"""From a raw dataset to planned, preprocessed and split data: one folder per suite, nothing outside it is
written."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.leaderboard.suite import Suite, SuiteError
from nnssl.files import copy_file, read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
BASE_PLAN = "nnUNetPlansBase"


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process got `path` for itself, and who has it written inside.

    The kernel holds the lock, so that of a killed process is never stale; the file may stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}))
        file.flush()
        yield True


def link(source: Path, target: Path) -> None:
    """`target` as a link to a file, whatever was there before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.symlink_to(source.resolve())


class Workspace:
    """A folder with `raw`, `preprocessed` and `results` of one dataset: nnU-Net's three variables point at
    it."""

    def __init__(self, folder: Path, suite: Suite) -> None:
        self.folder, self.suite = folder.resolve(), suite
        self.raw = self.folder / "raw" / suite.dataset
        self.preprocessed = self.folder / "preprocessed" / suite.dataset
        self.identifier = str(int(suite.dataset[7:10]))

    def environment(self) -> dict[str, str]:
        """The caller's without its nnU-Net variables, one thread per process, the suite's own variables
        last."""
        from nnssl.commands.trainers import trainers_folder

        folders = {f"nnUNet_{name}": str(self.folder / name) for name in ("raw", "preprocessed", "results")}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        memory = {
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": "1000000000000",
        }  # keep freed memory: page faults cost a fifth of a step
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")},
            **folders,
            **{
                name: "1"
                for name in (
                    "OMP_NUM_THREADS",
                    "MKL_NUM_THREADS",
                    "OPENBLAS_NUM_THREADS",
                    "nnUNet_def_n_proc",
                )
            },
            **(memory if self.suite.device == "cpu" else {}),
            **({"nnUNet_compile": "f"} if self.suite.device == "cpu" else {}),
            "OMP_WAIT_POLICY": "PASSIVE",
            "nnUNet_extTrainer": trainers_folder(),
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "MPLBACKEND": "Agg",
            **self.suite.environment,
        }

    def nnssl(self, log: Path, *arguments: str) -> None:
        """An `nnssl` command, its output to `log`; RuntimeError with the last lines where it fails."""
        run(log, [sys.executable, "-m", "nnssl.commands.cli", *arguments], self.environment())

    def cases(self) -> list[str]:
        """Sorted names of the labeled cases of the raw dataset."""
        ending = read_json(self.raw / "dataset.json")["file_ending"]
        return sorted(
            p.name.removesuffix(ending) for p in (self.raw / "labelsTr").iterdir() if p.name.endswith(ending)
        )

    def plans(self, name: str = BASE_PLAN) -> dict[str, Any]:
        return read_json(self.preprocessed / f"{name}.json")

    def write_plans(self, name: str, settings: Mapping[str, Any], batch_size: int | None = None) -> None:
        """The base plan with the suite's edits and the section `nnssl`, as `<name>.json`."""
        plans = edit_plan(self.plans(), self.suite)
        plans |= {"plans_name": name, "nnssl": {k: v for k, v in settings.items() if v is not None}}
        if batch_size is not None:
            plans["configurations"][self.suite.configuration]["batch_size"] = batch_size
        write_json(plans, self.preprocessed / f"{name}.json", indent=1)

    def prepare(self, data: Path, jobs: int) -> None:
        """Link the raw dataset, split, plan, preprocess; what is there already is left alone."""
        source, log = data / self.suite.dataset, self.folder / "logs" / "prepare.log"
        if not (source / "dataset.json").is_file():
            how = (
                f"; make it with `python -m benchmarks.leaderboard convert {self.suite.converter}`"
                if self.suite.converter
                else ""
            )
            raise SuiteError(f"{source} is no nnU-Net raw dataset (no dataset.json){how}")
        with lock(self.folder / "prepare.lock", wait=True):
            for name in ("raw", "preprocessed", "results", "logs"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self.raw.mkdir(exist_ok=True)
            copy_file(source / "dataset.json", self.raw / "dataset.json")
            for name in ("imagesTr", "labelsTr", "imagesUn"):
                if (source / name).is_dir() and not (self.raw / name).exists():
                    (self.raw / name).symlink_to((source / name).resolve())
            self.preprocessed.mkdir(exist_ok=True)
            write_json(folds(self.suite, self.cases()), self.preprocessed / "splits_final.json", indent=1)
            spacing = self.suite.plan.get("spacing")
            edits = ["-overwrite_target_spacing", *map(str, spacing)] if spacing else []
            asked = (
                self.folder / "spacing.json"
            )  # nnU-Net's plan need not tell: its axes may be in another order
            if not (self.preprocessed / f"{BASE_PLAN}.json").is_file():
                write_json(spacing, asked)
                chosen = [
                    "-d",
                    self.identifier,
                    "-c",
                    self.suite.configuration,
                    "-overwrite_plans_name",
                    BASE_PLAN,
                ]
                self.nnssl(log, "plan-and-preprocess", *chosen, *edits, "--no_pp", "-npfp", str(jobs))
            elif asked.is_file() and (planned := read_json(asked)) != spacing:
                raise SuiteError(
                    f"{self.folder} was planned with [plan] spacing {planned}, the suite asks for "
                    f"{spacing}: use another --work"
                )
            edit_plan(self.plans(), self.suite)  # refuses what does not fit before hours of work
            self.preprocess(log, BASE_PLAN, jobs)

    def preprocess(self, log: Path, plans_name: str, jobs: int) -> None:
        chosen = ["-d", self.identifier, "-c", self.suite.configuration, "-p", plans_name]
        self.nnssl(log, "plan-and-preprocess", *chosen, "-np", str(jobs), "-npfp", str(jobs), "--no_pbar")


def run(log: Path, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """A command, its output added to `log`; RuntimeError where it fails."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        status = subprocess.run(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=file, stderr=file
        ).returncode
    if status:
        shown = next((c for c in command if c.startswith("nnUNetv2_")), " ".join(command[2:]))
        raise RuntimeError(f"{shown} failed with status {status}, see {log}; its last lines:\n{tail(log)}")


def tail(log: Path, lines: int = 20) -> str:
    return (
        "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        if log.is_file()
        else ""
    )


def folds(suite: Suite, cases: Sequence[str]) -> list[dict[str, list[str]]]:
    """One fold per budget, and one with all labels: the first names are labeled, the others unlabeled,
    validation apart; of `cases` only."""
    if suite.cases:
        if missing := sorted(set(suite.cases) - set(cases)):
            raise SuiteError(f"cases: no case {', '.join(missing)} in {suite.dataset}")
        cases = [case for case in cases if suite.cases[0] <= case <= suite.cases[1]]
    val = list(cases[-suite.validation :]) if isinstance(suite.validation, int) else sorted(suite.validation)
    if unknown := sorted(set(val) - set(cases)):
        raise SuiteError(f"validation: no case {', '.join(unknown[:5])} in {suite.dataset}")
    pool = [case for case in cases if case not in set(val)]
    if not pool or max(suite.budgets) > len(pool):
        raise SuiteError(
            f"budgets {suite.budgets}: {suite.dataset} has {len(pool)} cases beside the {len(val)} for "
            "validation"
        )
    return [{"train": pool[:n], "val": val, "unlabeled": pool[n:]} for n in (*suite.budgets, len(pool))]


def edit_plan(plans: dict[str, Any], suite: Suite) -> dict[str, Any]:
    """The suite's [plan] put into a plan; SuiteError where a patch does not fit the network."""
    configuration = plans["configurations"].get(suite.configuration)
    if configuration is None:
        raise SuiteError(
            f"configuration {suite.configuration!r}: the plan has {', '.join(plans['configurations'])}"
        )
    network = configuration["architecture"]["arch_kwargs"]
    divisor = suite.plan.get("features_divisor", 1)
    network["features_per_stage"] = [max(1, f // divisor) for f in network["features_per_stage"]]
    configuration["batch_size"] = suite.plan.get("batch_size", configuration["batch_size"])
    patch = suite.plan.get("patch_size", configuration["patch_size"])
    strides = [int(s) for s in np.prod(network["strides"], axis=0)]
    if len(patch) != len(strides) or any(p % s for p, s in zip(patch, strides, strict=True)):
        raise SuiteError(
            f"[plan] patch_size {patch} must be multiples of {strides}: so far does the planned network pool"
        )
    configuration["patch_size"] = patch
    return plans
