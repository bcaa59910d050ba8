"""Interruptions: SIGTERM as an exception, so that everything is closed on the way out, and children that
leave the terminal's interrupt to their parent."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType

STATUS = 128 + 15  # of a process that SIGTERM ended, as shells tell it


class Terminated(SystemExit):
    """SIGTERM."""

    def __init__(self) -> None:
        super().__init__(STATUS)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`, unless something else handles it already, and processes that are
    started do not hear SIGINT: the parent ends them, and prints the one line."""
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked child
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        raise Terminated

    main = threading.current_thread() is threading.main_thread()
    handled = main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if handled:
        signal.signal(signal.SIGTERM, handle)
    start = BaseProcess.start
    if hasattr(signal, "pthread_sigmask"):
        BaseProcess.start = _deaf_start  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        BaseProcess.start = start  # type: ignore[method-assign]
        if handled:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


_start = BaseProcess.start


def _deaf_start(process: BaseProcess) -> None:
    """Signals that are blocked stay so in what is started."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        _start(process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
