"""Memory and time of a training step: predicted from the plan (nnssl/training/cost.py) against measured; and
the smallest card that the default plan of every trainer is predicted to fit.

    python -m benchmarks.speed.cost            # both, on one CPU thread; --known: go on, keep what is there
    python -m benchmarks.speed.cost --cards    # the table of cards alone, without measuring

Measured memory is resident memory at its peak in three steps beyond that before the networks were built, in a
process that gives freed memory back at once. Measured time is processor time of a step, the median of two
behind the first. It is compared with two estimates: a supervised step of the same setting, measured, times
the ratio of the floating-point operations; and a step with half the patch, measured, times the ratio of
voxels, as `nnssl check` does it where a trial of the whole patch would take too long.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.timing import RESULTS, machine, save, table
from nnssl.commands.trainers import list_trainers, trainers_folder
from nnssl.files import read_json, write_json
from nnssl.training.cost import GIB, SAVINGS, Cost, Rehearsal, halved, predict

MIB = 2**20
AS_IT_IS = "as it is"
# nnU-Net's default plans of the left atrium (1.25 mm) and of ACDC at half resolution
LEFT_ATRIUM = {
    "patch": [48, 80, 96],
    "batch": 3,
    "features": [32, 64, 128, 256, 320],
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]],
    "classes": 1,
}
SMALL_3D = LEFT_ATRIUM | {"patch": [32, 48, 64], "batch": 2, "features": [16, 32, 64, 128, 160]}
SMALL_2D = {
    "patch": [96, 96],
    "batch": 8,
    "features": [16, 32, 64, 128, 256],
    "strides": [[1, 1], [2, 2], [2, 2], [2, 2], [2, 2]],
    "classes": 3,
}
SETTINGS = {"3D": SMALL_3D, "2D": SMALL_2D}
MEASURED: list[tuple[str, str, dict[str, Any]]] = [
    ("Supervised", "3D", {}),
    ("Semi", "3D", {}),
    ("CPS", "3D", {}),
    ("Supervised", "2D", {}),
    ("FixMatch", "2D", {}),
    ("ACTION", "2D", {}),
    ("CPS", "3D", {"gradient_checkpointing": "all"}),
    ("Semi", "3D", {"unlabeled_batch_size": 1}),
    ("SemSim", "3D", {}),
    ("CAML", "3D", {}),
    ("DiffCL", "3D", {}),
]


def plan(setting: dict[str, Any], **nnssl: Any) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Plans file, configuration and dataset.json of a setting."""
    dim = len(setting["patch"])
    stages, configuration = len(setting["features"]), "3d_fullres" if dim == 3 else "2d"
    conv = f"torch.nn.modules.conv.Conv{dim}d"
    network = {
        "n_stages": stages,
        "features_per_stage": setting["features"],
        "conv_op": conv,
        "kernel_sizes": [[3] * dim] * stages,
        "strides": setting["strides"],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": network,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    plans = {
        "dataset_name": "Dataset000_Cost",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "configurations": {
            configuration: {
                "data_identifier": configuration,
                "batch_size": setting["batch"],
                "patch_size": setting["patch"],
                "spacing": [1.25] * 3,
                "batch_dice": dim == 2,
                "architecture": architecture,
            }
        },
        "nnssl": nnssl,
    }
    labels = {"background": 0, **{f"class {k}": k for k in range(1, setting["classes"] + 1)}}
    names = {"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}
    return plans, configuration, {**names, "labels": labels, "numTraining": 8}


def trainer_class(name: str) -> type:
    return getattr(importlib.import_module(f"nnssl_trainers.nnUNetTrainer{name}"), f"nnUNetTrainer{name}")


def predicted(name: str, setting: dict[str, Any], device: str, **nnssl: Any) -> Cost:
    return predict(trainer_class(name), *plan(setting, **nnssl), device)


def measure(name: str, setting: dict[str, Any], **nnssl: Any) -> dict[str, float]:
    """Peak bytes and seconds of a step; in a process of its own."""
    torch.set_num_threads(1)
    # the libraries' own memory does not count: they are loaded by steps of a tiny network
    tiny = {**setting, "patch": [32] * len(setting["patch"]), "features": [4] * len(setting["features"])}
    warm_up: Any = Rehearsal(trainer_class(name), *plan(tiny, **nnssl), "cpu")
    for _ in range(2):
        warm_up.step()
    warm_up = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the high-water mark
    plans, configuration, dataset_json = plan(setting, **nnssl)
    seconds = _seconds(name, plans, configuration, dataset_json)
    peak = _resident("VmHWM") - before
    patch, half = halved(plans, configuration)
    ratio = math.prod(patch) / math.prod(half["configurations"][configuration]["patch_size"])
    return {
        "peak": peak,
        "seconds": seconds,
        "from_half": ratio * _seconds(name, half, configuration, dataset_json),
    }


def _seconds(name: str, plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> float:
    """Processor time of a step."""
    rehearsal = Rehearsal(trainer_class(name), plans, configuration, dataset_json, "cpu")
    seconds = []
    for _ in range(3):
        start = time.process_time()
        rehearsal.step()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def measured(name: str, kind: str, nnssl: dict[str, Any]) -> dict[str, float]:
    """`measure` in a process whose allocator keeps nothing that was freed."""
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
        "nnUNet_compile": "f",
    }
    command = [sys.executable, "-m", "benchmarks.speed.cost", "--measure", name, kind, json.dumps(nnssl)]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(output.splitlines()[-1])


def accuracy(known: list[dict[str, Any]]) -> dict[str, Any]:
    """Predicted and measured; what is `known` is predicted anew, but not measured."""
    rows, left = list[dict[str, Any]](), list(known)
    for name, kind, nnssl in MEASURED:
        cost = predicted(name, SETTINGS[kind], "cpu", **nnssl)
        same = [r for r in known if (r["trainer"], r["plan"], r["nnssl"]) == (name, kind, nnssl)]
        costs = (
            {"peak": same[0]["measured"], **{key: same[0][key] for key in ("seconds", "from_half")}}
            if same
            else measured(name, kind, nnssl)
        )
        rows.append(
            {"trainer": name, "plan": kind, "nnssl": nnssl, "predicted": cost.peak, "flops": cost.flops}
        )
        rows[-1] |= {"measured": costs["peak"], **{key: costs[key] for key in ("seconds", "from_half")}}
        print(rows[-1], file=sys.stderr, flush=True)
        left = [r for r in left if r not in same]
        found = {"rows": [*rows, *left], "machine": machine(torch.device("cpu"))}
        write_json(found, RESULTS / "cost_cpu.json", indent=1)
    return {**found, "rows": rows}


def accuracy_table(found: dict[str, Any]) -> str:
    base = {r["plan"]: r for r in reversed(found["rows"]) if r["trainer"] == "Supervised"}
    lines = []
    for r in found["rows"]:
        seconds = base[r["plan"]]["seconds"] * r["flops"] / base[r["plan"]]["flops"]
        lines.append(
            [
                r["trainer"] + "".join(f", {k} {v}" for k, v in r["nnssl"].items()),
                r["plan"],
                r["predicted"] / MIB,
                r["measured"] / MIB,
                f"{100 * (r['predicted'] / r['measured'] - 1):+.1f} %",
                r["seconds"],
                seconds,
                f"{100 * (seconds / r['seconds'] - 1):+.0f} %",
                r["from_half"],
                f"{100 * (r['from_half'] / r['seconds'] - 1):+.0f} %",
            ]
        )
    header = [
        "trainer",
        "plan",
        "predicted, MiB",
        "measured, MiB",
        "error",
        "measured, s",
        "by operations, s",
        "error",
        "by half the patch, s",
        "error",
    ]
    return table(header, lines)


def accuracy_report(found: dict[str, Any]) -> str:
    settings = "; ".join(f"{k}: {v}" for k, v in SETTINGS.items())
    return f"{found['machine']}\n\n{accuracy_table(found)}\n\nPlans: {settings}"


def cards(known: dict[str, Any]) -> dict[str, Any]:
    """Cost of a step on a GPU at the left atrium's default plan, as it is and with each measure, per trainer.

    known: what is not predicted again.
    """
    found = dict(known)
    for name in sorted(list_trainers(trainers_folder())):
        short = name.removeprefix("nnUNetTrainer")
        if short in found:
            continue
        found[short] = {
            key: dataclasses.asdict(predicted(short, LEFT_ATRIUM, "cuda", **changes))
            for key, changes in {AS_IT_IS: {}, **SAVINGS}.items()
        }
        print(short, file=sys.stderr, flush=True)
        found = dict(sorted(found.items()))
        write_json(found, RESULTS / "cost_cards.json", indent=1)
    return found


def cards_table(found: dict[str, Any]) -> str:
    """Per trainer: GiB of a card, and the smallest card that is sold; times a supervised step."""
    base, checkpointed = found["Supervised"][AS_IT_IS]["flops"], list(SAVINGS)[1]
    lines = []
    for name, costs in found.items():
        line = [name]
        for values in costs.values():
            cost = Cost(**values)
            line.append(f"{cost.card / GIB:.1f} ({cost.smallest_card} GB)")
        line += [f"{costs[key]['flops'] / base:.1f}" for key in (AS_IT_IS, checkpointed)]
        lines.append(line)
    keys = [
        f"`{key}`".replace('"gradient_checkpointing": ', "").replace(" and ", "` and `") for key in SAVINGS
    ]
    return table(["trainer", AS_IT_IS, *keys, "time, x supervised", 'time with `"all"`'], lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cards", action="store_true", help="the table of cards alone")
    parser.add_argument("--known", action="store_true", help="keep what is in the results already")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, kind, nnssl = args.measure
        print(json.dumps(measure(name, SETTINGS[kind], **json.loads(nnssl))))
        return
    if not args.cards:
        path = RESULTS / "cost_cpu.json"
        found = accuracy(read_json(path)["rows"] if args.known and path.is_file() else [])
        save("cost_cpu", accuracy_report(found), found)
    path = RESULTS / "cost_cards.json"
    fitting = cards(read_json(path) if args.known and path.is_file() else {})
    save("cost_cards", f"{cards_table(fitting)}\n\nPlan: {LEFT_ATRIUM}", fitting)


if __name__ == "__main__":
    main()
