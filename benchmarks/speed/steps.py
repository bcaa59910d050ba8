"""What a training step costs: every method against a supervised step and against the floor of its own
networks; where Diff-CL's goes.

    python -m benchmarks.speed.steps    # left atrium plan at 2.5 mm, batch 2, one thread
    python -m benchmarks.speed.steps --methods DiffCL CAML
    python -m benchmarks.speed.steps --device cuda --features 32 64 128 256 320 320 \\
        --patch 80 160 160 --strides 1 2 2 2 2 1,2,2

The floor of a method: all its forward and backward passes through networks of the planned shape, at the
batches the method uses, and nothing else. Everything is timed in one process, part after part in every round,
medians over rounds (benchmarks/speed/timing.py).

Data: nnU-Net's augmentation of the labeled batch and the views of the unlabeled one, on random volumes.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from benchmarks.speed.timing import command, machine, medians, peak_bytes, table
from nnssl.batch import SemiBatch, UnlabeledBatch
from nnssl.data.views import ViewTransform
from nnssl.labels import LabelSpace
from nnssl.method import Planned, SemiMethod, weighted_sum
from nnssl.methods.diffcl import DiffCLConfig
from nnssl.networks.upsampling import interpolate_instead_of_transposing
from nnssl.training.agreement import EVERY, Agreement
from nnssl.training.optimizer_step import OptimizationStep

CLASSES, IMAGES = 2, 1


@dataclass(frozen=True)
class Setting:
    """A planned network and its batch, without a dataset."""

    features: list[int]
    strides: list[list[int]]
    patch: list[int]
    batch: int
    spacing: float
    device: torch.device
    amp: str

    def network(self, inputs: int = IMAGES, outputs: int = CLASSES, divisor: int = 1) -> nn.Module:
        norm, relu = {"eps": 1e-5, "affine": True}, {"inplace": True}
        n = len(self.features)
        args: tuple[Any, ...] = (
            inputs,
            n,
            [width // divisor for width in self.features],
            nn.Conv3d,
            3,
            self.strides,
            2,
            outputs,
            2,
            True,
            nn.InstanceNorm3d,
            norm,
        )
        net = PlainConvUNet(*args, None, None, nn.LeakyReLU, relu, deep_supervision=True)
        return net.apply(net.initialize).to(self.device)

    def planned(self) -> Planned:
        scales = len(self.features) - 1
        weights = np.array([0.5**i for i in range(scales - 1)] + [0.0])
        loss = DC_and_CE_loss({"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}, {})
        return Planned(
            build_network=self.network,
            input_channels=IMAGES,
            labels=LabelSpace(CLASSES),
            patch_size=tuple(self.patch),
            spacing=(self.spacing,) * 3,
            supervised_loss=DeepSupervisionWrapper(loss, weights / weights.sum()),
            labeled_cases=("a", "b"),
            unlabeled_cases=("u", "v"),
            mirror_axes=(0, 1, 2),
        )

    def semi_batch(self, views: int) -> SemiBatch:
        image = torch.randn(self.batch, IMAGES, *self.patch, device=self.device)
        smooth = nn.functional.interpolate(
            torch.randn(self.batch, 1, 4, 4, 4, device=self.device), self.patch, mode="trilinear"
        )
        targets, stride = [], np.ones(3, dtype=int)
        for s in self.strides[:-1]:
            stride = stride * np.array(s)
            targets.append((smooth[:, :, :: stride[0], :: stride[1], :: stride[2]] > 0).short())
        return SemiBatch(
            image,
            targets,
            ("a", "b"),
            UnlabeledBatch(
                torch.randn_like(image), tuple(torch.randn_like(image) for _ in range(views)), ("u", "v")
            ),
        )


@dataclass(frozen=True)
class Row:
    """A step that is measured. floor: how often each of `passes` runs in it; t: progress at which it is
    taken; section: nnssl's config."""

    method: str  # module of nnssl.methods
    floor: dict[str, int]
    t: float = 0.5
    section: dict[str, Any] | None = None


def rows(ddim_steps: int, max_tokens: int) -> dict[str, Row]:
    diffcl = {"ddim_steps": ddim_steps, "hfm_max_tokens": max_tokens}
    diffcl_floor = {"train 2B": 1, "infer B": 1, "train branch B": 1, "infer branch B": ddim_steps}
    one_teacher = {"train 2B": 1, "infer B": 1}
    return {
        "Supervised": Row("supervised", {"train B": 1}),
        "DiffCL": Row("diffcl", diffcl_floor, section=diffcl),
        "DiffCL without HFM": Row("diffcl", diffcl_floor, section=diffcl | {"hfm_stages": 0}),
        "CAML": Row(
            "caml", {"train 2B": 1, "train interpolating 2B": 1, "infer B": 1, "infer interpolating 2B": 1}
        ),
        "SemSim": Row("semsim", {"train 3B": 1, "infer B": 1}),
        "ACTION, phase 3": Row("action", one_teacher, t=0.9),
        "FixMatch": Row("fixmatch", one_teacher),
        "FilterMatch": Row("filtermatch", one_teacher),
        "Semi": Row("semi", one_teacher),
        "MeanTeacher": Row("mean_teacher", one_teacher),
        "UAMT": Row("uamt", {"train 2B": 1, "infer B": 9}),
        "CPS": Row("cps", {"train 2B": 2, "infer B": 2}),
        "BCP": Row("bcp", one_teacher),
        "MCNet": Row("mcnet", {"train 2B": 1, "train interpolating decoder 2B": 1}),
    }


def passes(setting: Setting, context: Callable[[], Any]) -> dict[str, Callable[[], None]]:
    """Forward (and backward) of networks of the planned shape; B: the batch."""
    student, branch = setting.network(), setting.network(IMAGES + CLASSES)
    interpolating = interpolate_instead_of_transposing(setting.network())
    image = torch.randn(setting.batch, IMAGES, *setting.patch, device=setting.device)
    noisy = torch.randn(setting.batch, IMAGES + CLASSES, *setting.patch, device=setting.device)
    with torch.no_grad():
        skips = [x.requires_grad_() for x in interpolating.encoder(torch.cat([image, image]))]
    return {
        "train B": partial(training_pass, student, context, image),
        "train 2B": partial(training_pass, student, context, torch.cat([image] * 2)),
        "train 3B": partial(training_pass, student, context, torch.cat([image] * 3)),
        "infer B": partial(forward_pass, student, context, image),
        "train branch B": partial(training_pass, branch, context, noisy),
        "infer branch B": partial(forward_pass, branch, context, noisy),
        "train interpolating 2B": partial(training_pass, interpolating, context, torch.cat([image] * 2)),
        "infer interpolating 2B": partial(forward_pass, interpolating, context, torch.cat([image] * 2)),
        "train interpolating decoder 2B": partial(training_pass, interpolating.decoder, context, skips),
    }


def training_pass(network: nn.Module, context: Callable[[], Any], *inputs: Any) -> None:
    """Forward and backward, no loss."""
    with context():
        outputs = network(*inputs)
        total = torch.stack([o.sum() for o in (outputs if isinstance(outputs, list) else [outputs])]).sum()
    network.zero_grad(set_to_none=True)
    total.backward()


@torch.no_grad()
def forward_pass(network: nn.Module, context: Callable[[], Any], *inputs: torch.Tensor) -> None:
    with context():
        network(*inputs)


def full_step(method: SemiMethod, step: OptimizationStep, batch: SemiBatch, t: float = 0.5) -> None:
    """What the trainer does with a batch."""
    step.optimizer.zero_grad(set_to_none=True)
    method.before_step(t)
    weights = method.weights(t)
    with step.autocast():
        terms = method(batch, t)
        loss = weighted_sum(terms, weights)
    step.take(loss)
    method.after_step(batch, t)


def method_class(module: str) -> type[SemiMethod]:
    """The method of nnssl.methods.`module`."""
    found = importlib.import_module(f"nnssl.methods.{module}")
    return next(
        c
        for c in vars(found).values()
        if isinstance(c, type) and issubclass(c, SemiMethod) and c.__module__ == found.__name__
    )


def make(
    cls: type[SemiMethod], config: Any, setting: Setting
) -> tuple[SemiMethod, OptimizationStep, SemiBatch]:
    planned = setting.planned()
    student = cls.adapt_network(setting.network(), config, planned.patch_size, planned.spacing)
    method = cls(student, config, planned).to(setting.device).train()
    method.make_copies()
    optimizer = torch.optim.SGD(
        [p for p in method.parameters() if p.requires_grad], 1e-3, momentum=0.99, nesterov=True
    )
    scaler = (
        torch.amp.GradScaler("cuda") if setting.device.type == "cuda" and setting.amp == "float16" else None
    )
    return (
        method,
        OptimizationStep(optimizer, scaler, setting.amp, setting.device, 10**6),
        setting.semi_batch(cls.num_strong_views),
    )


def agreement_measurement(setting: Setting) -> Callable[[], None]:
    """Both gradients on the last decoder stage, of a graph that is kept."""
    cls = method_class("semi")
    method, _, batch = make(cls, cls.config_class(), setting)
    agreement, weights = Agreement(method), method.weights(0.5)
    return partial(agreement.measure, method(batch, 0.5), weights)


def data_parts(setting: Setting) -> dict[str, Callable[[], Any]]:
    """Augmentation of one labeled and one unlabeled batch, from cropped patches on."""
    initial = [round(p * 1.35) for p in setting.patch]
    rotation = (-np.pi / 6, np.pi / 6)
    scales = [
        [1 / v for v in np.cumprod(np.array(setting.strides), axis=0)[i]]
        for i in range(len(setting.strides) - 1)
    ]
    stock = nnUNetTrainer.get_training_transforms(
        setting.patch, rotation, scales, (0, 1, 2), False, use_mask_for_norm=[False]
    )
    views = ViewTransform(setting.patch, rotation, (0, 1, 2), False, 1)
    image, seg = torch.randn(IMAGES, *initial), torch.zeros(1, *initial, dtype=torch.int16)
    return {
        "labeled": lambda: [
            stock(image=image.clone(), segmentation=seg.clone()) for _ in range(setting.batch)
        ],
        "unlabeled": lambda: [views(image.clone(), seg.clone()) for _ in range(setting.batch)],
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    device = torch.device(args.device)
    setting = Setting(
        args.features, parse_strides(args.strides), args.patch, args.batch, args.spacing, device, args.amp
    )
    chosen = {
        k: r
        for k, r in rows(args.ddim_steps, args.max_tokens).items()
        if k in ("Supervised", *args.methods) or not args.methods
    }
    steps, networks = {}, {}
    for name, row in chosen.items():
        cls = method_class(row.method)
        built = make(cls, cls.config_class(**(row.section or {})), setting)
        steps[name], networks[name] = partial(full_step, *built, row.t), built[0].student
        context = built[1].autocast
    needed = {p for row in chosen.values() for p in row.floor}
    parts: dict[str, Callable[[], Any]] = {k: p for k, p in passes(setting, context).items() if k in needed}
    if "DiffCL" in chosen:
        image = torch.randn(setting.batch, IMAGES, *setting.patch, device=device)
        parts["train HFM 2B"] = partial(training_pass, networks["DiffCL"], context, torch.cat([image] * 2))
        parts["infer HFM B"] = partial(forward_pass, networks["DiffCL"], context, image)
    if "Semi" in chosen:
        parts["agreement"] = agreement_measurement(setting)
    parts |= {f"data, {k}": v for k, v in data_parts(setting).items()}
    tile = torch.randn(1, IMAGES, *setting.patch, device=device)
    parts["prediction of a tile"] = partial(forward_pass, networks["Supervised"].eval(), context, tile)
    seconds = medians({**{f"step {k}": v for k, v in steps.items()}, **parts}, args.repeats, device)
    peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
    return {
        "seconds": seconds,
        "peaks": peaks,
        "machine": machine(device),
        "floors": {k: r.floor for k, r in chosen.items()},
    }


def report(results: dict[str, Any], args: argparse.Namespace) -> str:
    amp = args.amp if args.device == "cuda" or args.amp == "bfloat16" else "off"
    network = f"patch {args.patch}, features {args.features}, batch {args.batch}"
    shape = f"{network}, autocast {amp}, DDIM steps {args.ddim_steps}"
    lines, split, data = [], [], []
    for allocator, result in results.items():
        s, floors = result["seconds"], result["floors"]
        supervised, data_both = s["step Supervised"], s["data, labeled"] + s["data, unlabeled"]
        for name, passes_of in floors.items():
            floor, value = sum(n * s[p] for p, n in passes_of.items()), s[f"step {name}"]
            content = ", ".join(p if n == 1 else f"{n} x {p}" for p, n in passes_of.items())
            over, outside = (
                f"{100 * (value / floor - 1):.1f} %",
                f"{100 * (1 - floor / (value + data_both)):.1f} %",
            )
            peak = result["peaks"][name] / 2**20
            lines.append(
                [
                    allocator,
                    name,
                    1e3 * value,
                    f"{value / supervised:.2f}",
                    content,
                    1e3 * floor,
                    over,
                    outside,
                    peak,
                ]
            )
        if "step DiffCL" in s:
            split += [[allocator, *line] for line in diffcl_parts(s, floors["DiffCL"])]
        data.append(
            [
                allocator,
                1e3 * s["data, labeled"],
                1e3 * s["data, unlabeled"],
                f"{100 * data_both / supervised:.1f} %",
            ]
        )
        data[-1].append(1e3 * s["prediction of a tile"])
    parts = [next(iter(results.values()))["machine"] + "; " + shape]
    header = [
        "allocator",
        "step",
        "ms",
        "x supervised",
        "floor",
        "floor, ms",
        "overhead on the floor",
        "outside the floor, with data",
        "peak, MiB",
    ]
    parts.append(table(header, lines))
    if measured := [r["seconds"] for r in results.values() if "agreement" in r["seconds"]]:
        shares = ", ".join(f"{s['agreement'] / EVERY / s['step Supervised']:.3f}" for s in measured)
        parts.append(
            f"The key agreement adds {shares} supervised steps per step on average, in Semi: one "
            f"measurement in {EVERY} steps."
        )
    if split:
        parts.append(table(["allocator", "part of a Diff-CL step", "ms", "share of the step"], split))
    names = [
        "labeled batch, ms",
        "unlabeled batch, ms",
        "both to a supervised step",
        "prediction of a tile, ms",
    ]
    parts.append("Augmentation, before the step, and inference:\n\n" + table(["allocator", *names], data))
    return "\n\n".join(parts)


def diffcl_parts(s: dict[str, float], floor: dict[str, int]) -> list[list[Any]]:
    parts = {p: n * s[p] for p, n in floor.items()}
    parts["HFM"] = s["train HFM 2B"] - s["train 2B"] + s["infer HFM B"] - s["infer B"]
    step = s["step DiffCL"]
    parts["losses, mixing of views, optimizer, rest"] = step - sum(parts.values())
    return [[k, 1e3 * v, f"{100 * v / step:.1f} %"] for k, v in parts.items()]


def parse_strides(texts: list[str]) -> list[list[int]]:
    return [[int(t)] * 3 if "," not in t else [int(v) for v in t.split(",")] for t in texts]


def suffix(args: argparse.Namespace) -> str:
    """Of the table's name: a run of single methods or in another precision leaves the whole table as it
    is."""
    return "".join(f"_{part}" for part in ([] if args.amp == "float16" else [args.amp]) + args.methods)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods", nargs="+", default=[], help="steps to measure beside the supervised one (default: all)"
    )
    parser.add_argument("--features", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--strides", nargs="+", default=["1", "2", "2", "1,2,2"])
    parser.add_argument("--patch", type=int, nargs=3, default=[24, 40, 48])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--spacing", type=float, default=2.5)
    parser.add_argument("--ddim-steps", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=DiffCLConfig.hfm_max_tokens)
    parser.add_argument("--amp", default="float16", choices=["float16", "bfloat16", "float32"])
    command("steps", parser, measure, report, 5, suffix)


if __name__ == "__main__":
    main()
