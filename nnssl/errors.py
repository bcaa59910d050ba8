"""Which errors are told in one line: those raised on purpose, with a message for the user. A bug keeps its
traceback."""

from __future__ import annotations

import dis
from types import TracebackType

from nnssl.files import ALLOW_READING, REMEDIES, may_read

TOLD = (ValueError, RuntimeError, OSError, ImportError, AssertionError)
OURS = ("nnssl", "nnssl_trainers")
HOSTS = ("nnunetv2", "batchgenerators")
OUT_OF_MEMORY = "OutOfMemoryError"  # of PyTorch, by name: importing it takes seconds


def told_line(error: BaseException) -> str | None:
    """The message of an error that was raised on purpose, or that names a file; None for a bug.

    A worker process marks its errors with the attribute `told`, because tracebacks are not sent along.
    """
    text = str(error)
    if not isinstance(error, TOLD) or not text:
        return None
    package = _raised_in(error.__traceback__)
    if type(error).__name__ == OUT_OF_MEMORY:
        text = " ".join(text.split())
        return f"{text} Lower batch_size or patch_size in the plans file, or take another trainer."
    if package in HOSTS:
        return " ".join(text.split())  # they write paragraphs
    named = isinstance(error, OSError) and error.filename is not None
    if isinstance(error, OSError) and (remedy := REMEDIES.get(error.errno or 0)):
        if remedy in text:
            return text
        unreadable = isinstance(error, PermissionError) and named and not may_read(error.filename)
        return f"{text}. {ALLOW_READING if unreadable else remedy}"
    if package in OURS or named or getattr(error, "told", False):
        return text
    return None


def mark(error: BaseException) -> None:
    """In a worker, before the error goes to the parent."""
    error.told = told_line(error) is not None  # type: ignore[attr-defined]


def _raised_in(traceback: TracebackType | None) -> str:
    """Package whose `raise` or `assert` stands at the end of the traceback; empty where none does."""
    if traceback is None:
        return ""
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    instruction = traceback.tb_frame.f_code.co_code[traceback.tb_lasti]
    if dis.opname[instruction] != "RAISE_VARARGS":
        return ""
    return str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
