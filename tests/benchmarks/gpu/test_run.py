from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import run as module
from benchmarks.gpu.plan import Piece, Task
from benchmarks.gpu.run import Results, Runner, ended_by_signals
from benchmarks.leaderboard.suite import load_suite

SUITE = load_suite("smoke")


def task(kind: str, name: str = "", guess: float = 0, **arguments: Any) -> Task:
    return Task(name or kind, f"tests.benchmarks.gpu.kinds:{kind}", arguments, guess, SUITE)


def runner(folder: Path, seconds: float = 60, retry: bool = False) -> Runner:
    return Runner(folder, Results(folder / "results"), time.monotonic() + seconds, retry, imports=())


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "results" / "gpu.json").read_text(encoding="utf-8"))["rows"]


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while not (found := what()):
        assert time.monotonic() < end, "waited for a minute"
        time.sleep(0.05)
    return found


def test_failures_keep_their_traceback_and_stop_nothing(tmp_path: Path) -> None:
    tasks = [task("broken"), task("killed"), task("square", number=3), task("square", "last", number=4)]
    runner(tmp_path).run([Piece("first", "", tasks[:3], 2), Piece("second", "", tasks[3:])])
    found = rows(tmp_path)
    assert [found[t.name]["status"] for t in tasks] == ["failed", "failed", "finished", "finished"]
    assert "ZeroDivisionError: planted in Dataset900_Phantoms" in found["broken"]["traceback"]
    assert "the last words" in found["killed"]["traceback"] and "exit code 7" in found["killed"]["traceback"]
    assert found[tasks[3].name]["square"] == 16
    assert found["broken"]["versions"]["nnssl"] and "commit" in found["broken"]


def test_finished_rows_are_kept_and_failed_ones_tried_again_when_asked(tmp_path: Path) -> None:
    piece = Piece("piece", "", [task("square", number=2), task("broken")])
    runner(tmp_path).run([piece])
    first = rows(tmp_path)
    marked = {name: row | {"mark": True} for name, row in first.items()}
    (tmp_path / "results" / "gpu.json").write_text(json.dumps({"rows": marked}))
    runner(tmp_path).run([piece])
    assert rows(tmp_path) == marked
    runner(tmp_path, retry=True).run([piece])
    again = rows(tmp_path)
    assert "mark" not in again["broken"] and "mark" in again["square"]


def test_out_of_memory_beside_others_is_tried_again_alone(tmp_path: Path) -> None:
    tasks = [task("greedy", f"greedy {i}") for i in range(2)]
    runner(tmp_path).run([Piece("piece", "", tasks, side_by_side=2)])
    assert [row["status"] for row in rows(tmp_path).values()] == ["finished", "finished"]


def test_out_of_memory_alone_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    runner(tmp_path).run([Piece("piece", "", [task("greedy")])])
    assert rows(tmp_path)["greedy"]["status"] == "out of memory"


def test_a_task_that_hangs_is_ended_and_the_next_one_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST_SECONDS", 2.0)
    tasks = [task("sleeping", seconds=600), task("square", number=5)]
    runner(tmp_path).run([Piece("piece", "", tasks)])
    found = rows(tmp_path)
    assert found["sleeping"]["status"] == "hung" and "no row after 2 s" in found["sleeping"]["traceback"]
    assert found[tasks[1].name]["square"] == 25
    assert not alive(int((tmp_path / "child").read_text(encoding="utf-8")))


def test_time_limit_ends_what_runs_and_leaves_it_to_be_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, too_long = task("sleeping", seconds=600), task("sleeping", "too long", guess=10_000, seconds=1)
    begun = time.monotonic()
    runner(tmp_path, seconds=4).run([Piece("a", "", [task("square", number=1), too_long, long])])
    assert time.monotonic() - begun < 30
    found = rows(tmp_path)
    assert found["square"]["status"] == "finished"
    assert found["sleeping"]["status"] == "unfinished" and "too long" not in found
    assert "too long: about 10000 s, too long for this call" in capsys.readouterr().out
    assert not alive(int((tmp_path / "child").read_text(encoding="utf-8")))


def test_sigterm_ends_the_run_and_its_processes(tmp_path: Path) -> None:
    long = task("sleeping", seconds=600)

    def interrupt() -> None:
        wait_for(lambda: (tmp_path / "child").is_file())
        os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.suppress(KeyboardInterrupt), ended_by_signals():
        threading.Thread(target=interrupt, daemon=True).start()
        runner(tmp_path).run([Piece("a", "", [task("square", number=1), long])])
    found = rows(tmp_path)
    assert [row["status"] for row in found.values()] == ["finished", "unfinished"]
    assert not alive(int((tmp_path / "child").read_text(encoding="utf-8")))
