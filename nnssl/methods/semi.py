"""Semi: the trainer to start with (ours). An averaged teacher labels every voxel and says how sure it is; the
student learns it at every scale, in another orientation, mixed with other patches.

    L    = L_sup + lambda(t) L_u
    p    = probabilities(f_ema(x_w))
    w    = c [c >= T],  c = max p
    L_u  = sum_s a_s (CE + Dice)(f_s(x); y, w) over the voxels that come from unlabeled patches, y = harden p;
           a weighted mean: w says which voxels count more, not how much L_u does

f        student, the planned network; deployed
f_ema    teacher: average of f over the last 1 % of all steps, at most 1,000, bias-corrected; eval mode, no
         gradient; may be deployed instead ("deploy": "teacher")
x_w, x_s weak and strong view of the same unlabeled patch
R        a draw per unlabeled sample: quarter turns in planes of equal spacing and size, and mirrorings, both
         of allowed axes only; x_s, y and w are moved alike
s, a_s   deep supervision scales and nnU-Net's weights of them
x        x_l beside R x_s, the latter with CutMix boxes between its samples

f drops half of the channels of its encoder features in the unlabeled stream, unless it began with pretrained
weights (`channel_dropout`). Every ingredient is a key of its own and can be switched off; those below are off
unless asked for.
mirrored_pass        p is the mean with F^-1 probabilities(f_ema(F x_w)), F a random mirroring among
                     `mirror_axes`; w is also multiplied by 1 - the total variation of both
paste_share          in that share of the steps x is x_l with a box of R x_s, and R x_s with a box of x_l, and
                     L_sup the weighted form of nnU-Net's loss over the voxels that come from x_l
adaptive_thresholds  T_k = min(T, running mean of c over the voxels of class k = argmax p) instead of T
histogram_matching   with that probability x_l goes a part of the way, drawn from [0, 1], to the intensities
                     of one of the x_w
agreement            (general key) lambda(t) times the cosine of the mean gradients of both terms, cut at 0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from nnssl.batch import SemiBatch
from nnssl.config import Config, NonNegative, Share
from nnssl.data.mixing import both_ways, cutmix_all, cutmix_mask, match_histograms
from nnssl.distributed import sum_over_ranks, world_size
from nnssl.ema import ema_update
from nnssl.losses.deep_supervision import deep_supervision_loss
from nnssl.method import Outputs, TeacherMethod, full_resolution, split_batch
from nnssl.networks.dropout import forward_streams
from nnssl.orientations import Orientation, apply_each, random_orientation, square_planes
from nnssl.schedules import gaussian_ramp


@dataclass(frozen=True)
class SemiConfig(Config):
    weight_pseudo: NonNegative = 1.0  # lambda_max: weight of L_u after the ramp (ours)
    ramp_fraction: Share = 0.4  # share of the training over which lambda rises; 0: no ramp (CAML's share)
    # share of all steps that teacher and class confidences average over; 0: the student itself (ours)
    teacher_share: Share = 0.01
    max_decay: Share = 0.999  # largest decay, in runs of more than 100,000 steps (ours)
    mirrored_pass: bool = False  # whether pseudo-labels are the mean of a plain and a mirrored pass (ours)
    # whether a voxel weighs its confidence (times the passes' agreement); else 1 above the threshold (ours)
    soft_weights: bool = True
    # T: confidence below which a voxel does not teach; 0: every voxel does, by its weight (ours)
    threshold: Share = 0.0
    # whether a class's own mean confidence, where lower, is its threshold (after FreeMatch)
    adaptive_thresholds: bool = False
    deep_supervision: bool = True  # whether L_u acts at every scale; else at the finest alone (nnFilterMatch)
    turns: bool = True  # whether strong views are turned by quarters (nnFilterMatch)
    mirrorings: bool = True  # whether strong views are mirrored (nnFilterMatch)
    paste_share: Share = 0.0  # share of the steps that paste between labeled and unlabeled patches (ours)
    cutmix_probability: Share = 0.5  # probability of a CutMix box, in the other steps (UniMatch)
    box_edge: Share = 2 / 3  # edge of a pasted box, as a share of the patch's edge (BCP)
    # share of channels that f's encoder features lose in the unlabeled stream (UniMatch); null: 0.5, and 0 in
    # a run from pretrained weights
    channel_dropout: Share | None = None
    # probability that a labeled patch takes on the intensities of an unlabeled one (Ma, arXiv 2012.13871)
    histogram_matching: Share = 0.0

    def check(self) -> None:
        """`adaptive_thresholds` only with a `threshold` to lower."""
        if self.adaptive_thresholds and not self.threshold:
            raise ValueError("adaptive_thresholds lowers the threshold, which is 0: set threshold, e.g. 0.9")


class PseudoLabels(NamedTuple):
    """Zeros and ones (U, K, S) and voxel weights (U, 1, S)."""

    labels: Tensor
    weight: Tensor


class Semi(TeacherMethod):
    name = "Semi"
    config_class = SemiConfig
    meaning: ClassVar[Mapping[str, str]] = {
        "supervised": "nnU-Net's loss of the student on labeled patches, in mixed patches over the labeled "
        "voxels.",
        "pseudo": "Cross-entropy and Dice of the student, at every scale, against the teacher's pseudo-"
        "labels, weighted voxel by voxel by how sure the teacher is.",
        "weight": "Mean weight of an unlabeled voxel.",
        "disagreement": "Mean difference between the teacher's plain and mirrored prediction.",
        "threshold_lowest": "Confidence threshold of the class that has the lowest.",
    }
    config: SemiConfig

    confidence: Tensor
    observed: Tensor

    def build(self) -> None:
        super().build()
        self.register_buffer(
            "confidence", torch.zeros(self.labels.num_classes)
        )  # running mean of c per class
        self.register_buffer(
            "observed", torch.zeros(self.labels.num_classes)
        )  # steps in which the class was seen
        self.pending: tuple[Tensor, Tensor] | None = None
        self.walk = self.planned.compiled(forward_streams)
        self.scale_weights = self.planned.scale_weights if self.config.deep_supervision else (1.0,)

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        batch = replace(batch, labeled=self.restyled(batch.labeled, batch.weak))
        pseudo = self.pseudo_labels(batch.weak)
        x_u, pseudo = self.move(batch.strong[0], pseudo)
        if self.draw(t) < self.config.paste_share:
            return self.pasted(batch, x_u, pseudo)
        return self.side_by_side(batch, x_u, pseudo)

    def weights(self, t: float) -> dict[str, float]:
        ramp = gaussian_ramp(t, self.config.ramp_fraction)
        return {"supervised": 1.0, "pseudo": self.config.weight_pseudo * ramp}

    def draw(self, t: float) -> float:
        """Uniform in [0, 1); the same on all ranks, which exchange other sums in pasted patches."""
        of_rank = float(torch.rand(()))
        if world_size() == 1:
            return of_rank
        step = round(t * self.planned.steps)
        return float(torch.rand((), generator=torch.Generator().manual_seed(step)))

    def restyled(self, labeled: Tensor, weak: Tensor) -> Tensor:
        """x_l, of which some samples come nearer to the intensities of an unlabeled patch; a cascade's
        segmentation stays."""
        probability = self.config.histogram_matching
        if probability == 0:
            return labeled
        n, images, device = len(labeled), labeled.shape[1] - self.planned.previous, labeled.device
        (drawn, share), other = torch.rand(2, n), torch.randint(len(weak), (n,))  # on the host
        chosen = (drawn < probability).nonzero()[:, 0]
        share = share[chosen].view(-1, *[1] * (labeled.ndim - 1))
        place, other, share = (x.to(device, non_blocking=True) for x in (chosen, other[chosen], share))
        before = labeled[place, :images]
        restyled = labeled.clone()
        restyled[place, :images] = torch.lerp(before, match_histograms(before, weak[other, :images]), share)
        return restyled

    # pseudo-labels

    def pseudo_labels(self, weak: Tensor) -> PseudoLabels:
        """y and w of the weak view; leaves the classes' confidence for `after_step`."""
        mirroring = self.random_mirroring(weak.ndim - 2)
        if mirroring is None:
            p = self.teach(weak)
            disagreement = torch.zeros_like(p[:, :1])
        else:
            p_1, p_2 = self.teach(torch.cat([weak, mirroring.apply(weak)])).chunk(2)
            p_2 = mirroring.undo(p_2)
            p, gap = (p_1 + p_2) / 2, (p_1 - p_2).abs()
            disagreement = (
                gap.amax(1, keepdim=True) if self.labels.has_regions else gap.sum(1, keepdim=True) / 2
            )
        certain = self.labels.confidence(p)
        labels = self.labels.harden(p)
        member = self.labels.classes(labels)
        if self.config.adaptive_thresholds:
            self.pending = self.class_confidence(certain, member)
        weight = (certain >= self.thresholds(member)).float()
        if self.config.soft_weights:
            weight = weight * certain * (1 - disagreement)
        self.diagnostics = {
            "weight": weight.mean(),
            "disagreement": disagreement.mean(),
            "threshold_lowest": self.class_thresholds().amin(),
        }
        self.count_accepted(labels, weight)
        return PseudoLabels(labels, weight)

    def accepted(self, p: Tensor, t: float) -> Tensor:
        member = self.labels.classes(self.labels.harden(p))
        return (self.labels.confidence(p) >= self.thresholds(member)).float()

    def random_mirroring(self, dim: int) -> Orientation | None:
        """F: one of the allowed mirrorings that change something, or None where there is none."""
        axes = self.planned.mirror_axes
        if not (self.config.mirrored_pass and axes):
            return None
        subset = 1 + int(torch.randint(2 ** len(axes) - 1, ()))
        return Orientation(mirrored=tuple(a - dim for i, a in enumerate(axes) if subset >> i & 1))

    def class_thresholds(self) -> Tensor:
        """T_k (K')."""
        limit = torch.full_like(self.confidence, self.config.threshold)
        return torch.minimum(limit, self.confidence) if self.config.adaptive_thresholds else limit

    def thresholds(self, member: Tensor) -> Tensor:
        """T_k of every voxel's class, of overlapping regions the lowest: (K', U, S) bool -> (U, 1, S)."""
        thresholds = self.class_thresholds().view(-1, *[1] * (member.ndim - 1))
        return torch.where(member, thresholds, 1.0).amin(0).unsqueeze(1)

    @staticmethod
    def class_confidence(certain: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of c over every class's voxels, of all ranks, and whether there are any: (K'), (K')."""
        member = member.flatten(1).float()
        count = member.sum(1)
        with torch.autocast(certain.device.type, enabled=False):  # sums of float16 end at 65504
            total, count = sum_over_ranks(torch.stack([member @ certain.flatten(), count]))
        return total / count.clamp_min(1), count > 0

    def after_step(self, batch: SemiBatch, t: float) -> None:
        ema_update(self.teacher, self.student, self.decay(t))
        if self.pending is not None:
            mean, present = self.pending
            decay = (1 - 1 / (self.observed + 1)).clamp_max(self.limit)
            self.confidence.copy_(
                torch.where(present, decay * self.confidence + (1 - decay) * mean, self.confidence)
            )
            self.observed += present
            self.pending = None

    @property
    def limit(self) -> float:
        """Decay far from the start: an average over `teacher_share` of all steps."""
        steps = self.config.teacher_share * self.planned.steps
        return min(self.config.max_decay, 1 - 1 / steps) if steps > 1 else 0.0

    def decay(self, t: float) -> float:
        """min(d, 1 - 1 / (step + 1)): the plain mean at first, without the weights of the start."""
        return min(self.limit, 1 - 1 / (round(t * self.planned.steps) + 1))

    # the strong view

    def move(self, images: Tensor, pseudo: PseudoLabels) -> tuple[Tensor, PseudoLabels]:
        """R of every sample, alike for image, labels and weights."""
        axes = self.planned.mirror_axes if self.config.mirrorings else ()
        planes = self.planes()
        if not (planes or axes):
            return images, pseudo
        orientations = [random_orientation(images.ndim - 2, planes, axes) for _ in images]
        images, labels, weight = (apply_each(x, orientations) for x in (images, *pseudo))
        return images, PseudoLabels(labels, weight)

    def planes(self) -> list[tuple[int, int]]:
        """Planes in which R turns."""
        p = self.planned
        return square_planes(p.patch_size, p.spacing, p.mirror_axes) if self.config.turns else []

    def side_by_side(self, batch: SemiBatch, x_u: Tensor, pseudo: PseudoLabels) -> dict[str, Tensor]:
        """x_l beside x_u, the latter with CutMix."""
        n = len(batch.labeled)
        box = cutmix_mask(len(x_u), x_u.shape[2:], x_u.device, self.config.cutmix_probability)
        x_u, y, w = cutmix_all((x_u, box), (pseudo.labels, box), (pseudo.weight, box))
        labeled, unlabeled = split_batch(self.student_outputs(torch.cat([batch.labeled, x_u]), n), n)
        return {
            "supervised": self.supervised_loss(labeled, batch.target),
            "pseudo": self.unlabeled_loss(unlabeled, y, w),
        }

    def pasted(self, batch: SemiBatch, x_u: Tensor, pseudo: PseudoLabels) -> dict[str, Tensor]:
        """Boxes both ways."""
        onehot, known = self.labels.encode(batch.full_target())
        known = torch.ones_like(onehot[:, :1]) if known is None else known.float()
        clean = len(batch.labeled)
        from_unlabeled = torch.cat([self.boxes(batch.labeled), ~self.boxes(x_u)])
        (x_l, onehot, known), (x_u, called, weight) = both_ways(
            (batch.labeled, onehot, known), (x_u, *pseudo)
        )
        outputs = self.student_outputs(torch.where(from_unlabeled, x_u, x_l), clean)
        y = torch.where(from_unlabeled, called, onehot)
        return {
            "supervised": deep_supervision_loss(
                outputs, y, self.labels, known * ~from_unlabeled, self.planned.scale_weights
            ),
            "pseudo": self.unlabeled_loss(outputs, y, weight * from_unlabeled),
        }

    def boxes(self, x: Tensor) -> Tensor:
        """(B, 1, S) bool for patches (B, C, S)."""
        volume = self.config.box_edge ** (x.ndim - 2)
        return cutmix_mask(
            len(x), x.shape[2:], x.device, probability=1.0, volume=(volume, volume), stretch=0.0
        )

    def student_outputs(self, images: Tensor, clean: int) -> Outputs:
        """f at every scale; channels are dropped behind the first `clean` images."""
        return self.walk(self.student, images, clean, self.channel_dropout).outputs

    @property
    def channel_dropout(self) -> float:
        dropout = self.config.channel_dropout
        if dropout is None:
            dropout = 0.0 if self.pretrained else 0.5
        return dropout

    def announce(self, t: float) -> str:
        if self.config.channel_dropout is not None:
            return ""
        start = "from pretrained weights" if self.pretrained else "from scratch"
        return f"Semi: channel dropout {self.channel_dropout:g}, the default {start}"

    def unlabeled_loss(self, outputs: Outputs, y: Tensor, w: Tensor) -> Tensor:
        """L_u."""
        if not self.config.deep_supervision:
            outputs = full_resolution(outputs)
        return deep_supervision_loss(outputs, y, self.labels, w, self.scale_weights)
