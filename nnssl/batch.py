"""What one training step sees: named, frozen, shapes written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Target = Tensor | list[Tensor]


@dataclass(frozen=True)
class UnlabeledBatch:
    """U unlabeled patches.

    weak     (U, C, S) float32: spatial transform only
    strong   K views (U, C, S) of the same geometry, intensities transformed independently: voxels correspond
    cases    U case names
    """

    weak: Tensor
    strong: tuple[Tensor, ...]
    cases: Sequence[str]


@dataclass(frozen=True)
class SemiBatch:
    """One labeled and one unlabeled batch. S = (D, H, W) in 3D, (H, W) in 2D.

    labeled         (B, C, S) float32, nnU-Net's augmented patches
    target          (B, 1, S) label map, or (B, R, S) per region (plus a last channel for the ignore label);
                    with deep supervision a list of these, finest first
    labeled_cases   B case names
    unlabeled       None without an unlabeled stream; `weak`, `strong` and `unlabeled_cases` are its parts
    """

    labeled: Tensor
    target: Target
    labeled_cases: Sequence[str]
    unlabeled: UnlabeledBatch | None = None

    @classmethod
    def from_loader(cls, batch: dict, device: torch.device) -> SemiBatch:
        """From the dictionaries of nnU-Net's loader and of `UnlabeledLoader` (under `unlabeled`), moved to
        `device`."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        target, unlabeled = batch["target"], batch.get("unlabeled")
        return cls(
            labeled=move(batch["data"]),
            target=[move(x) for x in target] if isinstance(target, list) else move(target),
            labeled_cases=tuple(str(k) for k in batch["keys"]),
            unlabeled=None
            if unlabeled is None
            else UnlabeledBatch(
                weak=move(unlabeled["weak"]),
                strong=tuple(move(s) for s in unlabeled["strong"]),
                cases=tuple(str(k) for k in unlabeled["keys"]),
            ),
        )

    @property
    def weak(self) -> Tensor:
        return self._unlabeled().weak

    @property
    def strong(self) -> tuple[Tensor, ...]:
        return self._unlabeled().strong

    @property
    def unlabeled_cases(self) -> Sequence[str]:
        return self._unlabeled().cases

    def _unlabeled(self) -> UnlabeledBatch:
        if self.unlabeled is None:
            raise RuntimeError(
                "this batch has no unlabeled part: a method that reads one needs `needs_unlabeled = True`"
            )
        return self.unlabeled

    def full_target(self) -> Tensor:
        """The full-resolution target, whether or not there is deep supervision."""
        return self.target[0] if isinstance(self.target, list) else self.target
