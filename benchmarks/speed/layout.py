"""What the configuration key `channels_last` is worth: supervised step, and prediction of a tile as in the
validation after a training.

    python -m benchmarks.speed.layout    # left atrium at 2.5 mm, batch 2, one thread, both allocators
    python -m benchmarks.speed.layout --device cuda --amps float16 --widths 32 --patch 80 160 160

Widths are features of the first stage; they double from stage to stage. It and PyTorch's default format are
timed in turns in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.speed.steps import IMAGES, Setting, forward_pass, full_step, make
from benchmarks.speed.timing import command, machine, medians, table
from nnssl.methods.supervised import Supervised, SupervisedConfig
from nnssl.training.memory_format import use_channels_last

FORMATS = {"default": False, "channels_last": True}
STRIDES = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [1, 2, 2]]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    device, seconds = torch.device(args.device), {}
    tile = torch.randn(1, IMAGES, *args.patch, device=device)
    for width in args.widths:
        for amp in args.amps:
            setting = Setting(
                [width * 2**i for i in range(len(STRIDES))], STRIDES, args.patch, args.batch, 2.5, device, amp
            )
            calls: dict[str, Callable[[], None]] = {}
            for name, last in FORMATS.items():
                method, step, batch = make(Supervised, SupervisedConfig(), setting)
                if last:
                    use_channels_last(method, len(args.patch))
                calls[f"step {name}"] = partial(full_step, method, step, batch)
                calls[f"tile {name}"] = torch.no_grad()(
                    partial(forward_pass, method.student, step.autocast, tile)
                )
            seconds[f"{width} {amp}"] = medians(calls, args.repeats, device)
    return {"seconds": seconds, "machine": machine(device)}


def report(results: dict[str, Any], args: argparse.Namespace) -> str:
    lines = []
    for allocator, result in results.items():
        for setting, s in result["seconds"].items():
            values = [[1e3 * s[f"{part} {name}"] for name in FORMATS] for part in ("step", "tile")]
            lines.append(
                [allocator, *setting.split(), *(cell for a, b in values for cell in (a, b, f"{b / a:.2f}"))]
            )
    header = ["allocator", "features of stage 0", "amp"]
    header += [
        f"{part}, {unit}"
        for part in ("step", "tile")
        for unit in ("default, ms", "channels_last, ms", "ratio")
    ]
    first = next(iter(results.values()))["machine"]
    return f"{first}; patch {args.patch}, batch {args.batch}\n\n{table(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument(
        "--amps", nargs="+", default=["float32", "bfloat16"], choices=["float16", "bfloat16", "float32"]
    )
    parser.add_argument("--patch", type=int, nargs=3, default=[24, 40, 48])
    parser.add_argument("--batch", type=int, default=2)
    command("layout", parser, measure, report, 7)


if __name__ == "__main__":
    main()
