"""The pieces, in order of value, and what each measures."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.leaderboard.prepare import Workspace
from benchmarks.leaderboard.suite import Suite, load_suite
from nnssl.commands.trainers import list_trainers, trainers_folder

MEASURE = "benchmarks.gpu.measure"
STOCK = "nnUNetTrainer"
OFFICIAL = "la_official"
TRAINED = (
    "supervised",
    "nnUNetTrainerSemi",
    "nnUNetTrainerDiffCL",
    "nnUNetTrainerFixMatch",
    "nnUNetTrainerCAML",
)
COMPARED = ("Supervised", "Semi", "DiffCL", "FixMatch", "CAML")  # with other batch sizes and compiled
LAST_PHASE = {"nnUNetTrainerACTION": 0.9}  # progress at which all terms of a method count; else 0.5
LABELED = 8
DATASETS = ("Dataset511_LA", "Dataset501_LeftAtrium")
SHORT = {"num_epochs": 20, "num_iterations_per_epoch": 100, "num_val_iterations_per_epoch": 4}

TOY_DATASET = "Dataset900_Phantoms"
TOY_SCANS = {"labeled": 3, "unlabeled": 2, "test": 0}
TOY_PLAN = {"features_divisor": 8, "patch_size": [16, 32, 32]}
TOY_SCHEDULE = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}
TOY_OPTIONS = {"nnUNetTrainerDiffCL": {"hfm_max_tokens": 512}}


@dataclass(frozen=True)
class Place:
    """Where a task works: a suite and the folder in which it is prepared."""

    suite: Suite
    work: Path

    @property
    def space(self) -> Workspace:
        return Workspace(self.work / self.suite.name, self.suite)

    @property
    def device(self) -> Any:
        import torch

        return torch.device(self.suite.device)


@dataclass(frozen=True)
class Task:
    """One measurement.

    kind      module:function, called as function(place, **arguments) -> row
    seconds   a guess, for planning alone
    """

    name: str
    kind: str
    arguments: dict[str, Any]
    seconds: float
    suite: Suite

    def of(self, trainers: Collection[str]) -> bool:
        """Whether the task is one of these trainers', or of none."""
        trainer = self.arguments.get("trainer")
        if "row" in self.arguments:
            trainer = next(r.trainer for r in self.suite.rows() if r.name == self.arguments["row"])
        return trainer is None or trainer in trainers


@dataclass(frozen=True)
class Piece:
    """Tasks that belong together; `side_by_side`: so many at a time on the one GPU."""

    name: str
    what: str
    tasks: list[Task]
    side_by_side: int = 1


def suites(data: Path, dataset: str | None, dry: bool) -> tuple[Suite, Suite]:
    """The short and the official training protocol on the chosen dataset; ValueError where there is none."""
    official = load_suite(OFFICIAL)
    if dry:
        toy = dataclasses.replace(
            official,
            name="toy",
            dataset=dataset or TOY_DATASET,
            validation=1,
            budgets=[1],
            seeds=[0],
            methods=list(TRAINED),
            device="cpu",
            plan=TOY_PLAN if dataset is None else {"features_divisor": 8},
            schedule={**TOY_SCHEDULE, "save_every": 1, "amp": "bfloat16", "term_gradients": 2},
            method={name: {"options": options} for name, options in TOY_OPTIONS.items()},
            environment={},
            converter="",
            published=[],
        )
        return toy, dataclasses.replace(
            toy, methods=list(TRAINED[1:2]), schedule={**toy.schedule, "num_epochs": 3}, method={}
        )
    name = dataset or next((d for d in DATASETS if (data / d / "dataset.json").is_file()), None)
    if name is None or not (data / name / "dataset.json").is_file():
        found = sorted(path.parent.name for path in data.glob("Dataset*/dataset.json"))
        raise ValueError(
            f"{data} has no {name or ' or '.join(DATASETS)} (found: {', '.join(found) or 'no raw dataset'}): "
            "give the folder of nnU-Net's raw datasets with --data, and one of them with --dataset"
        )
    cores = os.cpu_count() or 1
    loaders = str(max(2, cores // len(TRAINED)))
    chosen = dataclasses.replace(
        official,
        name=name,
        dataset=name,
        budgets=[LABELED],
        seeds=[0],
        methods=list(TRAINED),
        method={},
        environment={"nnUNet_n_proc_DA": loaders, "nnUNet_def_n_proc": "2", "nnUNet_compile": "f"},
    )
    return dataclasses.replace(chosen, schedule={**chosen.schedule, **SHORT}), chosen


def pieces(short: Suite, official: Suite, dry: bool, trainers: Sequence[str] = ()) -> list[Piece]:
    """All pieces in order of value; `trainers`: without the tasks of other trainers."""
    every = [STOCK, *sorted(list_trainers(trainers_folder()), key=_by_use)]
    cores = os.cpu_count() or 1
    together = 2 if dry else max(1, min(8, cores // 2))
    few, most = (0, 0) if dry else (2, max(2, cores - 2))
    names = lambda some: [f"nnUNetTrainer{name}" for name in some]  # noqa: E731

    def smoke(amp: str, compiled: bool, trainers: Sequence[str]) -> Piece:
        what = f"{amp}{', compiled' * compiled}"
        tasks = [
            Task(
                f"smoke, {what}: {short_name(trainer)}",
                f"{MEASURE}:smoke",
                {
                    "trainer": trainer,
                    "amp": amp,
                    "compiled": compiled,
                    "steps": 2 if dry else 5,
                    "resumed": amp == "float16" and not compiled,
                    "loaders": few,
                },
                4 if dry else 150 if compiled else 40,
                short,
            )
            for trainer in trainers
            # stock nnU-Net knows float16 alone
            if trainer != STOCK or amp == "float16"
        ]
        name = f"smoke-{amp}{'-compiled' * compiled}"
        return Piece(name, f"every trainer, a few steps of nnU-Net's loop: {what}", tasks, together)

    def steps(name: str, what: str, trainers: Sequence[str], compiled: bool = False, **options: Any) -> Piece:
        tasks = []
        for batch_size in options.pop("batch_sizes", (None,)):
            for trainer in trainers:
                given = f" batch {batch_size}" if batch_size else ""
                arguments = {
                    "trainer": trainer,
                    "amp": "float16",
                    "compiled": compiled,
                    "batch_size": batch_size,
                    "repeats": 2 if dry else 20,
                    "loaders": most,
                    "at": LAST_PHASE.get(trainer, 0.5),
                    "details": not batch_size,
                    **options,
                }
                title = f"{name}: {short_name(trainer)}{given}"
                guess = 4 if dry else 120 if compiled else 30
                tasks.append(Task(title, f"{MEASURE}:steps", arguments, guess, short))
        return Piece(name, what, tasks)

    mixers = [(64, 16)] if dry else [(4096, 32), (4096, 64), (32768, 32), (32768, 64)]
    mixer_tasks = [
        Task(
            f"mixer: {n} tokens x {width}",
            f"{MEASURE}:mixer",
            {"length": n, "width": width, "repeats": 2 if dry else 10},
            20,
            short,
        )
        for n, width in mixers
    ]
    hfm_tasks = [
        Task(f"hfm: {amp}", f"{MEASURE}:hfm", {"amp": amp, "repeats": 1 if dry else 10}, 30, short)
        for amp in (["float16"] if dry else ["float16", "bfloat16"])
    ]
    found = [
        Piece("machine", "versions, device", [Task("machine", f"{MEASURE}:machine", {}, 20, short)]),
        smoke("float16", False, every),
        smoke("float16", True, names(["Semi"]) if dry else every),
        steps(
            "steps",
            "a step against stock nnU-Net, planned batch",
            names(["Semi", "DiffCL"]) if dry else every,
        ),
        smoke("bfloat16", False, names(["Semi"]) if dry else every),
        Piece("mixer", "the Mamba mixer by each of its back ends", mixer_tasks),
        Piece("hfm", "parts of a Diff-CL step, HFM among them", hfm_tasks),
        train_piece("train", f"{LABELED} labels, {short.iterations} steps, nnU-Net's full loop", short),
        steps("steps-compiled", "a compiled step", [STOCK, *names(COMPARED)][: 2 if dry else None], True),
        steps(
            "steps-batch",
            "a step at other batch sizes",
            [STOCK, *names(COMPARED)][: 1 if dry else None],
            batch_sizes=(3,) if dry else (4, 8),
        ),
        smoke("bfloat16", True, names(["Semi"]) if dry else every),
        train_piece("train-official", f"{LABELED} labels, the papers' {official.iterations} steps", official),
    ]
    chosen = {f"nnUNetTrainer{name.removeprefix('nnUNetTrainer')}" for name in trainers}
    if unknown := sorted(chosen - set(every)):
        raise ValueError(f"--trainers {unknown[0]}: no such trainer. Trainers: {', '.join(every)}")
    kept = [dataclasses.replace(p, tasks=[t for t in p.tasks if not chosen or t.of(chosen)]) for p in found]
    return [piece for piece in kept if piece.tasks]


def train_piece(name: str, what: str, suite: Suite) -> Piece:
    tasks = [
        Task(f"{name}: {row.name}", f"{MEASURE}:train", {"row": row.name}, 0, suite) for row in suite.rows()
    ]
    return Piece(name, what, tasks, side_by_side=2 if suite.device == "cpu" else len(tasks))


def short_name(trainer: str) -> str:
    return trainer.removeprefix("nnUNetTrainer") or "stock nnU-Net"


def _by_use(trainer: str) -> tuple[int, str]:
    """Those that are recommended first."""
    name = short_name(trainer)
    return (COMPARED.index(name) if name in COMPARED else len(COMPARED), name)
