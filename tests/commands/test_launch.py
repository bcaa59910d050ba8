from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from nnssl.commands.launch import launcher

ROOT = Path(__file__).resolve().parents[2]


def test_a_command_keeps_to_its_cores_gets_its_arguments_and_tells_what_it_used(tmp_path: Path) -> None:
    (tmp_path / "tell.py").write_text(
        "import multiprocessing, sys\n"
        "def main():\n    print(multiprocessing.cpu_count(), *sys.argv)\n    return 3\n"
    )
    usage = tmp_path / "usage"
    command = [*launcher(5, usage=str(usage)), "tell:main", "name", "-d", "501", "--c"]
    for lines in (1, 2):
        done = subprocess.run(
            command, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"}, capture_output=True, encoding="utf-8"
        )
        assert (done.stdout, done.returncode) == ("5 name -d 501 --c\n", 3)
        used = [json.loads(line) for line in usage.read_text(encoding="utf-8").splitlines()]
        assert len(used) == lines and all(0 < entry["peak_memory_mb"] < 10_000 for entry in used)
        assert all(0 <= entry["cpu_seconds"] < 60 for entry in used)


def test_a_launched_command_ends_with_its_parent(tmp_path: Path) -> None:
    """The parent is killed; the command, which would sleep for a minute, is gone soon after and has written
    no usage."""
    (tmp_path / "sleeper.py").write_text(
        "import os, pathlib, time\ndef main():\n    pathlib.Path('pid').write_text(str(os.getpid()))\n    "
        "time.sleep(60)\n"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": ""}
    usage = str(tmp_path / "usage")
    command = f"[*launcher(1, os.getpid(), {usage!r}), 'sleeper:main', 'sleeper']"
    code = (
        "import os, subprocess; from nnssl.commands.launch import launcher; "
        f"subprocess.run({command}, env={environment!r}, cwd={str(tmp_path)!r})"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text(encoding="utf-8"):
            time.sleep(0.05)
        parent.kill()
    pid, patience = int((tmp_path / "pid").read_text(encoding="utf-8")), time.monotonic() + 30
    while (Path("/proc") / str(pid)).exists() and time.monotonic() < patience:
        time.sleep(0.05)
    assert not (Path("/proc") / str(pid)).exists()
    assert not (tmp_path / "usage").exists()
