"""What one training step sees: named, frozen, shapes written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Target = Tensor | list[Tensor]


@dataclass(frozen=True)
class SemiBatch:
    """One labeled and one unlabeled batch. S = (D, H, W) in 3D, (H, W) in 2D.

    labeled         (B, C, S) float32, nnU-Net's augmented patches
    target          (B, 1, S) label map, or (B, R, S) per region (plus a last channel for the ignore label);
                    with deep supervision a list of these, finest first
    labeled_cases   B case names
    weak            (U, C, S) float32: spatial transform only; None without an unlabeled stream
    strong          K views (U, C, S) of the same geometry, intensities transformed independently: voxels
                    correspond
    unlabeled_cases U case names
    """

    labeled: Tensor
    target: Target
    labeled_cases: Sequence[str]
    weak: Tensor = None  # type: ignore[assignment]
    strong: tuple[Tensor, ...] = ()
    unlabeled_cases: Sequence[str] = ()

    @classmethod
    def from_loader(cls, batch: dict, device: torch.device) -> SemiBatch:
        """From the dictionaries of nnU-Net's loader and of `UnlabeledLoader` (under `unlabeled`), moved to
        `device`."""

        def move(x: Target) -> Target:
            if isinstance(x, list):
                return [i.to(device, non_blocking=True) for i in x]
            return x.to(device, non_blocking=True)

        unlabeled = batch.get("unlabeled")
        return cls(
            labeled=move(batch["data"]),  # type: ignore[arg-type]
            target=move(batch["target"]),
            labeled_cases=tuple(str(k) for k in batch["keys"]),
            weak=None if unlabeled is None else move(unlabeled["weak"]),  # type: ignore[arg-type]
            strong=() if unlabeled is None else tuple(move(s) for s in unlabeled["strong"]),  # type: ignore[misc]
            unlabeled_cases=() if unlabeled is None else tuple(str(k) for k in unlabeled["keys"]),
        )

    def full_target(self) -> Tensor:
        """The full-resolution target, whether or not there is deep supervision."""
        return self.target[0] if isinstance(self.target, list) else self.target
