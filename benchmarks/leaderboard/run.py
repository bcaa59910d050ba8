"""The runner: every row of a suite that is not finished, each in a process of its own, through submitit.

A row is locked by the process that works on it, and a training resumes from its last checkpoint, so runner
and jobs may be killed at any time and several runners may share a work folder: the next `run` does what is
missing.
"""

from __future__ import annotations

import fnmatch
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from tqdm import tqdm

from benchmarks.leaderboard.job import Job, run_job
from benchmarks.leaderboard.prepare import ROOT, Workspace, lock, tail
from benchmarks.leaderboard.suite import Suite, SuiteError

POLL_SECONDS = 2.0
QUIET_SECONDS = 60.0  # between two states of the progress bar where no terminal shows it
YEAR_MINUTES = 365 * 24 * 60


def select(suite: Suite, work: Path, results: Path, only: Sequence[str]) -> list[Job]:
    """The rows whose name or method matches a pattern of `only`; SuiteError where trainers are unknown or
    rows are of other settings."""
    from nnssl.commands.trainers import list_trainers, trainers_folder

    rows = [
        r
        for r in suite.rows()
        if not only or any(fnmatch.fnmatchcase(n, p) for n in (r.name, r.method) for p in only)
    ]
    if not rows:
        raise SuiteError(f"no row matches {', '.join(only)}. Rows: {', '.join(r.name for r in suite.rows())}")
    trainers = list_trainers(trainers_folder())
    if unknown := sorted({r.trainer for r in rows} - set(trainers)):
        raise SuiteError(
            f"no trainer {', '.join(unknown)}; `nnssl trainers` lists {', '.join(trainers)}. --only leaves "
            "rows out"
        )
    jobs = [Job(suite, row, work, results) for row in rows]
    if old := [job.result for job in jobs if job.state() == "outdated"]:
        raise SuiteError(
            "rows with other settings than the suite's exist; remove them to train again: "
            f"{' '.join(map(str, old))}"
        )
    return jobs


def executor(folder: Path, suite: Suite, slurm: Mapping[str, Any] | None, slot: int) -> submitit.Executor:
    """submitit's, for this machine or for SLURM; `slot` spreads local jobs over the GPUs."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    )
    if slurm is not None:
        cluster = submitit.AutoExecutor(folder=folder, cluster="slurm")
        cluster.update_parameters(name=f"leaderboard-{suite.name}", **slurm)
        return cluster
    local = submitit.LocalExecutor(folder=folder)
    gpus: dict[str, Any] = {}
    if suite.device == "cuda":
        import torch

        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        known = (
            [int(n) for n in chosen.split(",")] if chosen else list(range(max(1, torch.cuda.device_count())))
        )
        gpus = {"gpus_per_node": 1, "visible_gpus": (known[slot % len(known)],)}
    local.update_parameters(timeout_min=YEAR_MINUTES, stderr_to_stdout=True, **gpus)
    return local


def run_suite(
    suite: Suite,
    data: Path,
    work: Path,
    results: Path,
    only: Sequence[str] = (),
    jobs: int = 1,
    slurm: Mapping[str, Any] | None = None,
    minutes: float | None = None,
) -> int:
    """Prepare the data, then bring every selected row to its end; returns the number of rows that are not
    finished.

    jobs     rows at a time on this machine; on SLURM all are submitted at once
    minutes  stop after so many; rerun to resume, at the loss of what follows the last checkpoint
    """
    end = time.monotonic() + 60 * (minutes or float("inf"))
    work, results = work.resolve(), results.resolve()
    selected = select(suite, work, results, only)
    if any(job.state() != "finished" for job in selected):
        Workspace(work / suite.name, suite).prepare(data.resolve(), jobs)
    waiting = [job for job in selected if job.state() != "finished"]
    running: dict[str, tuple[Job, submitit.Job, int]] = {}
    logs = work / suite.name / "submitit"
    try:
        done, calm = len(selected) - len(waiting), 1 if sys.stderr.isatty() else QUIET_SECONDS
        # miniters 0: the epochs are shown while no row ends
        with tqdm(
            total=len(selected), initial=done, desc=suite.name, unit="row", mininterval=calm, miniters=0
        ) as bar:
            while (waiting or running) and time.monotonic() < end:
                for name, (job, process, _) in list(running.items()):
                    if process.done():
                        del running[name]
                        if settle(job, process) == "busy":  # another runner's process was faster
                            waiting.append(job)
                        else:
                            bar.update()
                            bar.write(f"{name}: {job.state()}")
                elsewhere = [job for job in waiting if taken(job)]
                pending = {job.row.name for job in waiting} | running.keys()
                for job in list(waiting):
                    if job in elsewhere:
                        continue
                    if job.state() == "finished":  # by another runner
                        waiting.remove(job)
                        bar.update()
                    elif job.row.start in pending:
                        continue
                    elif slurm is not None or len(running) + len(elsewhere) < jobs:
                        slot = min(set(range(len(running) + 1)) - {used for _, _, used in running.values()})
                        process = executor(logs, suite, slurm, slot).submit(
                            run_job, suite, job.row, work, results
                        )
                        running[job.row.name] = (job, process, slot)
                        waiting.remove(job)
                bar.set_postfix_str(
                    ", ".join(f"{name} {epoch(job)}/{job.epochs}" for name, (job, _, _) in running.items()),
                    refresh=False,
                )
                bar.update(0)
                time.sleep(POLL_SECONDS)
    finally:
        for _, process, _ in running.values():
            process.cancel(check=False)
    return sum(job.state() != "finished" for job in selected)


def taken(job: Job) -> bool:
    """Whether a process works on the row."""
    with lock(job.lock) as free:
        return not free


def settle(job: Job, process: submitit.Job) -> str:
    """What became of a process that ended; one that was killed leaves a failed row."""
    try:
        return process.result()
    except Exception as error:  # whatever submitit raises for a process without result
        with lock(job.lock) as mine:
            if mine and job.state() != "finished":
                lines = tail(Path(process.paths.stdout), 5)
                job.fail(f"the process ended without a result ({type(error).__name__}); {lines}".strip())
        return "failed"


def epoch(job: Job) -> str:
    """The epoch that the row's log names last."""
    found = re.findall(r"Epoch (\d+)", tail(job.log, 60))
    return found[-1] if found else "0"
