"""What the speed benchmarks share: interleaved medians, peak memory, both allocator settings, tables, results
files.

Times on CPU are seconds of processor time of this process, one thread, so that other programs on the machine
disturb them little; on CUDA they are wall time between synchronisations. Alternatives are timed in turns,
hence ratios compare like with like.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from nnssl.files import write_json, write_text

RESULTS = Path(__file__).parent / "results"

# glibc gives large buffers back to the system at once, and fetching them again, page by page, then outweighs
# the arithmetic
ALLOCATORS: dict[str, dict[str, str]] = {
    "plain": {},
    "tuned": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "1000000000000",
        "MALLOC_TOP_PAD_": "67108864",
    },
}


def medians(calls: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each call, taken in turns after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = _clock(device)
            call()
            seconds[name].append(_clock(device) - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def _clock(device: torch.device) -> float:
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most memory in use during one call beyond what was in use before it.

    CPU: resident memory (VmHWM - VmRSS) of a forked child that has made the call once and given all free
        memory back; glibc only.
    CUDA: PyTorch's allocations.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            call()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the high-water mark
            before = _resident("VmRSS")
            call()
            os.write(sender, str(_resident("VmHWM") - before).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(sender)
    with os.fdopen(receiver) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(
            f"the measured call failed in its child process (status {status}); its message is above"
        )
    return int(answer)


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def under_both_allocators(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What `python -m module --json arguments` prints, for each allocator setting: they are read when a
    process starts."""
    results = {}
    for name, variables in ALLOCATORS.items():
        print(f"{module}, {name} allocator ...", file=sys.stderr, flush=True)
        environment = (
            {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
            | variables
            | {"OMP_NUM_THREADS": "1"}
        )
        command = [sys.executable, "-m", module, "--json", *arguments]
        results[name] = json.loads(
            subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
        )
    return results


def machine(device: torch.device, *packages: str) -> str:
    """One line: processor, versions, threads, load."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        models = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        processor = models[0] if models else platform.machine()
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", *packages))
    load, cores = os.getloadavg()[0], os.cpu_count()
    threads = f"{torch.get_num_threads()} thread(s)"
    return f"{processor}; {versions}; {threads}; load average {load:.1f} on {cores} cores at the end"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown; floats with three significant digits."""

    def cell(value: object) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"

    lines = [header, ["---"] * len(header), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def save(name: str, text: str, data: Any) -> None:
    """Prints the text and keeps it, with the data, under results/."""
    print(text)
    RESULTS.mkdir(exist_ok=True)
    write_text(text + "\n", RESULTS / f"{name}.md")
    write_json(data, RESULTS / f"{name}.json", indent=1)


def command(
    name: str,
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Any],
    report: Callable[[dict[str, Any], argparse.Namespace], str],
    repeats: int,
    suffix: Callable[[argparse.Namespace], str] = lambda args: "",
) -> None:
    """The main of a benchmark: measures under both allocators on a CPU, once elsewhere, with one thread, and
    saves the report.

    Args:
        name: of the module below benchmarks.speed and of the results.
        parser: with the benchmark's own options; --device, --repeats and --json are added.
        measure: args -> what is reported, JSON-able.
        report: ({allocator: measured}, args) -> Markdown.
        repeats: default of --repeats.
        suffix: args -> end of the results' name.
    """
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--json", action="store_true", help="measure in this process as it is and print JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.json:
        print(json.dumps(measure(args)))
        return
    results = (
        under_both_allocators(f"benchmarks.speed.{name}", sys.argv[1:])
        if args.device == "cpu"
        else {"": measure(args)}
    )
    save(f"{name}_{args.device}{suffix(args)}", report(results, args), results)
