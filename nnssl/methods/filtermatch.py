"""nnFilterMatch (arXiv 2509.19746): self-training within the step, turned patches, nnU-Net's whole loss.

    L   = L_sup(f([x_l, R x_u]), [y_l, R y_u])        one loss over both, at every deep supervision scale
    y_u = argmax f(x_u), at every scale, without threshold
    before t = t_pre:  L = L_sup(f(x_l), y_l)

f    student, the planned network; deployed
x_u  weak view of unlabeled patches; y_u carries no gradient
R    one to three quarter turns in the plane of the last two axes, from t_mirror on mirrorings, too; a draw
     per sample, alike for image and labels
At intervals the unlabeled scans of the lowest summed entropy of f(x_u) leave the pool for good: they are the
ones that have nothing left to teach.

Differs from the public code (ours): no intensity transforms of x_u, whose geometry is the perturbation; a
plane that is not square turns by 180 degrees only; no turn amounts to a mirroring that `mirror_axes` forbids;
entropy is averaged over the patches seen since the last interval; patches of a scan that has left give way to
others of the same batch, for the stream goes on drawing them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nnssl.batch import SemiBatch, Target
from nnssl.config import Config, PositiveShare, Share
from nnssl.distributed import sum_over_ranks, world_size
from nnssl.method import Outputs, SemiMethod, full_resolution, inference
from nnssl.orientations import Orientation, apply_each, random_orientation, square_planes


@dataclass(frozen=True)
class FilterMatchConfig(Config):
    # t_pre: share of the training on labels alone (nnFilterMatch: 5 to 20 of 300 epochs)
    pretrain_fraction: Share = 1 / 15
    # t_mirror: share of the training after which R mirrors, too (nnFilterMatch: epoch 100 of 300)
    mirror_from: Share = 1 / 3
    filter_every: PositiveShare = 1 / 6  # share of the training between two choices among the scans (ours)
    filter_share: Share = 0.15  # share of the pool that leaves at each choice; 0: all stay (nnFilterMatch)


class FilterMatch(SemiMethod):
    name = "FilterMatch"
    config_class = FilterMatchConfig
    meaning: ClassVar[Mapping[str, str]] = {
        "joint": "nnU-Net's loss of the student on labeled patches and on turned unlabeled patches "
        "with the student's own labels, in one.",
    }
    config: FilterMatchConfig
    num_strong_views = 0
    per_case: ClassVar[Mapping[str, tuple[str, int]]] = {
        key: ("unlabeled", 0) for key in ("left", "entropy", "seen")
    }

    left: Tensor
    entropy: Tensor
    seen: Tensor

    def build(self) -> None:
        planned = self.planned
        self.case_index = {case: i for i, case in enumerate(planned.unlabeled_cases)}
        n = len(self.case_index)
        self.register_buffer("left", torch.zeros(n, dtype=torch.bool))  # scans outside the pool
        self.register_buffer("entropy", torch.zeros(n))  # sum over the patches seen since the last choice
        self.register_buffer("seen", torch.zeros(n))  # their number
        self.pending: tuple[Tensor, Tensor] | None = None
        self._last_step: int | None = None  # that changed a weight, in this process
        self._outside: set[str] | None = set()  # names of `left` on the host; None: to be read

    def describe(self) -> str:
        """What will not act here."""
        said, allowed, cases = [], self.planned.mirror_axes, len(self.case_index)
        if not self.may_turn:
            still = f"before {self.config.mirror_from:.0%} of the training" if allowed else "ever"
            said.append(f"mirror_axes {list(allowed)} let no patch be turned, so none is moved {still}")
        if self.config.filter_share and int(self.config.filter_share * cases) == 0:
            share = f"filter_share {self.config.filter_share:g}"
            said.append(f"of {cases} unlabeled scans none will leave: {share} of them is less than one")
        return "; ".join(said)

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        kept = [i for i, case in enumerate(batch.unlabeled_cases) if case not in self.outside()]
        if t < self.config.pretrain_fraction or not kept:
            return {"joint": self.labeled_loss(batch, alone=t < self.config.pretrain_fraction)}
        kept = [kept[i % len(kept)] for i in range(len(batch.weak))]
        with inference(self.student):
            outputs = self.student(batch.weak)
        self.pending = self.scan_entropies(full_resolution(outputs), batch)
        turns = [self.orientation(batch.weak.ndim - 2, t) for _ in kept]
        chosen = indices(kept, batch.weak.device)
        images = torch.cat([batch.labeled, apply_each(batch.weak[chosen], turns)])
        target = self.joint_target(batch, outputs, chosen, turns)
        return {"joint": self.supervised_loss(self.student(images), target)}

    def labeled_loss(self, batch: SemiBatch, alone: bool) -> Tensor:
        """L_sup(f(x_l), y_l). Other ranks may go on with unlabeled patches, and all exchange sums of one
        shape: then labeled ones take their places."""
        images, target = batch.labeled, batch.target
        if not alone and world_size() > 1:
            extra = indices([i % len(images) for i in range(len(batch.weak))], images.device)
            images = torch.cat([images, images[extra]])
            scales = target if isinstance(target, list) else [target]
            scales = [torch.cat([y, y[extra]]) for y in scales]
            target = scales if isinstance(target, list) else scales[0]
        return self.supervised_loss(self.student(images), target)

    def weights(self, t: float) -> dict[str, float]:
        return {"joint": 1.0}

    def joint_target(
        self, batch: SemiBatch, outputs: Outputs, kept: Tensor, turns: list[Orientation]
    ) -> Target:
        """[y_l, R y_u] in nnU-Net's form, at every scale.

        outputs: f(x_u); kept: indices of the samples of x_u; turns: R of each.
        """

        def joint(target: Tensor, logits: Tensor) -> Tensor:
            pseudo = apply_each(self.as_target(logits)[kept], turns)
            return torch.cat([target, pseudo.to(target.dtype)])

        if isinstance(batch.target, list):
            return [joint(y, z) for y, z in zip(batch.target, outputs, strict=True)]
        return joint(batch.target, full_resolution(outputs))

    def as_target(self, logits: Tensor) -> Tensor:
        """Hard predictions as nnU-Net's target: label map (U, 1, S), or regions (U, R, S) and an empty ignore
        channel."""
        if not self.labels.has_regions:
            return logits.max(1, keepdim=True).indices
        regions = self.labels.harden(self.probabilities(logits))
        if self.labels.ignore_label is None:
            return regions
        return torch.cat([regions, torch.zeros_like(regions[:, :1])], 1)

    @property
    def may_turn(self) -> bool:
        """A turn by 180 degrees is a mirroring along both axes of the plane."""
        dim = len(self.planned.patch_size)
        return {dim - 2, dim - 1} <= set(self.planned.mirror_axes)

    def orientation(self, dim: int, t: float) -> Orientation:
        """R: one to three quarter turns in a square plane, else 180 degrees; mirrorings where allowed."""
        plane, allowed = (dim - 2, dim - 1), self.planned.mirror_axes
        turns: tuple[tuple[int, int, int], ...] = ()
        if self.may_turn:
            square = square_planes(self.planned.patch_size, self.planned.spacing, plane)
            quarters = 1 + int(torch.randint(3, ())) if square else 2
            turns = ((quarters, -2, -1),)
        axes = allowed if t >= self.config.mirror_from else ()
        return Orientation(turns, random_orientation(dim, (), axes).mirrored)

    # the pool

    def outside(self) -> set[str]:
        """Names of the scans that have left."""
        if self._outside is None:
            left = self.left.tolist()
            self._outside = {case for case, i in self.case_index.items() if left[i]}
        return self._outside

    @torch.no_grad()
    def scan_entropies(self, logits: Tensor, batch: SemiBatch) -> tuple[Tensor, Tensor]:
        """Indices (U,) of the scans and the entropy of each patch (U,), summed over voxels."""
        p = self.probabilities(logits)
        if self.labels.has_regions:
            p = torch.stack([p, 1 - p])
            total = -torch.special.xlogy(p, p).sum(0).flatten(1).sum(1)
        else:
            total = -torch.special.xlogy(p, p).flatten(1).sum(1)
        return indices([self.case_index[c] for c in batch.unlabeled_cases], logits.device), total

    def after_step(self, batch: SemiBatch, t: float) -> None:
        new = torch.zeros(2, len(self.entropy), device=self.entropy.device)
        if self.pending is not None:
            index, total = self.pending
            new.index_add_(1, index, torch.stack([total, torch.ones_like(total)]))
            self.pending = None
        new = sum_over_ranks(new)
        self.entropy += new[0]
        self.seen += new[1]
        step, interval = round(t * self.planned.steps), round(self.config.filter_every * self.planned.steps)
        last = step - 1 if self._last_step is None else self._last_step
        if step // max(1, interval) > max(0, last // max(1, interval)):  # also where that step was skipped
            self.shrink_pool()
        self._last_step = step

    def shrink_pool(self) -> None:
        """The scans of the lowest mean entropy leave; what was not seen stays, and so does at least one."""
        # the rest on the host, which waits once
        mean, seen = torch.stack([self.entropy / self.seen.clamp_min(1), self.seen]).tolist()
        outside, cases = self.outside(), list(self.case_index)
        candidates = [i for i, case in enumerate(cases) if seen[i] > 0 and case not in outside]
        pool = len(cases) - len(outside)
        leaving = min(int(self.config.filter_share * pool), pool - 1)
        gone = sorted(candidates, key=lambda i: mean[i])[: max(0, leaving)]
        self._outside = outside | {cases[i] for i in gone}
        left = torch.tensor([case in self._outside for case in cases])
        self.left.copy_(left, non_blocking=True)
        self.entropy.zero_()
        self.seen.zero_()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._outside = None

    def announce(self, t: float) -> str:
        outside = sorted(self.outside())
        return (
            f"FilterMatch: {len(outside)} scans have left the pool: {', '.join(outside)}" if outside else ""
        )


def indices(values: list[int], device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    return torch.tensor(values).to(device, non_blocking=True)
