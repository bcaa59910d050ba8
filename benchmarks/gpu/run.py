"""The runner: tasks in processes of their own, several at a time where they are not timed, until the time is
up. A finished task's row is on disk at once, so the runner may be ended in any way: the next call goes on."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pkgutil
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import MEASURE, Piece, Place, Task
from benchmarks.leaderboard.prepare import ROOT, tail
from benchmarks.leaderboard.suite import Suite
from nnssl.commands.environment import versions
from nnssl.files import read_json, write_json

POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0  # between the request to end and the end
LEAST_SECONDS = 240.0  # that a task gets before it counts as hanging
DONE = ("finished", "failed", "out of memory", "hung")


class Results:
    """gpu.json: a row per task, written anew after each."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "gpu.json"
        self.rows: dict[str, dict[str, Any]] = read_json(self.path)["rows"] if self.path.is_file() else {}

    def put(self, name: str, row: Mapping[str, Any]) -> None:
        self.rows[name] = dict(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json({"rows": self.rows}, self.path, indent=1)

    def is_done(self, task: Task, retry: bool = False) -> bool:
        status = self.rows.get(task.name, {}).get("status")
        return status == "finished" or (status in DONE and not retry)


class Runner:
    """Brings tasks to their end.

    work      preprocessed data, checkpoints, logs
    results   rows so far
    end       on the clock of time.monotonic()
    retry     whether tasks that failed are tried again
    imports   modules that the tasks' processes begin with
    """

    def __init__(
        self,
        work: Path,
        results: Results,
        end: float,
        retry: bool = False,
        imports: Sequence[str] = (MEASURE,),
    ) -> None:
        self.work, self.results, self.end, self.retry = work, results, end, retry
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(list(imports))
        self.running: list[Running] = []
        self.commit = commit()
        self.tried: set[str] = set()

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, pieces: list[Piece]) -> None:
        """All pieces, as far as time allows. What runs when it is up is ended, and stays to be done."""
        try:
            for piece in pieces:
                self.run_piece(piece)
                if self.left() <= 0:
                    break
        finally:
            self.stop()

    def run_piece(self, piece: Piece) -> None:
        waiting = [task for task in piece.tasks if not self.is_settled(task)]
        alone: list[Task] = []  # that ran out of memory beside others
        while (waiting or alone or self.running) and self.left() > 0:
            for ended in [running for running in self.running if running.is_over()]:
                self.running.remove(ended)
                row = ended.row()
                if row["status"] == "out of memory" and ended.beside_others:
                    alone.append(ended.task)
                    self.tried.discard(ended.task.name)
                    continue
                self.finish(ended.task, row)
            limit = piece.side_by_side if waiting else 1
            queue = waiting or alone
            while queue and len(self.running) < limit:
                task = queue.pop(0)
                if task.seconds <= self.left():
                    self.start(task, beside_others=bool(waiting or self.running) and limit > 1)
                else:
                    print(f"{task.name}: about {task.seconds:.0f} s, too long for this call", flush=True)
            time.sleep(POLL_SECONDS)
        self.stop()

    def is_settled(self, task: Task) -> bool:
        return self.results.is_done(task, self.retry) or task.name in self.tried

    def start(self, task: Task, beside_others: bool) -> None:
        self.tried.add(task.name)
        self.running.append(Running(task, self.work, self.processes, beside_others))

    def finish(self, task: Task, row: dict[str, Any]) -> None:
        row |= {"commit": self.commit, "versions": versions()}
        self.results.put(task.name, row)
        lines = row.get("traceback", "").strip().splitlines()
        print(
            f"{task.name}: {row['status']}, {row['wall_seconds']} s{'; ' + lines[-1] if lines else ''}",
            flush=True,
        )

    def stop(self) -> None:
        """End what runs; trainings go on from their last checkpoint in the next call."""
        ended, self.running = self.running, []
        for running in ended:
            running.end()
        for running in ended:
            row = {"status": "unfinished", "commit": self.commit, **running.progress()}
            self.results.put(running.task.name, row)


class Running:
    """A task in its process."""

    def __init__(self, task: Task, work: Path, processes: Any, beside_others: bool) -> None:
        self.task, self.work, self.beside_others = task, work, beside_others
        name = re.sub(r"[^A-Za-z0-9]+", "_", task.name)
        self.output, self.log = work / "tasks" / f"{name}.json", work / "tasks" / f"{name}.log"
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.unlink(missing_ok=True)
        self.begun = time.monotonic()
        self.is_training = task.kind == f"{MEASURE}:train"
        self.limit = float("inf") if self.is_training else max(LEAST_SECONDS, 4 * task.seconds)
        self.process = processes.Process(target=work_on, args=(task, work, self.output, self.log))
        self.process.start()

    def is_over(self) -> bool:
        return not self.process.is_alive() or time.monotonic() - self.begun > self.limit

    def row(self) -> dict[str, Any]:
        """What the process left behind, or what became of it."""
        hung = self.process.is_alive()
        self.end()
        wall = {"wall_seconds": round(time.monotonic() - self.begun, 1)}
        if self.output.is_file():
            return json.loads(self.output.read_text(encoding="utf-8")) | wall
        status = "hung" if hung else "failed"
        reason = f"no row after {self.limit:.0f} s" if hung else f"exit code {self.process.exitcode}"
        return {"status": status, "traceback": f"{tail(self.log, 40)}\n{reason}", **wall}

    def end(self) -> None:
        """The process and all that it started; returns when they are gone."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
            patience = time.monotonic() + GRACE_SECONDS
            self.process.join(GRACE_SECONDS)
            while group_lives(self.process.pid) and time.monotonic() < patience:
                time.sleep(0.01)  # a signal that was sent has not yet ended anything
            if not self.process.is_alive() and not group_lives(self.process.pid):
                break

    def progress(self) -> dict[str, Any]:
        if not self.is_training:
            return {}
        from benchmarks.gpu.measure import progress

        found = progress(Place(self.task.suite, self.work), self.task.arguments["row"])
        return {"progress": found} if found else {}


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def work_on(task: Task, work: Path, output: Path, log: Path) -> None:
    """The whole life of a task's process."""
    os.setsid()
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.chdir(ROOT)
    with open(log, "a", encoding="utf-8") as file:  # what libraries in C print, too
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        row = {
            "status": "finished",
            **pkgutil.resolve_name(task.kind)(Place(task.suite, work), **task.arguments),
        }
    except BaseException as error:
        status = "out of memory" if "out of memory" in str(error).lower() else "failed"
        row = {"status": status, "traceback": traceback.format_exc()}
        traceback.print_exc()
    row["cpu_seconds"] = round(sum(os.times()[:4]), 1)
    write_json(row, output, indent=1)
    sys.stdout.flush()
    os._exit(0)  # loaders may still run: the runner ends the whole group


def end_with_parent() -> None:
    """End this process and its own when the runner is gone, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def prepare(suite: Suite, data: Path, work: Path) -> None:
    """Plan, preprocess and split once; RuntimeError where that fails."""
    space = Place(suite, work).space
    done = space.folder / "prepared.json"
    if done.is_file():
        return
    begun = time.monotonic()
    space.prepare(data, 1 if suite.device == "cpu" else os.cpu_count() or 1)
    write_json({"seconds": round(time.monotonic() - begun)}, done)


def toy_data(folder: Path, scans: Mapping[str, int], dataset: str) -> Path:
    """Phantoms as a folder of raw datasets."""
    from nnssl.demo.phantoms import write_dataset

    if not (folder / dataset).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_dataset(
            folder / dataset, scans["labeled"], scans["unlabeled"], scans["test"], seed=0, progress=False
        )
    return folder


def commit() -> str:
    """Of the code, `+` where it was edited; empty outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8").stdout.strip()

    head = git("rev-parse", "HEAD")
    return head[:12] + "+" * bool(
        head and git("status", "--porcelain", "nnssl", "nnssl_trainers", "benchmarks")
    )


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: rows stay, processes do not."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def has_gpu() -> bool:
    """Asked in another process, so that this one holds no memory of the GPU."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0
