"""`python -m benchmarks.leaderboard.launch PARENT USAGE MODULE:FUNCTION ARGUMENTS...`: one nnU-Net command in
a process of its own.

It runs with one thread (nnU-Net's `-device cpu` asks for one per core), ends when the process PARENT does,
however that ended, and adds what it used to the file USAGE, a JSON object per line.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import resource
import sys
import threading
import time


def end_with(parent: int) -> None:
    """Leave at once when the process `parent` is gone: nobody would take the result, and the next run must
    find the folder at rest."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def predict_in_bfloat16() -> None:
    """`nnUNetv2_predict` on a CPU in the precision of the training: in float32 PyTorch takes a slow routine
    for batches of one tile."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point

    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        predict_entry_point()


def main() -> None:
    parent, usage, target, *arguments = sys.argv[1:]
    threading.Thread(target=end_with, args=(int(parent),), daemon=True).start()
    multiprocessing.cpu_count = lambda: 1
    sys.argv = arguments
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)()
    peak = {"peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak["peak_gpu_memory_mb"] = torch.cuda.max_memory_reserved() // 2**20
    with open(usage, "a", encoding="utf-8") as file:
        file.write(json.dumps(peak) + "\n")


if __name__ == "__main__":
    main()
