"""One view of nnU-Net's label spaces: softmax over classes or sigmoid per region, with or without an ignore
label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LabelSpace:
    """How logits (B, K, S) are read. S = (D, H, W) or (H, W).

    channels      K, the network's outputs: background and every class, or one per region
    has_regions   True: sigmoid per region (regions may overlap); False: softmax over dim 1
    ignore_label  label value without loss (nnU-Net's `ignore`), or None
    """

    channels: int
    has_regions: bool = False
    ignore_label: int | None = None

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K, S) float32 with gradient. (nnU-Net's apply_inference_nonlin is unbatched and runs under
        no_grad.)"""
        return torch.sigmoid(logits.float()) if self.has_regions else torch.softmax(logits.float(), dim=1)

    def harden(self, scores: Tensor) -> Tensor:
        """Pseudo-labels (B, K, S), float32 zeros and ones, without gradient, from probabilities or logits of
        softmax networks.

        Classes: one-hot argmax. Regions: p > 0.5 in each channel (so `scores` must be probabilities there).
        """
        scores = scores.detach()
        if self.has_regions:
            return (scores > 0.5).float()
        best = scores.max(1, keepdim=True).indices  # on CPU ten times as fast as argmax along this dimension
        return torch.zeros_like(scores, dtype=torch.float32).scatter_(1, best, 1.0)

    def confidence(self, probabilities: Tensor) -> Tensor:
        """(B, 1, S) from (B, K, S): that of the most probable class; of regions that of the least certain
        one, max(p, 1 - p)."""
        if self.has_regions:
            return torch.maximum(probabilities, 1 - probabilities).amin(1, keepdim=True)
        return probabilities.amax(1, keepdim=True)

    def encode(self, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Channels (B, K, S) in {0, 1} float32 and the mask (B, 1, S) of voxels that carry a label (None: all
        of them).

        Args:
            target: nnU-Net's target: label map (B, 1, S), or regions (B, K, S) plus a last channel for the
                ignore label.
        """
        if self.has_regions:
            if self.ignore_label is None:
                return target.float(), None
            mask = ~target[:, -1:].bool()
            return target[:, :-1].float() * mask, mask
        label: Tensor = target.long()
        if label.shape[1] != 1:
            raise ValueError(f"a label map of shape (B, 1, ...) was expected, found {tuple(target.shape)}")
        labeled = None if self.ignore_label is None else label != self.ignore_label
        if labeled is not None:
            label = torch.where(labeled, label, 0)
        channels = torch.zeros(label.shape[0], self.channels, *label.shape[2:], device=label.device).scatter_(
            1, label, 1.0
        )
        return (channels if labeled is None else channels * labeled), labeled

    def classes(self, channels: Tensor) -> Tensor:
        """Membership (K', B, S) bool of every class that owns prototypes, from zeros and ones (B, K, S).

        Classes: K' = K. Regions: K' = K + 1, the first is the complement of all regions (background).
        """
        member = channels.movedim(1, 0) > 0.5
        if self.has_regions:
            member = torch.cat([~member.any(0, keepdim=True), member])
        return member

    def class_probabilities(self, probabilities: Tensor) -> Tensor:
        """(K', B, S) from (B, K, S), in the order of `classes`; of the complement min_k (1 - p_k)."""
        p = probabilities.movedim(1, 0)
        return torch.cat([1 - p.amax(0, keepdim=True), p]) if self.has_regions else p

    @property
    def num_classes(self) -> int:
        """K' of `classes`."""
        return self.channels + int(self.has_regions)
