"""SemSim: semantic similarity refines pseudo-labels, within an image and across images (arXiv 2410.13486).

    L = L_sup + lambda(t) (0.5 L_u + 0.25 L_intra + 0.25 L_cross)
    L_sup   = nnU-Net's loss of f(x_l) against y_l
    L_u     = dice(p_w -> p_s1)
    L_intra = dice(p1_w -> p_in), over the voxels where p_w is certain
    L_cross = mean over voxels of 1[max p2_w >= T] CE(p2_w -> p_cr) mean_j exp(-r U_j)

    p1_w, p_in        = (p_i + sum_j softmax_j(s cos(e_i, e_j)) p_j) / 2                   of x_w and x_s1
    p2_w(c), p_cr(c)  = sum_j exp m(j, c) / sum_c' sum_j exp m(j, c')                      of x_w and x_s2
    m(j, c)           = cos(e, G_j^c of its sub-region) / temperature
    U_j               = KL(m_j || mean_j m_j), softmaxed over classes

f           student, the planned network; deployed. Weak predictions are made in eval mode, without gradient
x_w         weak view; x_s1, x_s2 strong views of the same patch with CutMix boxes of their own; weak
            predictions are cut with the box of the view they are compared with
lambda(t)   Gaussian ramp over the first 40 % of training
dice(a->b)  soft Dice of b against harden a over the voxels where a is certain, max a >= T
e           spatial-aware fusion (SFM) of three encoder scales, at the finest grid with at most `max_tokens`
            voxels; never ships
G_j^c       mean feature of class c in a sub-region of labeled image j; of the whole image where the
            sub-region lacks c

Differs from the paper:
- A temperature and a scale s for the cosines, and an r to fit: with the published constants L_cross acts on
  hardly any voxel, and L_intra refines with the mean of the whole image. `diagnostics` log the share that
  each term acts on.
- The objective is twice the published one: f then learns from L_sup at nnU-Net's learning rate.
- A ramp, because networks trained from scratch are soon certain of wrong labels.
- SFM takes the three deepest encoder stages, on planned 2D and 3D grids; windows and sub-regions are at least
  2 voxels wide, so fewer on small grids.
- Labels and predictions are averaged onto the grid of e; prototypes are made of the voxels that hold a class
  most purely.
- Channel dropout acts on all encoder features of the strong views: the paper does not name the place.
- A class that a labeled image lacks takes part in no mean over images.
- L_intra counts where p_w is certain: the published gate acts on the sum p + sum_j M p_j, which nearly always
  passes, and on its half hardly anything does.
- L_cross counts where p_w calls the same class as p2_w: patches lie anywhere, and prototypes of a wrong place
  are certain all the same. Its weights carry no gradient.
- Regions are two-class problems, each with its complement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.batch import SemiBatch
from nnssl.config import Config, Few, NonNegative, Ratio, Share, Temperature, Voxels, Width
from nnssl.data.mixing import cutmix_all, cutmix_mask
from nnssl.distributed import Gatherer
from nnssl.losses.affinity import (
    agreement,
    cross_image_log_probabilities,
    cross_image_loss,
    prototype_similarity,
    prototypes,
    purest,
    refine,
)
from nnssl.losses.pseudo_label import Compared, confidence_mask, soft_dice_losses
from nnssl.method import SUPERVISED, SemiMethod, full_resolution, inference, split_batch
from nnssl.networks.dropout import forward_streams
from nnssl.networks.features import stage_grids
from nnssl.networks.fusion import SpatialAwareFusion, cut_windows, windows_per_axis
from nnssl.schedules import gaussian_ramp

SCALES = 3  # of the encoder that SFM fuses


@dataclass(frozen=True)
class SemSimConfig(Config):
    weight_supervised: NonNegative = 1.0  # weight of L_sup (ours: twice the published)
    weight_pseudo: NonNegative = 0.5  # weight of L_u (ours: twice the published)
    weight_intra: NonNegative = 0.25  # weight of L_intra (ours: twice the published)
    weight_cross: NonNegative = 0.25  # weight of L_cross (ours: twice the published)
    # share of the training over which lambda rises (ours; 0: no ramp, as published)
    ramp_fraction: Share = 0.4
    threshold: Share = 0.95  # T: confidence above which a voxel is certain (SemSim)
    cutmix_probability: Share = 0.5  # probability of a CutMix box in a sample of a strong view (UniMatch)
    channel_dropout: Share = 0.5  # share of channels that the strong views' encoder features lose (SemSim)
    width: Width = 128  # D: width of SFM and of e (SemSim)
    windows: Few = 4  # windows of SFM per axis (ours)
    heads: Few = 4  # heads of SFM's attention (ours)
    mlp_ratio: Ratio = 2.0  # hidden width of SFM's MLP over D (ours)
    max_tokens: Voxels = 4096  # voxels of a scale of SFM and of e, at most (ours)
    scale: NonNegative = 20.0  # s: factor of the cosines within an image (ours; the paper's 1 has no effect)
    regions_2d: Few = 4  # N: sub-regions per axis in 2D (SemSim)
    # N: sub-regions per axis in 3D (ours: random patches share fewer places than slices)
    regions_3d: Few = 2
    # temperature of the cosines across images (ours; the paper's 1 has no effect)
    temperature: Temperature = 0.1
    r: NonNegative = 10.0  # r: strength of the uncertainty weight (ours; the paper: 1000)

    def check(self) -> None:
        """`width` is a multiple of `heads`."""
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads {self.heads}, found {self.width}")


class SemSim(SemiMethod):
    name = "SemSim"
    config_class = SemSimConfig
    meaning: ClassVar[Mapping[str, str]] = {
        "supervised": SUPERVISED,
        "pseudo": "Dice loss of the first strong view against the certain pseudo-labels of the weak view.",
        "intra": "Dice loss against pseudo-labels that were refined by the affinities of voxels within "
        "the image.",
        "cross": "Cross-entropy against pseudo-labels made of the similarity to the labeled images' "
        "class prototypes.",
        "pseudo_certain": "Share of the unlabeled voxels that the term pseudo acts on.",
        "pseudo_certain_foreground": "The same among voxels called foreground.",
        "intra_certain": "Share of the unlabeled voxels that the term intra acts on.",
        "intra_certain_foreground": "The same among voxels called foreground.",
        "cross_certain": "Share of the unlabeled voxels that the term cross acts on.",
        "cross_certain_foreground": "The same among voxels called foreground.",
        "cross_weight": "Mean weight of these voxels: lower where the labeled images disagree.",
    }
    num_strong_views = 2
    config: SemSimConfig

    region: Tensor  # (V,) sub-region of each voxel of e's grid

    def build(self) -> None:
        c, encoder = self.config, self.student.encoder
        grids = list(stage_grids(self.planned.patch_size, encoder.strides))
        self.fusion = SpatialAwareFusion(
            encoder.output_channels[-SCALES:],
            grids[-SCALES:],
            width=c.width,
            windows=c.windows,
            max_tokens=c.max_tokens,
            heads=c.heads,
            mlp_ratio=c.mlp_ratio,
        )
        self.grid = self.fusion.grid
        self.regions_per_axis = windows_per_axis(
            self.grid, c.regions_2d if len(self.grid) == 2 else c.regions_3d
        )
        index, place = cut_windows(self.grid, self.regions_per_axis)
        self.num_regions = len(index)
        self.register_buffer("region", place // index.shape[1], persistent=False)
        self.walk = self.planned.compiled(forward_streams)
        self.gather = Gatherer()

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        c, n, u = self.config, len(batch.labeled), len(batch.weak)
        with inference(self.student, self.fusion):
            weak = self.walk(self.student, batch.weak)
            p_w, e_w = self.probabilities(full_resolution(weak.outputs)), self.fusion(weak.skips[-SCALES:])
        box_1, box_2 = (
            cutmix_mask(u, batch.weak.shape[2:], batch.weak.device, c.cutmix_probability) for _ in range(2)
        )
        with torch.autocast(batch.weak.device.type, enabled=False):
            p1_w = refine(e_w, self.to_grid(p_w), c.scale)
        x_1, x_2, p_cut, p1_w = cutmix_all(
            (batch.strong[0], box_1),
            (batch.strong[1], box_2),
            (p_w, box_1),
            (p1_w, self.to_grid(box_1.float()) > 0.5),
        )
        images = torch.cat([batch.labeled, x_1, x_2])

        # x_s2 is not decoded: only its e is looked at
        walked = self.walk(self.student, images, n, c.channel_dropout, n + u)
        labeled, strong = split_batch(walked.outputs, n)
        p_s1 = self.probabilities(full_resolution(strong))
        e_l, e_s1, e_s2 = self.fusion(walked.skips[-SCALES:]).split([n, u, u])

        supervised = self.supervised_loss(labeled, batch.target)
        with torch.autocast(images.device.type, enabled=False):
            cross = self.cross_image(e_l, e_s2, e_w, p_w, self.to_grid(box_2.float()) > 0.5, batch)
            # of e's voxels, the share of what they cover
            accepted = self.accepted(p_cut, t)
            self.count_accepted(self.labels.harden(p_cut), accepted)
            certain = self.to_grid(accepted)
            self.diagnostics |= self.confident("pseudo", p_cut)
            self.diagnostics |= shares("intra", certain, self.foreground(p1_w))
            pseudo, intra = soft_dice_losses(
                [
                    Compared(p_s1, self.labels.harden(p_cut), accepted),
                    Compared(refine(e_s1, self.to_grid(p_s1), c.scale), self.labels.harden(p1_w), certain),
                ],
                skip_first=not self.labels.has_regions,
            )
            return {
                "supervised": supervised,
                "pseudo": pseudo,
                "intra": intra,
                "cross": cross,
            }

    def weights(self, t: float) -> dict[str, float]:
        c, ramp = self.config, gaussian_ramp(t, self.config.ramp_fraction)
        return {
            "supervised": c.weight_supervised,
            "pseudo": c.weight_pseudo * ramp,
            "intra": c.weight_intra * ramp,
            "cross": c.weight_cross * ramp,
        }

    def describe(self) -> str:
        sizes = " + ".join("x".join(map(str, g)) for g in self.fusion.grids)
        windows, regions = ("x".join(map(str, w)) for w in (self.fusion.windows, self.regions_per_axis))
        grid = "x".join(map(str, self.grid))
        return (
            f"SemSim: fusion of {sizes} in {windows} windows, affinities on {grid} in {regions} sub-regions"
        )

    def accepted(self, p: Tensor, t: float) -> Tensor:
        return confidence_mask(p, self.config.threshold, self.labels)

    def to_grid(self, x: Tensor) -> Tensor:
        """Mean over what each voxel of e's grid covers: (B, K, S) -> (B, K, grid)."""
        return F.interpolate(x, self.grid, mode="area")

    def cross_image(
        self, e_l: Tensor, e_s: Tensor, e_w: Tensor, p_w: Tensor, box: Tensor, batch: SemiBatch
    ) -> Tensor:
        """L_cross.

        Args:
            e_l: (B, D, grid) of the labeled images; e_s, e_w: (U, D, grid) of the strong and the weak view.
            p_w: (U, K, S), which must agree.
            box: (U, 1, grid) bool of the strong view.
        """
        c = self.config
        member = self.problems(*self.labels.encode(batch.full_target()))  # (B, P, C, V)
        g, known = prototypes(e_l.flatten(2), purest(member.flatten(1, 2)), self.region, self.num_regions)
        # of the labeled images of all ranks
        g, known = self.gather.with_gradient(g), self.gather(known)[0]
        known = known.unflatten(1, member.shape[1:3])  # (B, P, C)

        def similarity(e: Tensor, g: Tensor) -> Tensor:
            return (
                prototype_similarity(e.flatten(2), g, self.region).unflatten(2, member.shape[1:3])
                / c.temperature
            )

        p2_w = cross_image_log_probabilities(similarity(e_w, g.detach()), known).exp()  # (U, P, C, V)
        confidence, called = p2_w.max(2, keepdim=True)
        certain = (confidence >= c.threshold) & (called == self.problems(p_w, None).argmax(2, keepdim=True))
        box = box.flatten(2)[:, None]
        certain, called = (x[:, :, 0] for x in cutmix_all((certain, box), (called, box)))  # (U, P, V)
        certain = certain.float()
        m = similarity(e_s, g)
        weight = agreement(m, known, c.r)
        self.diagnostics |= shares("cross", certain, (called > 0).float()) | {"cross_weight": weight.mean()}
        target = torch.zeros_like(p2_w).scatter_(2, called[:, :, None], 1.0)
        return cross_image_loss(cross_image_log_probabilities(m, known), target, certain * weight)

    def problems(self, onehot: Tensor, labeled_mask: Tensor | None) -> Tensor:
        """Share of each class in each voxel of e's grid: (B, P, C, V). Classes: one problem of K; regions: K
        problems, outside | inside."""
        labeled = torch.ones_like(onehot[:, :1]) if labeled_mask is None else labeled_mask.float()
        onehot, labeled = self.to_grid(onehot).flatten(2), self.to_grid(labeled).flatten(2)
        return torch.stack([labeled - onehot, onehot], dim=2) if self.labels.has_regions else onehot[:, None]

    def confident(self, name: str, p: Tensor) -> dict[str, Tensor]:
        """Share of the voxels where p (U, K, S) is certain: of all, and of those called foreground."""
        return shares(name, confidence_mask(p, self.config.threshold, self.labels), self.foreground(p))

    def foreground(self, p: Tensor) -> Tensor:
        """(U, 1, S): 1 where p (U, K, S) calls anything but background."""
        hard = self.labels.harden(p)
        return (hard if self.labels.has_regions else hard[:, 1:]).amax(1, keepdim=True)


def shares(name: str, certain: Tensor, foreground: Tensor) -> dict[str, Tensor]:
    """Mean of `certain` over all voxels and over the foreground; shares and zeros or ones of one shape."""
    return {
        f"{name}_certain": certain.mean(),
        f"{name}_certain_foreground": (certain * foreground).sum() / foreground.sum().clamp_min(1),
    }
