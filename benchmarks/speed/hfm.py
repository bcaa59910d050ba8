"""What HFM costs: its high-pass against a convolution, and planned networks with it against the same without.

    python -m benchmarks.speed.hfm                   # CPU, one thread, plain and tuned allocator
    python -m benchmarks.speed.hfm --device cuda

High-pass: features (2, 32, *grid), forward and backward, relative to one 3x3x3 convolution 32 -> 32 on them;
separable (what HFM uses) and by rfftn with the same box as a mask (also the price of any other mask).

Networks: nnU-Net's plan for left atria of 2.5 mm at half its features; HFM's stage follows from the limit of
its tokens. Layouts: the block alone on contiguous and on channels_last features.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn

from benchmarks.speed.timing import command, machine, medians, peak_bytes, table
from nnssl.networks.hf_mamba import HighFrequencyMamba, box_radii, describe_hfm, high_pass, insert_hfm

GRIDS = ((12, 20, 24), (16, 32, 32), (24, 40, 48), (33, 47, 29))
CUTOFFS = (0.25, 0.5)
PATCH, SPACING, FEATURES, STRIDES = (
    (24, 40, 48),
    (2.5, 2.5, 2.5),
    [16, 32, 64, 128],
    [[1, 1, 1], [2, 2, 2], [2, 2, 2], [1, 2, 2]],
)
TOKEN_LIMITS = (4096, 32768)


def outside_box(grid: tuple[int, ...], radii: tuple[int, ...], device: torch.device) -> Tensor:
    """Mask of rfftn's indices."""
    inside = torch.ones(*grid[:-1], grid[-1] // 2 + 1, dtype=torch.bool, device=device)
    for axis, (n, radius) in enumerate(zip(grid, radii, strict=True)):
        index = torch.arange(inside.shape[axis], device=device)
        inside &= (torch.minimum(index, n - index) <= radius).view(
            [-1 if a == axis else 1 for a in range(len(grid))]
        )
    return ~inside


def high_passes(grid: tuple[int, ...], cutoff: float, repeats: int, device: torch.device) -> dict[str, Any]:
    x = torch.randn(2, 32, *grid, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    convolution = nn.Conv3d(32, 32, 3, padding=1).to(device)
    spacing, axes = (1.0,) * len(grid), (2, 3, 4)
    mask = outside_box(grid, box_radii(grid, spacing, cutoff), device)
    operations: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]] = {
        "convolution": (convolution, [x, *convolution.parameters()]),
        "separable": (lambda v: high_pass(v, spacing, cutoff), [x]),
        "rfftn": (lambda v: torch.fft.irfftn(torch.fft.rfftn(v, dim=axes) * mask, s=grid, dim=axes), [x]),
    }

    def call(operation: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> None:
        torch.autograd.grad(operation(x), inputs, grad)

    calls = {name: partial(call, *operation) for name, operation in operations.items()}
    return {"grid": grid, "cutoff": cutoff, "seconds": medians(calls, repeats, device)}


def planned_network(device: torch.device) -> nn.Module:
    norm, relu = {"eps": 1e-5, "affine": True}, {"inplace": True}
    sizes: tuple[Any, ...] = (1, len(FEATURES), FEATURES, nn.Conv3d, 3, STRIDES, 2, 2, 2)
    network = PlainConvUNet(
        *sizes, True, nn.InstanceNorm3d, norm, None, None, nn.LeakyReLU, relu, deep_supervision=True
    )
    return network.to(device)


def networks(repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a pass of 2 patches forward and backward, and of a prediction of 1 tile as large as the
    patch."""
    candidates = {"planned": planned_network(device)}
    for limit in TOKEN_LIMITS:
        network = insert_hfm(planned_network(device), PATCH, SPACING, max_tokens=limit)
        for name, parameter in network.named_parameters():
            if name.endswith("hfm.gate"):
                nn.init.ones_(parameter)
        candidates[describe_hfm(network, PATCH)] = network
    patches = torch.randn(2, 1, *PATCH, device=device)

    def train(network: nn.Module) -> None:
        network.zero_grad()
        torch.stack([y.square().mean() for y in network(patches)]).sum().backward()

    @torch.inference_mode()
    def predict(network: nn.Module) -> None:
        network(patches[:1])

    trained = {name: partial(train, network) for name, network in candidates.items()}
    predicted = {name: partial(predict, network) for name, network in candidates.items()}
    peaks = {name: peak_bytes(call, device) for name, call in trained.items()}
    return {
        "training": medians(trained, repeats, device),
        "prediction": medians(predicted, repeats, device),
        "peaks": peaks,
    }


def layouts(channels: int, grid: tuple[int, ...], repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds of one block, forward and backward on 2 patches, for both memory formats of its features and
    their gradient."""
    block = HighFrequencyMamba(channels, [1.0] * len(grid)).to(device)
    nn.init.ones_(block.gate)
    x, grad = torch.randn(2, channels, *grid, device=device), torch.randn(2, channels, *grid, device=device)

    def call(memory_format: torch.memory_format) -> None:
        inputs = x.to(memory_format=memory_format).requires_grad_()
        torch.autograd.grad(
            block(inputs), [inputs, *block.parameters()], grad.to(memory_format=memory_format)
        )

    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}
    return {
        "channels": channels,
        "grid": grid,
        "seconds": medians({k: partial(call, f) for k, f in formats.items()}, repeats, device),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    blocks = [layouts(64, (6, 10, 12), args.repeats, device), layouts(32, (12, 20, 24), args.repeats, device)]
    passes = [high_passes(grid, cutoff, args.repeats, device) for grid in GRIDS for cutoff in CUTOFFS]
    return {
        "high_passes": passes,
        "layouts": blocks,
        "networks": networks(args.repeats, device),
        "machine": machine(device),
    }


def report(results: dict[str, Any]) -> str:
    filters, whole, blocks = [], [], []
    for allocator, result in results.items():
        for entry in result["high_passes"]:
            s, grid = entry["seconds"], " x ".join(map(str, entry["grid"]))
            relative = [f"{s[k] / s['convolution']:.2f}" for k in ("separable", "rfftn")]
            filters.append(
                [allocator, grid, f"{entry['cutoff']:g}", *(1e3 * v for v in s.values()), *relative]
            )
        for entry in result["layouts"]:
            s, grid = entry["seconds"], " x ".join(map(str, entry["grid"]))
            blocks.append(
                [allocator, f"{entry['channels']} channels, {grid}", *(1e3 * v for v in s.values())]
            )
        training, prediction = result["networks"]["training"], result["networks"]["prediction"]
        for name in training:
            ratios = [f"{t[name] / t['planned']:.2f}x" for t in (training, prediction)]
            peak = result["networks"]["peaks"][name] / 2**20
            whole.append(
                [allocator, name, 1e3 * training[name], ratios[0], peak, 1e3 * prediction[name], ratios[1]]
            )
    header = [
        "allocator",
        "grid",
        "cutoff",
        "convolution, ms",
        "separable, ms",
        "rfftn, ms",
        "separable / convolution",
        "rfftn / convolution",
    ]
    network_header = [
        "allocator",
        "network",
        "training pass, ms",
        "to planned",
        "its peak, MiB",
        "prediction of a tile, ms",
        "to planned",
    ]
    voxels = math.prod(PATCH)
    shape = f"Networks: features {FEATURES}, patch {' x '.join(map(str, PATCH))} = {voxels} voxels."
    block_table = table(["allocator", "block alone", "contiguous, ms", "channels_last, ms"], blocks)
    return "\n\n".join(
        [
            next(iter(results.values()))["machine"],
            table(header, filters),
            block_table,
            shape,
            table(network_header, whole),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command("hfm", parser, measure, lambda results, args: report(results), 7)


if __name__ == "__main__":
    main()
