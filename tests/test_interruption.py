from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nnssl.commands.cli import main
from nnssl.interruption import STATUS, Terminated, interruptible


def test_sigterm_is_an_exception_inside_only() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as stop, interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert stop.value.code == STATUS == 143
    assert signal.getsignal(signal.SIGTERM) == before == signal.SIG_DFL


def test_a_handler_of_the_user_stays() -> None:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_other_threads_leave_the_handler_alone() -> None:
    def inside() -> None:
        with interruptible():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()


def _wait(queue: Any) -> None:
    queue.put(signal.pthread_sigmask(signal.SIG_BLOCK, []))
    time.sleep(60)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_do_not_hear_the_terminal_and_end_at_sigterm(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    with interruptible():
        process = context.Process(target=_wait, args=(queue,))
        process.start()
    assert queue.get(timeout=100) == {signal.SIGINT}
    process.terminate()
    process.join(20)
    assert process.exitcode == -signal.SIGTERM
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


@pytest.mark.parametrize(
    ("raised", "status", "what"),
    [(KeyboardInterrupt(), 130, "interrupted"), (Terminated(), 143, "terminated")],
)
@pytest.mark.parametrize("told", [False, True])
def test_a_command_prints_one_line_unless_it_was_told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    status: int,
    what: str,
    told: bool,
) -> None:
    raised.told = told  # type: ignore[attr-defined]

    def stop(*_: object) -> None:
        raise raised

    monkeypatch.setattr("nnssl.commands.cli.list_trainers", stop)
    assert main(["trainers"]) == status
    assert capsys.readouterr().err == ("" if told else f"nnssl trainers: {what}. Rerun to resume.\n")


def test_the_command_itself_ends_so_at_sigterm(tmp_path: Path) -> None:
    code = (
        "import sys, time; from nnssl.commands import cli\n"
        "def wait(folder):\n print('here', flush=True); time.sleep(60)\n"
        "cli.list_trainers = wait; sys.exit(cli.main(['trainers']))"
    )
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout and process.stdout.readline() == "here\n"
        process.terminate()
        said = process.communicate()[1]
    assert (process.returncode, said) == (143, "nnssl trainers: terminated. Rerun to resume.\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_that_is_ended_while_it_starts_ends() -> None:
    with interruptible():
        for _ in range(40):
            process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            process.start()
            process.terminate()
            process.join(30)
            assert process.exitcode == -signal.SIGTERM
