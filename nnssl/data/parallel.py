"""Work shared among processes that end when their parent does."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Result = TypeVar("Result")


def usable_cores() -> int:
    """CPU cores that this process may use (a batch system often grants fewer than there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def unordered(
    function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], workers: int
) -> Iterator[Result]:
    """``function(*job)`` for every job, in the order in which they finish; in this process if `workers` is 1.

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
        for future in as_completed([pool.submit(function, *job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "A worker process was killed, most likely because memory ran out. Finished work stays; start "
            "again with fewer processes "
            "(-np 1, or nnUNet_def_n_proc=1)."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: do not outlive a parent that was killed (idle workers would wait for work, and hold their
    memory, forever)."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
