"""Kill commands at random points, run them again, and compare with what a run that was never killed leaves.

    python -m tests.faults.kills FOLDER --kills 60 --seed 0

Every run is a fork of this process, which has imported everything and done nothing. It ends before the n-th
file that it creates, moves or removes, when that file is created and still empty, at the n-th write into a
checkpoint, or after a random time.
"""

from __future__ import annotations

import argparse
import builtins
import gzip
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.run.run_training import run_training
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnssl import files
from nnssl.commands import export, plan_and_preprocess  # noqa: F401  forks need not import them again
from nnssl.commands.cli import main as nnssl
from nnssl.commands.trainers import trainers_folder
from nnssl.training.history import History
from tests.place import SHORT, Place
from tests.raw_dataset import stored, write_dataset

TRAINER, MODEL = "nnUNetTrainerMeanTeacher", "nnUNetTrainerMeanTeacher__nnUNetPlans__3d_fullres"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
DIFFERENT = re.compile(r"training_log|debug\.json|progress\.png")  # times and places
VARYING = ("epoch_start_timestamps", "epoch_end_timestamps", "peak_memory")  # keys
PATIENCE = 300  # seconds


@dataclass(frozen=True)
class Kill:
    """When and how to end a run: at the n-th event of a kind, or after so many seconds."""

    number: int = signal.SIGKILL
    kind: str = ""  # files | opened | writes
    event: int = 0
    seconds: float | None = None


class Events:
    """Counts the changes of files below a folder and the writes into checkpoints; ends this process by a
    signal at the n-th of one kind."""

    def __init__(self, folder: Path, kill: Kill) -> None:
        self.folder, self.kill = str(folder), kill
        self.seen = {"files": 0, "opened": 0, "writes": 0}
        sys.addaudithook(self.watch)
        write = files._Hashing.write

        def counted(stream: Any, content: Any) -> int:
            self.count("writes")
            return write(stream, content)

        setattr(files._Hashing, "write", counted)  # noqa: B010
        builtins.open = io.open = partial(self.open, builtins.open)

    def open(
        self, original: Callable[..., Any], file: Any, mode: str = "r", *args: Any, **kwargs: Any
    ) -> Any:
        stream = original(file, mode, *args, **kwargs)
        if mode[0] in "wxa" and str(file).startswith(self.folder):
            self.count("opened")
        return stream

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING and str(path).startswith(self.folder):
                self.count("files")
        elif event in CHANGES:
            self.count("files")

    def count(self, kind: str) -> None:
        self.seen[kind] += 1
        if (kind, self.seen[kind]) == (self.kill.kind, self.kill.event):
            os.kill(os.getpid(), self.kill.number)
            time.sleep(1)  # SIGTERM takes effect between two instructions


@dataclass(frozen=True)
class Ended:
    """How a run ended: status as of os.waitstatus_to_exitcode, seconds, events, whether it stood still."""

    status: int
    seconds: float
    events: dict[str, int]
    hung: bool = False


def run(folder: Path, command: Callable[[], Any], kill: Kill | None = None) -> Ended:
    """`command` in a fork, with nnU-Net's variables below `folder`."""
    return wait(start(folder, command, kill), kill)


@dataclass(frozen=True)
class Started:
    pid: int
    report: Path
    begin: float


def start(folder: Path, command: Callable[[], Any], kill: Kill | None = None, name: str = "") -> Started:
    report, begin = folder / f"events{name}", time.monotonic()
    report.unlink(missing_ok=True)
    if pid := os.fork():
        return Started(pid, report, begin)
    status = 1
    try:  # what follows runs in the fork
        os.setsid()
        for part in ("raw", "preprocessed", "results"):
            (folder / part).mkdir(exist_ok=True)
            os.environ[f"nnUNet_{part}"] = str(folder / part)
        log = os.open(folder / f"log{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        events = Events(folder, kill or Kill())
        status = command() or 0
        report.write_text(json.dumps(events.seen))
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def wait(started: Started, kill: Kill | None = None) -> Ended:
    kill = kill or Kill()
    deadline = started.begin + (PATIENCE if kill.seconds is None else kill.seconds)
    while not (ended := os.waitpid(started.pid, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.005)
    hung = not ended[0] and kill.seconds is None
    if not ended[0]:
        os.kill(started.pid, signal.SIGKILL if hung else kill.number)
        ended = os.waitpid(started.pid, 0)
    seconds = time.monotonic() - started.begin
    events = json.loads(started.report.read_text()) if started.report.exists() else {}
    return Ended(os.waitstatus_to_exitcode(ended[1]), seconds, events, hung)


# commands


def plan() -> int:
    options = ["-c", "3d_fullres", "-np", "1", "-npfp", "1", "--no_pbar"]
    return nnssl(["plan-and-preprocess", "-d", "777", *options])


def train(**options: Any) -> None:
    os.environ["nnUNet_n_proc_DA"] = "0"  # nnU-Net's planning does not work with it
    run_training("777", "3d_fullres", 0, TRAINER, device=torch.device("cpu"), **options)


def export_model() -> int:
    output = os.path.join(os.environ["nnUNet_results"], "exported")
    return nnssl(["export", "-d", "777", "-c", "3d_fullres", "-f", "0", "-tr", TRAINER, "-o", output])


# results


def results(folder: Path) -> dict[str, Any]:
    """Every file below `folder` but those that hold times or paths; comparable content by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name.startswith(("raw/", "events", "log")) or re.search(r"training_log", name):
            continue
        found[name] = None if DIFFERENT.search(name) else comparable(path, folder)
    return found


def comparable(path: Path, folder: Path) -> Any:
    if path.suffix == ".b2nd":
        return stored(path)
    if path.suffix == ".pkl":
        return plain(pickle.loads(path.read_bytes()))
    if path.suffix == ".pth":
        return plain(torch.load(path, weights_only=False))
    if path.suffix == ".json":
        return plain(json.loads(path.read_text(encoding="utf-8").replace(str(folder), "")))
    if path.suffix == ".zip":
        return zipped(path)
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def zipped(path: Path) -> dict[str, bytes]:
    import zipfile

    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def plain(value: Any) -> Any:
    """Without tensors and times; equal where the bits are."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), plain(value.detach().numpy())
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in VARYING}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return "nan" if isinstance(value, float) and math.isnan(value) else value


def differences(found: Any, wanted: Any, place: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys(), key=str):
            if key not in found or key not in wanted:
                yield f"{place}/{key} is {'missing' if key in wanted else 'left over'}"
            else:
                yield from differences(found[key], wanted[key], f"{place}/{key}")
    elif found != wanted:
        yield f"{place}: {str(found)[:80]} instead of {str(wanted)[:80]}"


# the loop


@dataclass(frozen=True)
class Operation:
    """A command, the state it starts from, what it is to leave, and how long it takes."""

    command: Callable[[], Any]
    start: Path
    wanted: dict[str, Any]
    seconds: float
    events: dict[str, int]


class Loop:
    def __init__(self, folder: Path, seed: int, numbers: tuple[int, ...] = (signal.SIGKILL,)) -> None:
        self.folder, self.random, self.numbers = folder, random.Random(seed), numbers
        self.kills: Counter[str] = Counter()
        self.failures: list[str] = []
        self.identical = 0
        self.groups: list[int] = []

    def prepare(self) -> dict[str, Operation]:
        """The runs that are never killed."""
        raw = self.folder / "start"
        write_dataset(raw / "raw", labeled=5, unlabeled=2)
        operations, planned = {}, self.folder / "planned"
        operations["plan"] = self.whole(plan, raw, planned)
        place = Place(planned)
        place.plan(**{**SHORT, "num_epochs": 3})
        cases = [f"lab_{i:02d}" for i in range(5)]
        fold = {"train": cases[:2], "val": cases[2:4], "unlabeled": cases[4:]}
        (place.preprocessed / "splits_final.json").write_text(json.dumps([fold]))
        trained = self.folder / "trained"
        command = partial(train, continue_training=True)
        operations["train"] = self.whole(command, planned, trained)
        unvalidated = self.folder / "unvalidated"
        shutil.copytree(trained, unvalidated)
        shutil.rmtree(unvalidated / "results" / "Dataset777_Tiny" / MODEL / "fold_0" / "validation")
        command = partial(train, only_run_validation=True)
        operations["validation"] = self.whole(command, unvalidated, self.folder / "validated")
        operations["export"] = self.whole(export_model, trained, self.folder / "exported")
        return operations

    def whole(self, command: Callable[[], Any], start: Path, folder: Path) -> Operation:
        shutil.copytree(start, folder)
        ended = run(folder, command)
        if ended.status:
            raise RuntimeError(f"{folder.name}: {(folder / 'log').read_text()[-3000:]}")
        return Operation(command, start, results(folder), ended.seconds, ended.events)

    def end_orphans(self) -> None:
        """Workers of killed runs, which wait for work that nobody sends."""
        while self.groups:
            with suppress(ProcessLookupError):
                os.killpg(self.groups.pop(), signal.SIGKILL)

    def round(self, name: str, operation: Operation, kind: str = "") -> None:
        """One run that is killed, sometimes twice, and then left to its end."""
        folder = self.folder / "killed"
        shutil.copytree(operation.start, folder)
        killed = 0
        for _ in range(self.random.choice((1, 1, 1, 2))):
            kill = self.draw(operation, kind)
            started = start(folder, operation.command, kill)
            self.groups.append(started.pid)
            ended = wait(started, kill)
            if ended.hung:
                self.fail(name, folder, f"{kill}: stood still for {PATIENCE} s")
                return
            if ended.status == -kill.number or (kill.number == signal.SIGTERM and ended.status):
                killed += 1
                self.kills[name] += 1
            elif ended.status:
                self.fail(name, folder, f"{kill}: ended with status {ended.status}")
                return
        if not killed:  # it was faster than the kill
            shutil.rmtree(folder)
            return
        ended = run(folder, operation.command)
        self.end_orphans()
        found = list(differences(results(folder), operation.wanted))
        if ended.status or found:
            self.fail(name, folder, f"{kill}: status {ended.status}; {'; '.join(found[:5])}")
            return
        self.identical += 1
        shutil.rmtree(folder)

    def at_once(self, name: str, operation: Operation) -> list[int]:
        """Two runs that start together; how they ended, which is well if one did and the result is right."""
        folder = self.folder / "at_once"
        shutil.copytree(operation.start, folder)
        both = [start(folder, operation.command, name=f"_{number}") for number in range(2)]
        statuses = sorted(wait(one).status for one in both)
        found = list(differences(results(folder), operation.wanted))
        if statuses not in ([0, 0], [0, 1]) or found:
            self.fail(f"{name} twice", folder, f"status {statuses}; {'; '.join(found[:5])}")
        else:
            shutil.rmtree(folder)
        return statuses

    def draw(self, operation: Operation, kind: str) -> Kill:
        number, kind = (
            self.random.choice(self.numbers),
            kind or self.random.choice(("files", "files", "opened", "seconds")),
        )
        if kind == "seconds":
            return Kill(number, seconds=self.random.uniform(0, operation.seconds))
        return Kill(number, kind, self.random.randint(1, operation.events[kind]))

    def fail(self, name: str, folder: Path, what: str) -> None:
        self.failures.append(f"{name}, round {self.identical + len(self.failures)}: {what}")
        folder.rename(self.folder / f"failed_{len(self.failures)}_{name}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sigterm", action="store_true", help="SIGTERM instead of SIGKILL")
    commands = ("plan", "train", "export")
    parser.add_argument("--at-once", nargs="*", choices=commands, default=commands, help="started twice")
    args = parser.parse_args(arguments)
    os.environ.update(nnUNet_extTrainer=trainers_folder(), nnUNet_def_n_proc="1", nnUNet_compile="f")
    torch.set_num_threads(1)
    make_cheap()
    multiprocessing.get_context = partial(_forking, multiprocessing.get_context)
    begin = time.monotonic()
    loop = Loop(args.folder, args.seed, (signal.SIGTERM if args.sigterm else signal.SIGKILL,))
    operations = loop.prepare()
    turns = [
        ("plan", ""),
        ("train", ""),
        ("train", "writes"),
        ("validation", ""),
        ("export", ""),
        ("train", ""),
    ]
    prepared, turn = time.monotonic() - begin, 0
    while sum(loop.kills.values()) < args.kills:
        name, kind = turns[turn % len(turns)]
        loop.round(name, operations[name], kind)
        turn += 1
        with redirect_stdout(sys.stderr):
            print(f"{turn} rounds: {dict(loop.kills)}, failures {loop.failures}", flush=True)
    report = {
        "at_once": {name: loop.at_once(name, operations[name]) for name in args.at_once},
        "kills": sum(loop.kills.values()),
        "by_command": dict(loop.kills),
        "identical": loop.identical,
        "failures": loop.failures,
        "seconds": {"prepare": round(prepared, 1), "all": round(time.monotonic() - begin, 1)},
        "one_run": {name: [round(o.seconds, 1), o.events] for name, o in operations.items()},
    }
    print(json.dumps(report))
    return int(bool(loop.failures))


def make_cheap() -> None:
    """Leave out what takes time and proves nothing here, and import what forks would import again."""
    extract = DatasetFingerprintExtractor.__init__

    def of_few_voxels(self: Any, *args: Any, **kwargs: Any) -> None:
        extract(self, *args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = 1000

    DatasetFingerprintExtractor.__init__ = of_few_voxels
    MetaLogger.plot_progress_png = lambda self, folder: Path(folder, "progress.png").write_text("a plot")
    setattr(History, "_plot", lambda self, path: files.write_text("a plot", path))  # noqa: B010
    with redirect_stdout(sys.stderr):
        recursive_find_trainer_class_by_name(TRAINER)


def _forking(original: Callable[..., Any], method: str | None = None) -> Any:
    """Workers of nnU-Net as forks: they need not import everything anew."""
    return original("fork" if method == "spawn" else method)


if __name__ == "__main__":
    sys.exit(main())
