"""What a training step costs: every method against a supervised step and against the floor of its own networks; where Diff-CL's goes.

    python -m benchmarks.speed.steps                       # left atrium at 2.5 mm, features/2, batch 2, one thread
    python -m benchmarks.speed.steps --device cuda --features 32 64 128 256 320 320 --patch 80 160 160 --strides 1 2 2 2 2 1,2,2

The floor of a method: all its forward and backward passes through networks of the planned shape, at the batches the method uses, and
nothing else. Everything is timed in one process, part after part in every round, medians over rounds; times are CPU seconds of this process
(on CUDA: wall time after a synchronisation), so that other load disturbs the ratios little. Data: nnU-Net's augmentation of the labeled
batch and the views of the unlabeled one, on random volumes.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from tqdm import tqdm

from nnssl.batch import SemiBatch
from nnssl.data.views import ViewTransform
from nnssl.labels import LabelSpace
from nnssl.method import Planned, SemiMethod
from nnssl.methods.diffcl import DiffCL, DiffCLConfig
from nnssl.methods.supervised import Supervised, SupervisedConfig
from nnssl.step import OptimizationStep

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

    def network(self, inputs: int = IMAGES, outputs: int = CLASSES) -> nn.Module:
        norm, relu = {"eps": 1e-5, "affine": True}, {"inplace": True}
        n = len(self.features)
        args: tuple[Any, ...] = (inputs, n, self.features, nn.Conv3d, 3, self.strides, 2, outputs, 2, True, nn.InstanceNorm3d, norm)
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
        )

    def semi_batch(self, views: int) -> SemiBatch:
        image = torch.randn(self.batch, IMAGES, *self.patch, device=self.device)
        smooth = nn.functional.interpolate(torch.randn(self.batch, 1, 4, 4, 4, device=self.device), self.patch, mode="trilinear")
        targets, stride = [], np.ones(3, dtype=int)
        for s in self.strides[:-1]:
            stride = stride * np.array(s)
            targets.append((smooth[:, :, :: stride[0], :: stride[1], :: stride[2]] > 0).short())
        return SemiBatch(
            image, targets, ("a", "b"), torch.randn_like(image), tuple(torch.randn_like(image) for _ in range(views)), ("u", "v")
        )


def synchronised_clock(device: torch.device) -> Callable[[], float]:
    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    return clock


def interleaved_medians(parts: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of every part; one warm-up round first."""
    clock = synchronised_clock(device)
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in tqdm(range(repeats + 1), desc="rounds"):
        for name, part in parts.items():
            start = clock()
            part()
            seconds[name].append(clock() - start)
    return {name: float(np.median(s[1:])) for name, s in seconds.items()}


def training_pass(network: nn.Module, context: Callable[[], Any], *inputs: torch.Tensor) -> None:
    """Forward and backward, no loss."""
    with context():
        outputs = network(*inputs)
        total = sum(o.sum() for o in (outputs if isinstance(outputs, list) else [outputs]))
    network.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[union-attr]


@torch.no_grad()
def forward_pass(network: nn.Module, context: Callable[[], Any], *inputs: torch.Tensor) -> None:
    with context():
        network(*inputs)


def full_step(method: SemiMethod, step: OptimizationStep, batch: SemiBatch) -> None:
    step.optimizer.zero_grad(set_to_none=True)
    weights = method.weights(0.5)
    with step.autocast():
        terms = method(batch, 0.5)
        loss = sum(weights[k] * terms[k] for k in terms)
    step.take(loss)  # type: ignore[arg-type]
    method.after_step(batch, 0.5)


def make(cls: type[SemiMethod], config: Any, setting: Setting) -> tuple[SemiMethod, OptimizationStep, SemiBatch]:
    planned = setting.planned()
    student = cls.adapt_network(setting.network(), config, planned.patch_size, planned.spacing)
    method = cls(student, config, planned).to(setting.device).train()
    method.make_copies()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 1e-3, momentum=0.99, nesterov=True)
    scaler = torch.amp.GradScaler("cuda") if setting.device.type == "cuda" and setting.amp == "float16" else None
    return method, OptimizationStep(optimizer, scaler, setting.amp, setting.device, 10**6), setting.semi_batch(cls.num_strong_views)


def data_parts(setting: Setting) -> dict[str, Callable[[], Any]]:
    """Augmentation of one labeled and one unlabeled batch, from cropped patches on."""
    initial = [round(p * 1.35) for p in setting.patch]
    rotation = (-np.pi / 6, np.pi / 6)
    scales = [[1 / v for v in np.cumprod(np.array(setting.strides), axis=0)[i]] for i in range(len(setting.strides) - 1)]
    stock = nnUNetTrainer.get_training_transforms(setting.patch, rotation, scales, (0, 1, 2), False, use_mask_for_norm=[False])
    views = ViewTransform(setting.patch, rotation, (0, 1, 2), False, 1)
    image, seg = torch.randn(IMAGES, *initial), torch.zeros(1, *initial, dtype=torch.int16)
    return {
        "labeled": lambda: [stock(image=image.clone(), segmentation=seg.clone()) for _ in range(setting.batch)],
        "unlabeled": lambda: [views(image.clone(), seg.clone()) for _ in range(setting.batch)],
    }


def measure(setting: Setting, ddim_steps: int, max_tokens: int, repeats: int) -> dict[str, float]:
    config = DiffCLConfig(ddim_steps=ddim_steps, hfm_max_tokens=max_tokens)
    no_hfm = DiffCLConfig(ddim_steps=ddim_steps, hfm_stages=0)
    supervised, diffcl, bare = (make(c, k, setting) for c, k in ((Supervised, SupervisedConfig()), (DiffCL, config), (DiffCL, no_hfm)))
    context = supervised[1].autocast
    image = torch.randn(setting.batch, IMAGES, *setting.patch, device=setting.device)
    noisy = torch.randn(setting.batch, IMAGES + CLASSES, *setting.patch, device=setting.device)
    student, branch, hfm_student = setting.network(), setting.network(IMAGES + CLASSES), diffcl[0].student
    both = torch.cat([image, image])
    seconds = interleaved_medians(
        {
            "supervised step": partial(full_step, *supervised),
            "Diff-CL step": partial(full_step, *diffcl),
            "Diff-CL step without HFM": partial(full_step, *bare),
            "supervised floor": partial(training_pass, student, context, image),
            "student, forward and backward": partial(training_pass, student, context, both),
            "student, weak forward": partial(forward_pass, student, context, image),
            "diffusion branch, forward and backward": partial(training_pass, branch, context, torch.cat([noisy, noisy])),
            "DDIM, one forward": partial(forward_pass, branch, context, noisy),
            "student with HFM, forward and backward": partial(training_pass, hfm_student, context, both),
            "student with HFM, weak forward": partial(forward_pass, hfm_student, context, image),
            **{f"data, {k}": v for k, v in data_parts(setting).items()},
        },
        repeats,
        setting.device,
    )
    seconds["DDIM"] = ddim_steps * seconds.pop("DDIM, one forward")
    seconds["HFM"] = sum(seconds.pop(f"student with HFM, {k}") - seconds[f"student, {k}"] for k in ("forward and backward", "weak forward"))
    return seconds


NETWORKS = ("student, forward and backward", "student, weak forward", "diffusion branch, forward and backward", "DDIM")


def report(s: dict[str, float], ddim_steps: int) -> str:
    floor = sum(s[k] for k in NETWORKS)
    step, bare, data = s["Diff-CL step"], s["Diff-CL step without HFM"], s["data, labeled"] + s["data, unlabeled"]
    lines = ["| step | ms | x supervised | floor, ms | overhead on the floor |", "|---|---|---|---|---|"]
    for name, value, base in (
        ("supervised", s["supervised step"], s["supervised floor"]),
        (f"Diff-CL, S = {ddim_steps}", step, floor),
        (f"Diff-CL without HFM, S = {ddim_steps}", bare, floor),
    ):
        lines.append(
            f"| {name} | {1e3 * value:.0f} | {value / s['supervised step']:.2f} | {1e3 * base:.0f} | {100 * (value / base - 1):.1f} % |"
        )
    lines += ["", "| part of a Diff-CL step | ms | share of the step |", "|---|---|---|"]
    rest = step - floor - s["HFM"]
    parts = {**{k: s[k] for k in NETWORKS}, "HFM": s["HFM"], "losses, views' mixing, averages, optimizer, rest": rest}
    lines += [f"| {k} | {1e3 * v:.0f} | {100 * v / step:.1f} % |" for k, v in parts.items()]
    streams = f"labeled {1e3 * s['data, labeled']:.0f}, unlabeled {1e3 * s['data, unlabeled']:.0f}"
    lines += [f"| data ({streams}; before the step) | {1e3 * data:.0f} | |"]
    outside = (bare - floor + data) / (bare + data)
    lines += ["", f"Outside the networks, without HFM, data included: {100 * outside:.1f} % of step and data."]
    return "\n".join(lines)


def parse_strides(texts: list[str]) -> list[list[int]]:
    return [[int(t)] * 3 if "," not in t else [int(v) for v in t.split(",")] for t in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--strides", nargs="+", default=["1", "2", "2", "1,2,2"])
    parser.add_argument("--patch", type=int, nargs=3, default=[24, 40, 48])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--spacing", type=float, default=2.5)
    parser.add_argument("--ddim-steps", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", default="float16", choices=["float16", "bfloat16", "float32"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    setting = Setting(args.features, parse_strides(args.strides), args.patch, args.batch, args.spacing, torch.device(args.device), args.amp)
    seconds = measure(setting, args.ddim_steps, args.max_tokens, args.repeats)
    text = report(seconds, args.ddim_steps)
    print(text)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    name = f"steps_{args.device}" + ("" if args.amp == "float16" else f"_{args.amp}")
    amp = args.amp if args.device == "cuda" or args.amp == "bfloat16" else "off"
    machine = f"torch {torch.__version__}, {platform.processor() or platform.machine()}, one thread"
    shape = f"patch {args.patch}, features {args.features}, batch {args.batch}, autocast {amp}"
    (folder / f"{name}.md").write_text(f"{machine}; {shape}\n\n{text}\n")
    (folder / f"{name}.json").write_text(json.dumps({"arguments": vars(args), "torch": torch.__version__, "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
