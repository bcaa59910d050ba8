"""One of nnU-Net's commands, or of ours, in a process of its own that keeps to so many cores.

    python -m nnssl.commands.launch --cores N MODULE:FUNCTION COMMAND ARGUMENTS...

nnU-Net's `-device cpu` asks for a thread per core of the machine, whatever a container may use.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Sequence


def launcher(cores: int, parent: int | None = None, usage: str | None = None) -> list[str]:
    """What comes before MODULE:FUNCTION COMMAND ARGUMENTS...

    parent  the command ends when this process, which starts it, is gone, however that ended
    usage   file to which the finished command adds what it used: one JSON object per line
    """
    options = [
        *(["--parent", str(parent)] if parent is not None else []),
        *(["--usage", usage] if usage is not None else []),
    ]
    return [sys.executable, "-m", "nnssl.commands.launch", "--cores", str(cores), *options]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nnssl.commands.launch", allow_abbrev=False)
    parser.add_argument("--cores", type=int, required=True)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--usage")
    parser.add_argument("entry", metavar="MODULE:FUNCTION")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(arguments)
    if args.parent is not None:
        threading.Thread(target=_end_with, args=(args.parent,), daemon=True).start()
    multiprocessing.cpu_count = lambda: args.cores
    sys.argv = args.command
    module, _, function = args.entry.partition(":")
    status = getattr(importlib.import_module(module), function)() or 0
    if args.usage is not None:
        with open(args.usage, "a", encoding="utf-8") as file:
            file.write(json.dumps(_used()) + "\n")
    return status


def _end_with(parent: int) -> None:
    """Leave at once when the parent is gone: nobody would take the result, and the next run must find the
    folder at rest."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _used() -> dict[str, int]:
    """Peak memory of this process and of its GPU; processor time with that of its children."""
    import resource

    used = {
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "cpu_seconds": round(sum(os.times()[:4])),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        used["peak_gpu_memory_mb"] = torch.cuda.max_memory_reserved() // 2**20
    return used


if __name__ == "__main__":
    sys.exit(main())
