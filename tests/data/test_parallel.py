from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import nnssl
from nnssl.data.parallel import unordered, usable_cores
from nnssl.errors import told_line
from nnssl.files import read_json


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_done_once(workers: int) -> None:
    assert sorted(unordered(divmod, [(number, 3) for number in range(7)], workers)) == [
        divmod(number, 3) for number in range(7)
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_on_purpose_stays_one(workers: int) -> None:
    with pytest.raises(OSError) as told:
        list(unordered(read_json, [("no/such/file",)], workers))
    assert told_line(told.value)
    with pytest.raises(ZeroDivisionError) as bug:
        list(unordered(divmod, [(1, 0)], workers))
    assert told_line(bug.value) is None


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_are_made_no_earlier_than_needed(workers: int) -> None:
    made = 0

    def jobs() -> Iterator[tuple[int, int]]:
        nonlocal made
        for made in range(1, 8):
            yield made, 3

    ahead = []
    for done, result in enumerate(unordered(divmod, jobs(), workers, queued=1), 1):
        ahead.append(made - done)
        assert result in {divmod(number, 3) for number in range(1, 8)}
    assert len(ahead) == 7 and max(ahead) <= workers + 1


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_the_function_arrive(workers: int) -> None:
    with pytest.raises(ZeroDivisionError):
        list(unordered(divmod, [(1, 0), (1, 0)], workers))


def test_one_worker_is_this_process_and_two_are_others() -> None:
    assert set(unordered(os.getpid, [(), ()], 1)) == {os.getpid()}
    assert os.getpid() not in set(unordered(os.getpid, [(), ()], 2))


def test_killed_worker_is_an_error_that_names_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"worker process was killed.*fewer processes \(-np 1"):
        list(unordered(os._exit, [(1,), (1,)], 2))


def alive(pid: int) -> bool:
    """Running; a dead process that nobody has waited for is not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see other processes")
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\nfrom nnssl.data.parallel import unordered, usable_cores\n"
        "if __name__ == '__main__':\n    for pid in unordered(os.getpid, [(), ()], 2):\n        print(pid, "
        "flush=True); time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(nnssl.__path__[0]).parent)}
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, env=environment, encoding="utf-8"
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert alive(worker)
        parent.send_signal(signal.SIGKILL)
        end = time.monotonic() + 60
        while alive(worker) and time.monotonic() < end:
            time.sleep(0.05)
        assert not alive(worker)


def test_cores_are_counted_by_affinity_and_by_the_quotas_of_all_control_groups_around(tmp_path: Path) -> None:
    cores = usable_cores(str(tmp_path / "none"), str(tmp_path / "none"))  # not Linux, or no quota
    assert cores == (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    job = tmp_path / "groups" / "slurm" / "job"
    job.mkdir(parents=True)
    membership = tmp_path / "membership"
    membership.write_text("0::/slurm/job\n")

    def counted() -> int:
        return usable_cores(str(tmp_path / "groups"), str(membership))

    (job / "cpu.max").write_text("max 100000\n")
    assert counted() == cores
    (job / "cpu.max").write_text(f"{100000 * (cores + 3)} 100000\n")
    assert counted() == cores
    (job.parent / "cpu.max").write_text("150000 100000\n")
    assert counted() == 1
    (job.parent / "cpu.max").write_text("50000 100000\n")  # half a core is one
    assert counted() == 1
