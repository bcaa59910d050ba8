"""What SemSim costs: memory and time of its refinement against the explicit matrix, and its step against the
floor of its networks.

    python -m benchmarks.speed.semsim                   # CPU, one thread, plain and tuned allocator
    python -m benchmarks.speed.semsim --device cuda

Refinement: one image, features (1, 128, N), 2 classes, forward and backward; peak is the memory in use during
the call beyond what was in use before it. Slopes are those of log time and log peak over log N.

Step, under both allocators: nnU-Net's plan for left atria of 2.5 mm at half its features, batch 2 + 2. Floor:
the same passes through the networks (labeled and first strong view through encoder and decoder, second strong
view through the encoder, forward and backward; the weak view forward only) and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.speed.steps import Setting, full_step, make, training_pass
from benchmarks.speed.timing import machine, medians, peak_bytes, save, table, under_both_allocators
from nnssl.losses.affinity import refine
from nnssl.method import inference
from nnssl.methods.semsim import SCALES, SemSim, SemSimConfig
from nnssl.methods.supervised import Supervised, SupervisedConfig
from nnssl.networks.dropout import forward_streams

WIDTH, CLASSES = 128, 2
FUSED = (2048, 4096, 8192, 16384, 32768)
MATRIX = FUSED[:3]  # each of its matrices takes 1 GiB at 16,384
ONCE = 16384  # tokens from which on one call is timed instead of several


def explicit(features: Tensor, probabilities: Tensor, scale: float) -> Tensor:
    """The same with the matrix M in memory."""
    unit = torch.nn.functional.normalize(features.mT, dim=-1)
    m = torch.softmax(scale * unit @ unit.mT, dim=-1)
    return (probabilities + (m @ probabilities.mT).mT) / 2


def refinements(repeats: int, device: torch.device) -> list[dict[str, Any]]:
    entries = []
    for n in FUSED:
        features = torch.randn(1, WIDTH, n, device=device, requires_grad=True)
        p = torch.rand(1, CLASSES, n, device=device).softmax(1)
        target = torch.rand_like(p)

        def call(
            operation: Callable[[Tensor, Tensor, float], Tensor],
            x: Tensor = features,
            p: Tensor = p,
            y: Tensor = target,
        ) -> None:
            torch.autograd.grad((operation(x, p, 20.0) - y).square().sum(), x)

        operations = {"fused": refine} | ({"matrix": explicit} if n in MATRIX else {})
        calls = {name: partial(call, operation) for name, operation in operations.items()}
        seconds = medians(calls, repeats if n < ONCE else 1, device)
        entries.append(
            {"tokens": n, "seconds": seconds, "peak": {k: peak_bytes(c, device) for k, c in calls.items()}}
        )
    return entries


def step(repeats: int, device: torch.device) -> dict[str, Any]:
    setting = Setting(
        [16, 32, 64, 128], [[1] * 3, [2] * 3, [2] * 3, [1, 2, 2]], [24, 40, 48], 2, 2.5, device, "float16"
    )
    supervised = make(Supervised, SupervisedConfig(), setting)
    semsim = make(SemSim, SemSimConfig(), setting)
    method, optimization, batch = cast(SemSim, semsim[0]), *semsim[1:]
    images = torch.cat([batch.labeled, *batch.strong])
    n, u = len(batch.labeled), len(batch.weak)
    skips = [s.detach() for s in forward_streams(method.student, images, decoded=n + u).skips][-SCALES:]

    def networks(decoded: int) -> None:
        """The strong features that are not decoded get their gradient from a sum."""
        with inference(method.student), optimization.autocast():
            forward_streams(method.student, batch.weak)
        with optimization.autocast():
            walked = forward_streams(method.student, images, decoded=decoded)
            tensors = [*walked.outputs, *(s[decoded:] for s in walked.skips[-SCALES:])]
            total = torch.stack([x.sum() for x in tensors]).sum()
        method.zero_grad(set_to_none=True)
        total.backward()

    def fusion() -> None:
        """Forward and backward of all images, and the weak view's forward pass."""
        with torch.no_grad(), optimization.autocast():
            method.fusion([s[:u] for s in skips])
        inputs = [s.clone().requires_grad_() for s in skips]
        with optimization.autocast():
            e = method.fusion(inputs)
        e.sum().backward()

    grid = math.prod(method.grid)
    e = torch.randn(u, method.config.width, grid, device=device, requires_grad=True)
    p = torch.rand(u, CLASSES, grid, device=device).softmax(1)

    def intra() -> None:
        with torch.no_grad():
            refine(e, p, 20.0)
        refine(e, p, 20.0).square().sum().backward()

    parts: dict[str, Callable[[], Any]] = {
        "supervised step": partial(full_step, *supervised),
        "SemSim step": partial(full_step, *semsim),
        "supervised floor": partial(
            training_pass, supervised[0].student, optimization.autocast, batch.labeled
        ),
        "networks of SemSim": partial(networks, n + u),
        "networks, all views decoded": partial(networks, n + 2 * u),
        "fusion": fusion,
        "refinement": intra,
    }
    return {"seconds": medians(parts, repeats, device), "plan": method.describe(), "machine": machine(device)}


def slope(tokens: list[int], values: list[float]) -> float:
    """Of log values over log tokens, least squares."""
    x, y = ([math.log(v) for v in column] for column in (tokens, values))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def report(steps: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    whole_rows, rows, slopes = [], [], []
    for allocator, result in steps.items():
        s = result["seconds"]
        floor, whole = s["networks of SemSim"], s["SemSim step"]
        parts = (
            s["supervised step"],
            whole,
            floor,
            s["fusion"],
            s["refinement"],
            whole - floor - s["fusion"] - s["refinement"],
        )
        beyond = [f"{100 * (whole / f - 1):.1f} %" for f in (floor, s["networks, all views decoded"])]
        ratios = [f"{whole / s['supervised step']:.2f}x", *beyond]
        whole_rows.append([allocator, *(1e3 * v for v in parts), *ratios])
    for name in ("fused", "matrix"):
        measured = [e for e in entries if name in e["seconds"]]
        rows += [[name, e["tokens"], 1e3 * e["seconds"][name], e["peak"][name] / 2**20] for e in measured]
        tokens = [e["tokens"] for e in measured]
        slopes.append(
            [name, *(f"{slope(tokens, [e[key][name] for e in measured]):.2f}" for key in ("seconds", "peak"))]
        )
    header = [
        "allocator",
        "supervised step, ms",
        "SemSim step, ms",
        "networks, ms",
        "fusion, ms",
        "refinement, ms",
        "rest, ms",
    ]
    first = next(iter(steps.values()))
    return "\n\n".join(
        [
            first["machine"],
            first["plan"],
            table(
                [*header, "to supervised", "beyond networks", "beyond networks that decode all views"],
                whole_rows,
            ),
            table(["refinement", "tokens", "forward + backward, ms", "peak, MiB"], rows),
            table(["refinement", "slope of time", "slope of peak"], slopes),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--json", action="store_true", help="measure the step in this process as it is and print JSON"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    if args.json:
        print(json.dumps(step(args.repeats, device)))
        return
    entries = refinements(min(args.repeats, 3), device)
    if args.device == "cpu":
        steps = under_both_allocators("benchmarks.speed.semsim", ["--repeats", str(args.repeats)])
    else:
        steps = {"": step(args.repeats, device)}
    save(f"semsim_{args.device}", report(steps, entries), {"steps": steps, "refinements": entries})


if __name__ == "__main__":
    main()
