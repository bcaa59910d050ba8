"""Work shared among processes that end when their parent does."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from nnssl.errors import mark

Result = TypeVar("Result")


def usable_cores(groups: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> int:
    """CPU cores that this process may use, by affinity and the quota of its container or batch job (Linux
    control groups, version 2); at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *_quotas(Path(groups), Path(membership))]))


def _quotas(groups: Path, membership: Path) -> list[int]:
    """Whole cores that the control group of this process and those around it grant."""
    lines = membership.read_text(encoding="utf-8").splitlines() if membership.is_file() else []
    own = next((line[3:] for line in lines if line.startswith("0::")), "/").strip("/")
    found = []
    for group in (groups / own, *(groups / own).parents):
        if groups in (group, *group.parents) and (group / "cpu.max").is_file():
            quota, _, period = (group / "cpu.max").read_text(encoding="utf-8").partition(" ")
            if quota != "max":
                found.append(int(quota) // int(period))
    return found


def unordered(
    function: Callable[..., Result],
    jobs: Iterable[tuple[Any, ...]],
    workers: int,
    queued: int | None = None,
) -> Iterator[Result]:
    """``function(*job)`` for every job, in the order in which they finish; in this process if `workers` is 1.

    queued  the next job is made only once no more than so many wait for a worker: large ones need memory

    Raises RuntimeError if a worker is killed, and whatever `function` raises; jobs not yet begun are then
    dropped.
    """
    if workers <= 1:
        yield from (function(*job) for job in jobs)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _end_with_parent
    )  # fork would copy CUDA and its threads
    try:
        pending: set[Future[Result]] = set()
        for job in jobs:
            pending.add(pool.submit(_marked, function, *job))
            while queued is not None and len(pending) > workers + queued:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in as_completed(pending))
    except BrokenProcessPool as error:
        raise RuntimeError(
            "A worker process was killed, most likely because memory ran out. Finished work is kept; "
            "rerun with fewer processes "
            "(-np 1, or nnUNet_def_n_proc=1)."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _marked(function: Callable[..., Result], *job: Any) -> Result:
    """In a worker: an error on purpose says so in the parent, too."""
    try:
        return function(*job)
    except Exception as error:
        mark(error)
        raise


def _end_with_parent() -> None:
    """In a worker: do not outlive a parent that was killed (idle workers would wait for work, and hold their
    memory, forever)."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
