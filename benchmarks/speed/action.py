"""What ACTION's anatomical contrast costs against the published algorithm, and its representation at sampled
voxels against full maps.

    python -m benchmarks.speed.action                # CPU, one thread, plain and tuned allocator
    python -m benchmarks.speed.action --device cuda

Contrast: embeddings (4, 128, 56, 56, 40), 256 queries per class, 512 negatives each, forward and backward;
"published" restates the public algorithm (tests/reference/action.py).

Representation: decoder maps of four scales, 64 channels each, one volume of 56 x 56 x 40; up-sampled,
concatenated and convolved at full resolution (3x3x3 then 1x1x1 as published, or 1x1x1 twice) against one
linear map at the sampled voxels: 256 queries with gradient and 4096 candidates without, per class.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.timing import command, machine, medians, peak_bytes, table
from nnssl.losses.anatomical import anatomical_contrast
from nnssl.sampling import gather_interpolated, gather_voxels
from tests.reference import action as published

BATCH, EMBEDDING, GRID = 4, 128, (56, 56, 40)
CLASSES = (2, 4)
SCALES, CHANNELS = ((7, 7, 5), (14, 14, 10), (28, 28, 20), (56, 56, 40)), 64
QUERIES, CANDIDATES = 2 * 256, 2 * 4096
FORMS = ("published", "exact", "shared")


def contrast_inputs(classes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings, one-hot labels in blobs, mask of confident voxels, probabilities; half of the voxels are
    hard."""
    torch.manual_seed(0)
    scores = F.interpolate(torch.randn(BATCH, classes, 7, 7, 5), GRID, mode="trilinear")
    label = F.one_hot(scores.argmax(1), classes).movedim(-1, 1).float()
    embeddings = torch.randn(BATCH, EMBEDDING, *GRID)
    probabilities = torch.where(torch.rand(BATCH, 1, *GRID) < 0.5, 0.99, 0.6).expand_as(label)
    mask = (torch.rand(BATCH, 1, *GRID) < 0.9).float()
    return embeddings.to(device).requires_grad_(), label.to(device), mask.to(device), probabilities.to(device)


def contrast(classes: int, repeats: int, device: torch.device) -> dict[str, Any]:
    embeddings, label, mask, probabilities = contrast_inputs(classes, device)

    member = (label * mask).movedim(1, 0).flatten(1) > 0.5
    hard = (probabilities < 0.97).movedim(1, 0).flatten(1)
    losses: dict[str, Callable[[], Tensor]] = {
        "published": lambda: published.anatomical_contrast(embeddings, label, mask, probabilities),
        "exact": lambda: published.exact_anatomical_contrast(embeddings, member, hard),
        "shared": lambda: anatomical_contrast(partial(gather_voxels, embeddings), member, hard),
    }
    calls = {
        name: partial(lambda loss: torch.autograd.grad(loss(), embeddings), loss)
        for name, loss in losses.items()
    }
    return {
        "classes": classes,
        "loss": {name: loss().item() for name, loss in losses.items()},
        "seconds": medians(calls, repeats, device),
        "peak": {name: peak_bytes(call, device) for name, call in calls.items()},
    }


def representation(repeats: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    maps = [torch.randn(1, CHANNELS, *s, device=device, requires_grad=True) for s in SCALES]
    width = CHANNELS * len(SCALES)
    heads = {
        "3x3x3 + 1x1x1, full resolution": nn.Sequential(
            nn.Conv3d(width, EMBEDDING, 3, padding=1), nn.Conv3d(EMBEDDING, EMBEDDING, 1)
        ),
        "1x1x1 + 1x1x1, full resolution": nn.Sequential(
            nn.Conv3d(width, EMBEDDING, 1), nn.Conv3d(EMBEDDING, EMBEDDING, 1)
        ),
        "linear, sampled voxels": nn.Linear(width, EMBEDDING),
    }
    voxels = torch.Size(GRID).numel()
    query, candidate = (torch.randint(voxels, (n,), device=device) for n in (QUERIES, CANDIDATES))

    def full(head: nn.Module) -> None:
        x = torch.cat([F.interpolate(m, GRID, mode="trilinear", align_corners=False) for m in maps], 1)
        y = head(x)
        grad = torch.zeros_like(y)  # that of the queries alone: whatever uses the map samples from it
        grad.flatten(2)[0, :, query] = 1.0
        torch.autograd.grad(y, [*maps, *head.parameters()], grad)

    def sampled(head: nn.Module) -> None:
        def at(index: Tensor) -> Tensor:
            return head(torch.cat([gather_interpolated(m, index, GRID) for m in maps], -1))

        with torch.no_grad():
            at(candidate)
        y = at(query)
        torch.autograd.grad(y, [*maps, *head.parameters()], torch.ones_like(y))

    calls = {
        n: partial(sampled if isinstance(h, nn.Linear) else full, h.to(device)) for n, h in heads.items()
    }
    return {
        "seconds": medians(calls, repeats, device),
        "peak": {name: peak_bytes(call, device) for name, call in calls.items()},
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    contrasts = [contrast(classes, args.repeats, device) for classes in CLASSES]
    return {
        "contrasts": contrasts,
        "representation": representation(args.repeats, device),
        "machine": machine(device),
    }


def report(results: dict[str, Any]) -> str:
    contrasts, heads = [], []
    for allocator, result in results.items():
        for entry in result["contrasts"]:
            s, peak = entry["seconds"], entry["peak"]
            for form in FORMS:
                ratio, memory = f"{s['published'] / s[form]:.1f}x", f"{peak[form] / peak['published']:.2f}"
                cells = [1e3 * s[form], ratio, peak[form] / 1e6, memory, f"{entry['loss'][form]:.3f}"]
                contrasts.append([allocator, entry["classes"], form, *cells])
        s, peak = result["representation"]["seconds"], result["representation"]["peak"]
        slowest = next(iter(s))
        heads += [
            [allocator, name, 1e3 * s[name], f"{s[slowest] / s[name]:.1f}x", peak[name] / 1e6] for name in s
        ]
    header = [
        "allocator",
        "classes",
        "contrast",
        "ms",
        "faster",
        "extra memory, MB",
        "of published",
        "loss (random)",
    ]
    head_header = ["allocator", "representation", "ms", "faster", "extra memory, MB"]
    return "\n\n".join(
        [next(iter(results.values()))["machine"], table(header, contrasts), table(head_header, heads)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command("action", parser, measure, lambda results, args: report(results), 3)


if __name__ == "__main__":
    main()
