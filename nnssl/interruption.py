"""Interruptions: SIGTERM as an exception, so that everything is closed on the way out, and children that
leave the terminal's interrupt to their parent."""

from __future__ import annotations

import multiprocessing
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


_starting = threading.local()


def _deaf_start(process: BaseProcess) -> None:
    """Signals that are blocked stay so in what is started; a fork gets SIGTERM back, without our handler."""
    method = getattr(process, "_start_method", None) or multiprocessing.get_start_method()
    blocked = {signal.SIGINT, *([signal.SIGTERM] if method == "fork" else [])}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    _starting.here = signal.SIGTERM in blocked - before
    try:
        _start(process)
    finally:
        _starting.here = False
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_fork() -> None:
    """Python forgets a signal that it caught while it forked: a pool that is closed at once would wait for
    its worker forever."""
    if getattr(_starting, "here", False):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_fork)
