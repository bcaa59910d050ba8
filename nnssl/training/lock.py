"""One training per output folder: the file `training.lock` beside the checkpoints names the process.

On its own computer a process is there or not, by its number and the time it started. Of another computer,
only a sign of life is seen: the process touches its lock again and again.
"""

from __future__ import annotations

import atexit
import glob
import json
import os
import platform
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from nnssl.files import host_id, is_alive

NAME = "training.lock"
BEAT, PATIENCE = 20.0, 180.0  # seconds between signs of life, and without one before it counts as gone
HOUR = 3600  # clocks of computers that share a disk do not differ by more


class TrainingLock:
    """Held from `acquire` to `release`, or until the process ends."""

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, NAME)
        self.lost = False
        self._own: dict[str, Any] = {}
        self._end = threading.Event()

    def acquire(self, log: Callable[[str], None] = print) -> None:
        """RuntimeError naming the process that trains here; what a dead one left is removed."""
        if holder := self.try_acquire(log, PATIENCE):
            raise RuntimeError(f"{holder}. Wait for it, end it, or choose another fold, trainer or plan")

    def try_acquire(self, log: Callable[[str], None] = print, patience: float = 0) -> str:
        """Which process trains here, empty if this one holds the lock now.

        patience  seconds to wait for a sign of life of a process on another computer; without any, it lives
        """
        self._own = {**own_process(), "token": secrets.token_hex(8)}
        while not self._create():
            found = _read(self.path)
            if found is None:
                continue  # released meanwhile
            if holder := self._holder(found, log, patience):
                return holder
            if self._remove(found) and not _is_own(found):
                log(f"Removed {self.path}: {_who(found)} is gone")
        atexit.register(self.release)
        threading.Thread(target=self._beat, name=NAME, daemon=True).start()
        return ""

    def holder(self, log: Callable[[str], None] = print, patience: float = PATIENCE) -> str:
        """Which process trains here, empty if none does; nothing is taken or removed."""
        self._own = self._own or own_process()
        found = _read(self.path)
        return "" if found is None else self._holder(found, log, patience)

    def release(self) -> None:
        """Remove the file, if it is still this lock's. Twice does no harm."""
        self._end.set()
        if self._own.get("pid") == os.getpid() and self._holds():
            with suppress(OSError):
                os.remove(self.path)
        atexit.unregister(self.release)

    def verify(self) -> None:
        """RuntimeError if another process took this one for dead and trains here now."""
        if self.lost:
            who = _who(_read(self.path) or {})
            raise RuntimeError(
                f"{self.path}: {who} took this training over, having seen no sign of life. It stops here"
            )

    def _create(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with open(handle, "w", encoding="utf-8") as stream:
            json.dump(self._own, stream)
        return True

    def _remove(self, found: dict[str, Any]) -> bool:
        """Whether this process, and no other at the same moment, removed the lock that it had read."""
        turn = f"{self.path}.turn"
        try:
            os.mkdir(turn)
        except FileExistsError:
            with suppress(OSError):
                if time.time() - os.stat(turn).st_mtime > HOUR:  # of a process that died meanwhile
                    os.rmdir(turn)
            time.sleep(0.1)
            return False
        try:
            if _read(self.path) != found:
                return False
            os.remove(self.path)
            return True
        finally:
            os.rmdir(turn)

    def _holder(self, found: dict[str, Any], log: Callable[[str], None], patience: float) -> str:
        if _is_own(found) or not self._lives(found, _who(found), log, patience):
            return ""
        return f"{self.path}: {_who(found)} trains in this folder ({found.get('command', '?')})"

    def _lives(self, found: dict[str, Any], who: str, log: Callable[[str], None], patience: float) -> bool:
        if not found:
            return False  # damaged: its process ended while it wrote
        if found.get("space") == host_id() and (alive := is_alive(int(found["pid"]))) is not None:
            return alive and started(int(found["pid"])) == found.get("started")
        job, run = found.get("job") or [None, 0]
        if job is not None and job == self._own["job"][0] and run < self._own["job"][1]:
            return False  # SLURM started this job anew, which it does after the end
        first = _touched(self.path)
        if first is None or time.time() - first > HOUR:
            return False
        if not patience:
            return True
        log(f"{self.path} is of {who}: waiting up to {patience:.0f} s for a sign of life")
        end = time.monotonic() + patience
        while time.monotonic() < end:
            time.sleep(min(1.0, patience / 10))
            if (now := _touched(self.path)) != first:
                return now is not None
        return False

    def _holds(self) -> bool:
        return (_read(self.path) or {}).get("token") == self._own["token"]

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            try:
                if not (self._holds() or self._create()):
                    self.lost = True
                    return
                os.utime(self.path)
            except OSError:  # a disk that is away for a moment, or a folder that was removed
                continue


def trainings_of(dataset_results: str, log: Callable[[str], None] = print) -> list[str]:
    """The processes that train below a dataset's folder of results, a line each."""
    locks = sorted(glob.glob(os.path.join(glob.escape(dataset_results), "*", "fold_*", NAME)))
    return [holder for path in locks if (holder := TrainingLock(os.path.dirname(path)).holder(log))]


def own_process() -> dict[str, Any]:
    """What tells this process from every other."""
    job = [os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", 0))]
    return {
        "host": platform.node(),
        "space": host_id(),
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "job": job,
        "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }


def started(pid: int) -> str | None:
    """When a process began, in the words of the system; None where it is gone or the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            state, *fields = stream.read().rpartition(")")[2].split()
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as stream:
            return None if state in "ZX" else f"{stream.read().strip()} {fields[18]}"
    except (OSError, IndexError, ValueError):
        pass
    try:  # not Linux
        done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, encoding="utf-8")
    except OSError:
        return None
    return done.stdout.strip() or None


def _who(found: dict[str, Any]) -> str:
    return f"process {found.get('pid', '?')} on {found.get('host', '?')}"


def _is_own(found: dict[str, Any]) -> bool:
    """A training of this very process, which has come to its end."""
    keys = ("space", "pid", "started")
    return all(found.get(key) == value for key, value in own_process().items() if key in keys)


def _read(path: str) -> dict[str, Any] | None:
    """Content of a lock, empty if it is damaged; None if there is none."""
    for wait in (0.0, 0.2, 1.0):  # it may be half written
        time.sleep(wait)
        try:
            with open(path, encoding="utf-8", errors="replace") as stream:
                found = json.load(stream)
        except FileNotFoundError:
            return None
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("pid"), int):
            return found
    return {}


def _touched(path: str) -> float | None:
    try:
        with open(path, "rb") as stream:  # opening makes network disks look
            return os.fstat(stream.fileno()).st_mtime
    except OSError:
        return None
