"""The state-space mixer against mambapy's block, mamba-ssm's kernels (CUDA) and the plain recurrence; forward
and backward.

    python -m benchmarks.speed.ssm    # CPU, one thread, plain and tuned allocator; needs mambapy
    python -m benchmarks.speed.ssm --device cuda

Batch 2, state 16, expand 2. mambapy's block is Mamba-1 with its parallel scan in PyTorch, what people fall
back to where mamba-ssm does not build; ours is Mamba-2: the same task at the same widths, not the same
function.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.speed.timing import command, machine, medians, peak_bytes, table
from nnssl.ssm import Mamba2Mixer, available_backends, ssd_scan
from tests.reference.ssm import sequential_scan

BATCH, STATE = 2, 16
SCAN_LENGTHS = (128, 512, 2048)


def training_pass(mixer: nn.Module, length: int, width: int, device: torch.device) -> Callable[[], None]:
    mixer = mixer.to(device)
    x = torch.randn(BATCH, length, width, device=device, requires_grad=True)

    def call() -> None:
        mixer.zero_grad()
        x.grad = None
        mixer(x).square().mean().backward()

    return call


def mixers(length: int, width: int, repeats: int, device: torch.device) -> dict[str, Any]:
    from mambapy.mamba import MambaBlock, MambaConfig

    torch.manual_seed(0)
    blocks: dict[str, nn.Module] = {
        "mambapy": MambaBlock(
            MambaConfig(d_model=width, n_layers=1, d_state=STATE, expand_factor=2, pscan=True)
        ),
        "nnssl": Mamba2Mixer(width, STATE, expand=2, backend="torch"),
    }
    if device.type == "cuda" and available_backends()[1].usable:
        blocks["mamba_ssm"] = Mamba2Mixer(width, STATE, expand=2, backend="mamba_ssm")
    calls = {name: training_pass(block, length, width, device) for name, block in blocks.items()}
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    return {"length": length, "width": width, "seconds": medians(calls, repeats, device), "bytes": peaks}


def scans(length: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """The scan alone, 2 heads of 32 channels, against the loop over tokens."""
    g = torch.Generator().manual_seed(0)
    shapes = (
        (BATCH, length, 2, 32),
        (BATCH, length, 2),
        (2,),
        (BATCH, length, 1, STATE),
        (BATCH, length, 1, STATE),
        (2,),
    )
    x, dt, A, B, C, D = (torch.rand(shape, generator=g).to(device) for shape in shapes)
    inputs = [v.requires_grad_() for v in (x, 0.1 * dt, -A, B, C, D)]

    def call(scan: Callable[..., torch.Tensor]) -> None:
        torch.autograd.grad(scan(*inputs).sum(), inputs)

    calls = {"loop over tokens": partial(call, sequential_scan), "nnssl": partial(call, ssd_scan)}
    return {"length": length, "seconds": medians(calls, repeats, device)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    shapes = [(length, width) for length in args.lengths for width in args.widths]
    return {
        "mixers": [mixers(length, width, args.repeats, device) for length, width in shapes],
        "scans": [scans(length, args.repeats, device) for length in SCAN_LENGTHS],
        "machine": machine(device, "mambapy"),
    }


def report(results: dict[str, Any]) -> str:
    names = list(next(iter(results.values()))["mixers"][0]["seconds"])
    rows, short = [], []
    for allocator, result in results.items():
        for entry in result["mixers"]:
            seconds, peak = entry["seconds"], entry["bytes"]
            measured = [value for name in names for value in (1e3 * seconds[name], peak[name] / 2**20)]
            ratios = [f"{of['mambapy'] / of['nnssl']:.1f}x" for of in (seconds, peak)]
            rows.append([allocator, f"{entry['length']} x {entry['width']}", *measured, *ratios])
        for entry in result["scans"]:
            loop, ours = entry["seconds"]["loop over tokens"], entry["seconds"]["nnssl"]
            short.append([allocator, entry["length"], 1e3 * loop, 1e3 * ours, f"{loop / ours:.0f}x"])
    units = [f"{name}, {unit}" for name in names for unit in ("ms", "MiB")]
    blocks = [
        table(
            ["allocator", "length x width", *units, "mambapy / nnssl, time", "mambapy / nnssl, memory"], rows
        )
    ]
    blocks.append(
        table(["allocator", "scan alone, length", "loop over tokens, ms", "nnssl, ms", "ratio"], short)
    )
    return "\n\n".join([next(iter(results.values()))["machine"], *blocks])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64])
    command("ssm", parser, measure, lambda results, args: report(results), 5)


if __name__ == "__main__":
    main()
