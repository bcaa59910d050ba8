"""Measurements for the tests of the runner: nothing heavy is imported."""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.gpu.plan import Place


def square(place: Place, number: int) -> dict[str, Any]:
    return {"square": number**2, "dataset": place.suite.dataset}


def broken(place: Place) -> dict[str, Any]:
    raise ZeroDivisionError(f"planted in {place.suite.dataset}")


def killed(place: Place) -> dict[str, Any]:
    print("the last words", flush=True)
    os._exit(7)


def greedy(place: Place) -> dict[str, Any]:
    """Runs out of memory while another process has the lock."""
    lock = place.work / "taken"
    try:
        file = os.open(lock, os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        raise RuntimeError("CUDA out of memory (planted)") from None
    time.sleep(1)
    os.close(file)
    lock.unlink()
    return {"alone": True}


def sleeping(place: Place, seconds: float) -> dict[str, Any]:
    child = os.fork()
    if child == 0:
        time.sleep(seconds)
        os._exit(0)
    (place.work / "forked").write_text(str(child), encoding="utf-8")
    (place.work / "forked").rename(place.work / "child")  # whole when it is seen
    time.sleep(seconds)
    return {}
