"""Files that are there whole or not at all, and JSON whose errors say where they are.

A file is written in a scratch folder beside its place, flushed to disk, then moved. It is a folder because
nnU-Net refuses files of a kind that it does not know among preprocessed cases. The folder's name says which
process made it: what a killed one left is removed by the next that writes there.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

DAY = 24 * 3600  # seconds
END_OF_ZIP, END_BYTES = b"PK\x05\x06", 22  # closes a zip file; its last two bytes: length of the comment
CHECKSUM_BYTES = 40
LEGACY = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # opens the files of PyTorch before 1.6: a pickled number
)
SCRATCH = re.compile(r"\.nnssl-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}")
FREE, ALLOW = "Free space there and rerun", "Make it writable, or choose another folder"
ALLOW_READING = "Get the right to read it: files need r, folders r and x"
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), FREE),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), ALLOW),
}
PROBE = 1 << 20  # bytes
Path = str | os.PathLike[str]


@contextmanager
def replacing(path: Path) -> Iterator[str]:
    """Where to write what becomes `path` once the block has ended without an error.

    OSError naming `path` where it cannot be written; an older file then stays as it was.
    """
    path = os.path.abspath(path)
    folder, name = os.path.split(path)
    try:
        with _scratch_folder(folder) as scratch:
            partial = os.path.join(scratch, name)
            yield partial
            move(partial, path)
    except OSError as error:
        named = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if named and not any(SCRATCH.search(name) for name in named):
            raise  # another file's, e.g. the source of a copy
        reason = f"{error.strerror or error} (nothing was written; the previous file is unchanged)"
        raise told(error, reason, path) from error


def told(error: OSError, reason: str, path: str) -> OSError:
    """The error with the path that the user knows, and what to do."""
    if error.errno is None:
        return OSError(f"{reason}: {path}")
    remedy = REMEDIES.get(error.errno)
    return OSError(error.errno, f"{reason}. {remedy}" if remedy else reason, path)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[str]:
    """A new folder of this process in `parent`, removed at the end; what killed ones left goes first.

    OSError naming `parent` where nothing can be written there.
    """
    try:
        with _scratch_folder(parent) as scratch:
            yield scratch
    except OSError as error:
        inside = error.filename is None or SCRATCH.search(str(error.filename))
        if error.errno not in REMEDIES or not inside:
            raise
        raise told(error, os.strerror(error.errno), os.path.abspath(parent)) from error


def refuse_full(folder: Path) -> None:
    """OSError where nothing can be written into `folder`: for libraries whose errors do not tell."""
    with scratch_folder(folder) as scratch, open(os.path.join(scratch, "probe"), "wb") as stream:
        stream.write(bytes(PROBE))
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def _scratch_folder(parent: Path) -> Iterator[str]:
    parent = os.path.abspath(parent)
    _tidy_once(parent)
    scratch = os.path.join(parent, f".nnssl-{host_id()}-{os.getpid()}-{secrets.token_hex(4)}")
    os.mkdir(scratch)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Among the processes of this computer, where its file system can lock folders."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def move(source: Path, path: Path) -> None:
    """Put a finished file into its place on the same disk, its content first."""
    handle = os.open(source, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(source, path)


def move_across(source: Path, path: Path) -> None:
    """Move a file, from one disk to another if need be: there it is whole before it is gone here."""
    try:
        os.replace(source, path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy_file(source, path)
        os.unlink(source)


def write_text(text: str, path: Path) -> None:
    """In UTF-8, with line ends as they are."""
    write_bytes(text.encode(), path)


def write_bytes(content: bytes, path: Path) -> None:
    with replacing(path) as partial, open(partial, "wb") as stream:
        stream.write(content)


def write_json(content: Any, path: Path, indent: int = 4) -> None:
    write_text(json.dumps(content, indent=indent) + "\n", path)


class _Hashing:
    """A stream that keeps the hash of what is written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.flush = stream, stream.flush
        self.hash = hashlib.blake2b(digest_size=16)

    def write(self, content: Any) -> int:
        self.hash.update(content)
        return self.stream.write(content)


def _checksum(content_hash: Any) -> bytes:
    return f"blake2b:{content_hash.hexdigest()}".encode()


def save_torch(content: Any, path: Path) -> None:
    """`torch.save`; what it writes is a zip file, whose comment here is a checksum of all of it."""
    import torch

    with replacing(path) as partial, open(partial, "wb") as stream:
        hashing: Any = _Hashing(stream)
        try:
            torch.save(content, hashing)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # PyTorch covers a full disk with an error of its own
                raise error.__context__ from None
            raise
        stream.seek(-2, os.SEEK_END)
        stream.write(CHECKSUM_BYTES.to_bytes(2, "little") + _checksum(hashing.hash))


def torch_damage(path: Path) -> str:
    """What is wrong with a file of `save_torch` or `torch.save`, empty where nothing is. The file is read
    once; nothing is unpickled."""
    if not os.path.lexists(path):
        return "it does not exist"
    if not os.path.isfile(path):
        return "it is a folder" if os.path.isdir(path) else "it is not a file"
    size = os.path.getsize(path)
    if size == 0:
        return "it is empty"
    with open(path, "rb") as stream:
        stream.seek(max(0, size - END_BYTES - CHECKSUM_BYTES))
        end = stream.read()
        if end[-END_BYTES:].startswith(END_OF_ZIP) and end.endswith(b"\0\0"):
            return _zip_damage(path)
        length = end[END_BYTES - 2 : END_BYTES]
        if not end.startswith(END_OF_ZIP) or length != CHECKSUM_BYTES.to_bytes(2, "little"):
            stream.seek(0)
            if stream.read(len(LEGACY)) == LEGACY:
                return "it is in PyTorch's format from before 1.6: torch.load it once and torch.save it again"
            return "it is truncated or overwritten"
        stream.seek(0)
        content_hash, left = hashlib.blake2b(digest_size=16), size - 2 - CHECKSUM_BYTES
        while left and (chunk := stream.read(min(left, 1 << 22))):
            content_hash.update(chunk)
            left -= len(chunk)
        content_hash.update(b"\0\0")  # the comment came later
    return "" if end[END_BYTES:] == _checksum(content_hash) else "its content does not match its checksum"


def _zip_damage(path: Path) -> str:
    """Of a file without our checksum: whether zip's own ones of its parts hold."""
    try:
        with zipfile.ZipFile(path) as archive:
            return f"its part {bad} does not match its checksum" if (bad := archive.testzip()) else ""
    except Exception as error:  # damaged records can raise nearly anything
        return f"its parts cannot be read ({error})"


def copy_file(source: Path, path: Path) -> None:
    """Content and times, not the permissions: a copy of a read-only file can be replaced later."""
    with replacing(path) as partial:
        shutil.copyfile(source, partial)
        stat = os.stat(source)
        os.utime(partial, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def may_read(path: Path) -> bool:
    """Whether no permission is missing to read a file, or to list and enter a folder."""
    try:
        if os.path.isdir(path):
            os.scandir(path).close()
            os.stat(os.path.join(path, os.curdir))
        elif os.path.isfile(path) or not os.path.lexists(path):  # else opening may wait, as for a pipe
            with open(path, "rb"):
                pass
    except PermissionError:
        return False
    except OSError:
        pass
    return True


def read_json(path: Path, encoding: str = "utf-8") -> Any:
    """Content of a JSON file; ValueError naming file, line and column if it is damaged."""
    with open(path, "rb") as stream:
        content = stream.read()
    try:
        return json.loads(content.decode(encoding))
    except json.JSONDecodeError as error:
        line, column, reason = error.lineno, error.colno, error.msg
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        reason = "not UTF-8"
    raise ValueError(f"{path}: not valid JSON (line {line}, column {column}: {reason}). Repair or remove it.")


def read_object(path: Path) -> dict[str, Any]:
    """As `read_json`; ValueError, too, where the file holds something else than a JSON object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: holds {type(content).__name__}, expected a JSON object. Repair or remove it."
        )
    return content


def remove_leftovers(folder: Path) -> None:
    """Remove scratch folders of processes that are gone: of this host at once, of others after a day."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = SCRATCH.fullmatch(entry.name)
            if not match or not entry.is_dir(follow_symlinks=False):
                continue
            lives = is_alive(int(match["pid"])) if match["host"] == host_id() else None
            if lives is None:
                lives = time.time() - entry.stat(follow_symlinks=False).st_mtime < DAY
            if not lives:
                shutil.rmtree(entry.path, ignore_errors=True)


@functools.lru_cache(maxsize=1024)
def _tidy_once(folder: str) -> None:
    """Once per process and folder: thousands of cases are written into the same one."""
    remove_leftovers(folder)


@functools.cache
def host_id() -> str:
    """Where process numbers mean the same: this computer, or this container on it."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        space = ""
    return hashlib.blake2b(f"{platform.node()} {space}".encode(), digest_size=4).hexdigest()


def is_alive(pid: int) -> bool | None:
    """Whether a process of this host is there; None on Windows, where asking would end it."""
    if os.name == "nt":
        return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
