"""Small networks, plans and batches shared by the tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import nn

from nnssl.batch import SemiBatch, UnlabeledBatch
from nnssl.distributed import world_size
from nnssl.labels import LabelSpace
from nnssl.method import Planned, SemiMethod
from nnssl.training.ignore_label import without_waiting

M = TypeVar("M", bound=SemiMethod)

FEATURES = (4, 6, 8)
STRIDES = (1, 2, 2)


@dataclass(frozen=True)
class Task:
    """One combination that a method must cope with."""

    dim: int = 3
    channels: int = 2  # network outputs
    images: int = 1  # image channels, with those of a cascade's previous stage
    previous: int = 0  # of these the last ones, one-hot
    regions: bool = False
    ignore: bool = False
    residual: bool = False
    deep_supervision: bool = True

    @property
    def labels(self) -> LabelSpace:
        return LabelSpace(self.channels, self.regions, self.channels if self.ignore else None)

    @property
    def patch_size(self) -> tuple[int, ...]:
        return (8, 12, 16)[-self.dim :]

    def network(self, inputs: int | None = None, outputs: int | None = None, divisor: int = 1) -> Any:
        """A planned network: an nn.Module with encoder and decoder."""
        conv = nn.Conv3d if self.dim == 3 else nn.Conv2d
        norm = nn.InstanceNorm3d if self.dim == 3 else nn.InstanceNorm2d
        cls = ResidualEncoderUNet if self.residual else PlainConvUNet
        net = cls(
            self.images if inputs is None else inputs,
            3,
            [width // divisor for width in FEATURES],
            conv,
            3,
            [[s] * self.dim for s in STRIDES],
            1,
            self.channels if outputs is None else outputs,
            1,
            True,
            norm,
            {"eps": 1e-5, "affine": True},
            None,
            None,
            nn.LeakyReLU,
            {"inplace": True},
            deep_supervision=self.deep_supervision,
        )
        net.apply(net.initialize)
        return net

    def loss(self) -> Any:
        if self.regions:
            loss: nn.Module = DC_and_BCE_loss(
                {},
                {"batch_dice": True, "do_bg": True, "smooth": 1e-5, "ddp": world_size() > 1},
                use_ignore_label=self.ignore,
            )
        else:
            soft_dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": world_size() > 1}
            loss = DC_and_CE_loss(soft_dice, {}, ignore_label=self.labels.ignore_label)
        return without_waiting(
            DeepSupervisionWrapper(loss, (2 / 3, 1 / 3)) if self.deep_supervision else loss
        )

    def planned(self, **kwargs: Any) -> Planned:
        return Planned(
            build_network=self.network,
            input_channels=self.images,
            labels=self.labels,
            patch_size=self.patch_size,
            spacing=(1.0,) * self.dim,
            supervised_loss=self.loss(),
            labeled_cases=("case_0", "case_1"),
            unlabeled_cases=("u_0", "u_1"),
            mirror_axes=tuple(range(self.dim)),
            previous=self.previous,
            **kwargs,
        )

    def method(self, cls: type[M], config: Any, seed: int = 0) -> M:
        torch.manual_seed(seed)
        student = cls.adapt_network(self.network(), config, self.patch_size, (1.0,) * self.dim)
        method = cls(student, config, self.planned())
        method.make_copies()
        return method.train()

    def label_map(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Blobs rather than noise: (n, 1, S) int16, every class present, some voxels ignored where the task
        ignores."""
        coarse = [max(2, s // 4) for s in self.patch_size]
        num = self.channels + 1 if self.regions else self.channels
        field = torch.rand((n, num, *coarse), generator=generator)
        label = nn.functional.interpolate(
            field, self.patch_size, mode="trilinear" if self.dim == 3 else "bilinear"
        ).argmax(1, keepdim=True)
        if self.ignore:
            label[..., :2] = num
        return label.to(torch.int16)

    def target(self, label: torch.Tensor) -> torch.Tensor:
        if not self.regions:
            return label
        regions = [
            (label >= k + 1) & (label <= self.channels) for k in range(self.channels)
        ]  # nested regions
        if self.ignore:
            regions.append(label == self.channels + 1)
        return torch.cat(regions, 1)

    def batch(self, labeled: int = 2, unlabeled: int = 2, views: int = 2, seed: int = 0) -> SemiBatch:
        g = torch.Generator().manual_seed(seed)
        label = self.label_map(labeled, g)
        image = label.float() + 0.3 * torch.randn(label.shape, generator=g)
        images = torch.cat([image * (c + 1) for c in range(self.images)], 1)
        target: Any = self.target(label)
        if self.deep_supervision:
            half = [s // 2 for s in self.patch_size]
            target = [
                target,
                nn.functional.interpolate(target.float(), half, mode="nearest-exact").to(target.dtype),
            ]
        weak = torch.randn((unlabeled, self.images, *self.patch_size), generator=g)
        strong = tuple(weak + 0.1 * torch.randn(weak.shape, generator=g) for _ in range(views))
        if self.previous:
            for x in (images, weak, *strong):
                x[:, -self.previous :] = (x[:, -self.previous :] > 0.5).float()
        cases = ("case_0", "case_1")[:labeled]
        return SemiBatch(images, target, cases, UnlabeledBatch(weak, strong, ("u_0", "u_1")[:unlabeled]))


def with_unlabeled(batch: SemiBatch, **parts: Any) -> SemiBatch:
    """The batch with other parts of its unlabeled half: weak, strong, cases."""
    assert batch.unlabeled is not None
    return replace(batch, unlabeled=replace(batch.unlabeled, **parts))


def gradient(x: torch.Tensor) -> torch.Tensor:
    """x.grad, which must be there."""
    assert x.grad is not None
    return x.grad


def put(owner: Any, **attributes: Any) -> None:
    """Functions of a test in the place of an object's own."""
    for name, value in attributes.items():
        setattr(owner, name, value)
