"""Files are whole or not there: several writers at once, killed ones, full disks, folders that refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from nnssl import files

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals, limits and permissions of POSIX")


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")


def test_two_processes_write_the_same_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    code = """
        import sys
        from nnssl.files import write_json
        for n in range(100):
            write_json({"who": sys.argv[2], "numbers": [n] * 20000}, sys.argv[1])
    """
    writers, seen = [start(code, path, who) for who in "ab"], set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            content = files.read_json(path)  # an error if it is not whole
            assert len(content["numbers"]) == 20000 and len(set(content["numbers"])) == 1
            seen.add(content["who"])
    assert [writer.wait() for writer in writers] == [0, 0] and seen <= {"a", "b"}
    assert files.read_json(path)["numbers"][0] == 99
    assert os.listdir(tmp_path) == ["plans.json"]


HALF = """
    import sys
    from nnssl.files import replacing
    with replacing(sys.argv[1]) as partial, open(partial, "w") as stream:
        stream.write("new" * 1000)
        stream.flush()
        print("half", flush=True)
        sys.stdin.readline()
"""


@POSIX
def test_what_a_killed_writer_leaves_is_removed_by_the_next_and_what_a_living_one_has_is_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_text("old")
    command = [sys.executable, "-c", textwrap.dedent(HALF), str(path)]
    killed, living = (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        for _ in range(2)
    )
    for process in (killed, living):
        assert process.stdout is not None and process.stdout.readline() == "half\n"
    killed.kill()
    killed.wait()
    assert path.read_text() == "old"
    left = {name for name in os.listdir(tmp_path) if f"-{killed.pid}-" in name}
    assert len(left) == 1 and len(os.listdir(tmp_path)) == 3
    next_run = start("import sys; from nnssl.files import write_text; write_text('next', sys.argv[1])", path)
    assert next_run.wait() == 0
    assert path.read_text() == "next"
    assert left.isdisjoint(os.listdir(tmp_path)) and len(os.listdir(tmp_path)) == 2
    living.communicate("go on\n")
    assert living.returncode == 0 and path.read_text() == "new" * 1000
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_leftovers_of_other_hosts_go_after_a_day_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    old, young = tmp_path / ".nnssl-00000000-1-0123abcd", tmp_path / ".nnssl-00000000-2-0123abcd"
    mine = tmp_path / f".nnssl-{files.host_id()}-{os.getpid()}-0123abcd"
    others = [tmp_path / name for name in (".tmp-1", ".nnssl-export", "nnssl-00000000-1-0123abcd")]
    for folder in (old, young, mine, *others):
        folder.mkdir()
        (folder / "file").write_text("x")
    as_file = tmp_path / ".nnssl-00000000-3-0123abcd"
    as_file.write_text("a file is none of ours")
    before = time.time() - files.DAY - 60
    for path in (old, mine, as_file, *others):
        os.utime(path, (before, before))
    files.remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {young, mine, as_file, *others}


WRITERS = {
    "bytes": "files.write_bytes(b'x' * 400000, path)",
    "json": "files.write_json(['x'] * 100000, path)",
    "torch": "files.save_torch(torch.zeros(100000), path)",
    "copy": "files.copy_file(source, path)",
}


@POSIX
@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_the_old_one(
    tmp_path: Path, kind: str
) -> None:
    path, source = tmp_path / "file", tmp_path / "source"
    path.write_text("old")
    source.write_bytes(b"x" * 400000)
    code = f"""
        import resource, signal, sys
        import torch
        from nnssl import files
        path, source = sys.argv[1:]
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))
        try:
            {WRITERS[kind]}
        except OSError as error:
            print(error)
    """
    message, _ = start(code, path, source).communicate()
    assert (
        "File too large" in message and str(path) in message and "the previous file is unchanged" in message
    )
    assert ".nnssl-" not in message
    assert path.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["file", "source"]


@POSIX
def test_a_read_only_folder_is_an_error_that_names_the_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("locked")
    path = folder / "losses.csv"
    path.write_text("old")
    folder.chmod(0o555)
    code = """
        import os, sys
        from nnssl.files import write_text
        os.chdir(os.path.dirname(sys.argv[1]))
        if os.getuid() == 0:  # whom no permission stops
            os.setuid(65534)
        try:
            write_text("new", "losses.csv")
        except PermissionError as error:
            print(error)
    """
    message, _ = start(code, path).communicate()
    folder.chmod(0o755)
    assert "Permission denied" in message and str(path) in message
    assert path.read_text() == "old" and os.listdir(folder) == ["losses.csv"]


@POSIX
def test_what_may_not_be_read_is_told_apart_from_what_may_not_be_written(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("closed")
    folder.chmod(0o755)
    for name, mode in (("unlisted", 0o311), ("barred", 0o644), ("open", 0o555)):
        (folder / name).mkdir()
        (folder / name / "a.json").write_text("{}")
        (folder / name / "secret.json").write_text("{}")
        (folder / name / "secret.json").chmod(0o200)
        (folder / name).chmod(mode)
    code = """
        import os, sys
        from nnssl.errors import told_line
        from nnssl.files import may_read
        os.chdir(sys.argv[1])
        if os.getuid() == 0:  # whom no permission stops
            os.setuid(65534)
        for path in ("open", "open/a.json", "absent"):
            print(path, may_read(path))
        for path in ("unlisted", "barred", "barred/a.json", "open/secret.json"):
            print(path, may_read(path))
        for path, mode in (("open/secret.json", "rb"), ("open/new.json", "wb")):
            try:
                open(path, mode)
            except PermissionError as error:
                print(told_line(error))
    """
    said, _ = start(code, folder).communicate()
    for name in ("unlisted", "barred", "open"):
        (folder / name).chmod(0o755)
    *lines, reading, writing = said.splitlines()
    assert [line.split()[1] for line in lines] == ["True"] * 3 + ["False"] * 4
    assert "secret.json" in reading and reading.endswith(files.ALLOW_READING)
    assert "new.json" in writing and writing.endswith(files.ALLOW)


def test_an_error_of_the_caller_or_of_a_source_stays_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as partial:
        Path(partial).write_text(str(1 / 0))
    with pytest.raises(FileNotFoundError, match="absent"):
        files.copy_file(tmp_path / "absent", path)
    with pytest.raises(FileNotFoundError, match=r"nowhere.*file"):
        files.write_text("x", tmp_path / "nowhere" / "file")
    with pytest.raises(TypeError):
        files.write_json({"a": object()}, path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    content = {"ü": [1, 2.5, None], "nested": {"a": True}}
    files.write_json(content, tmp_path / "a.json")
    assert files.read_json(tmp_path / "a.json") == content
    files.save_torch({"x": torch.arange(3)}, tmp_path / "a.pth")
    assert torch.load(tmp_path / "a.pth")["x"].tolist() == [0, 1, 2]
    os.utime(tmp_path / "a.json", (10**9, 10**9))
    os.chmod(tmp_path / "a.json", 0o444)
    for _ in range(2):  # the copy of a read-only file can be replaced
        files.copy_file(tmp_path / "a.json", tmp_path / "b.json")
    assert os.path.getmtime(tmp_path / "b.json") == 10**9
    assert json.loads((tmp_path / "b.json").read_text()) == content


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b'{\n  "a": 1,\n  "b" 2\n}', "line 3, column 7"),
        (b"", "line 1, column 1"),
        (b'{\n "a": "\xff"}', "line 2, column 8: not UTF-8"),
        (b"[1, 2", "line 1, column 6"),
    ],
)
def test_damaged_json_names_file_line_and_column(tmp_path: Path, content: bytes, place: str) -> None:
    path = tmp_path / "plans.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        files.read_json(path)
    assert str(caught.value).startswith(f"{path}: not valid JSON ({place}")
