"""CAML: correlation-aware mutual learning of two networks (Gao et al., MICCAI 2023).

    L   = L_sup(v) + L_sup(a) + r(t) (lambda_c L_c + lambda_d L_d + lambda_o L_o)
    L_c = mse(p_v, sharpen p'_a) + mse(p_a, sharpen p'_v)          on x_l and x_s
    L_d = dice(p_v, sharpen p'_a) + dice(p_a, sharpen p'_v)        on x_s; soft Dice loss over the batch
    L_o = - mean_i (log c_v,ik + log c_a,ik) / 2                   over voxels i of x_s that both call k
    sharpen p = p^(1/T) / sum_c p_c^(1/T),        c_ik = sum_{j of class k} softmax_j(cos(q_i, m_j) / T_o)

v         student, the planned network; deployed
a         auxiliary, the planned network with interpolation instead of transposed convolutions, and with
          cross-sample mutual attention (CMA) behind its second-deepest encoder stage: over the voxels of each
          sample, then across the samples of the batch
q         predictor(projector(features of the last decoder stage))
i         voxels that v and a call the same class, drawn at random
m_j       bank of labeled voxels that both networks get right: mean of both projections, kept per labeled case
          and class; drawn over all cases, a class with too few is left out
x_w, x_s  weak and strong view of the same unlabeled patch, voxels in correspondence; x_s with CutMix boxes,
          the same for both networks
p'        p without gradient; where p is of x_s, p' is of x_w and cut alike
r(t)      Gaussian ramp over the first 40 % of training

Differs from the paper:
- The objective is twice the published one: each network then learns from L_sup at nnU-Net's learning rate.
- Targets of unlabeled patches come from another view: on the same view, two planned networks soon agree.
- L_o sums correlations over the rows of a class, on unit embeddings, and draws its queries at random. The
  published form, - mean_i sum_j c_a,ij log c_v,ij on raw dot products and the most certain voxels, is 0 once
  every voxel points at one row, and soon is: "correlation": "rows".
- L_d beside L_c, as Dice beside cross-entropy in nnU-Net's loss: small structures weigh as much as large.
- The encoder features of x_s may lose channels (`channel_dropout`, off): planned networks have no dropout
  layers, V-Net has.
- Sharpened probabilities are targets without gradient: a target should not follow its prediction.
- The auxiliary interpolates behind a 1x1 convolution: the same function, at the cost of what it replaces.
- CMA is pre-norm, without dropout, the identity at the start, and behind the deepest stage where the
  second-deepest has many voxels: its cost is quadratic in them.
- The heads have no batch norm: they are evaluated at the chosen voxels alone.
- The bank keeps the last rows of every case and class and is written after the step: a fixed size on the
  device. Queries are a share of small patches.
- The complement of all regions is a class, too; there v's certainty is min_k(1 - p_k), and sharpening is per
  region against 1 - p. Ignored voxels carry no loss and never enter the bank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nnssl.banks import CaseBank
from nnssl.batch import SemiBatch
from nnssl.config import (
    Config,
    Count,
    Few,
    NonNegative,
    PositiveShare,
    Ratio,
    Share,
    Temperature,
    Voxels,
    Width,
)
from nnssl.data.mixing import cutmix_all, cutmix_mask
from nnssl.losses.consistency import mse_consistency, sharpen
from nnssl.losses.correlation import class_correlation, omni_correlation
from nnssl.losses.pseudo_label import Compared, soft_dice_losses
from nnssl.method import SUPERVISED, SemiMethod, full_resolution, split_batch
from nnssl.networks.attention import CrossSampleAttention
from nnssl.networks.dropout import Walk, forward_streams
from nnssl.networks.features import stage_grids
from nnssl.networks.heads import in_float32
from nnssl.networks.upsampling import interpolate_instead_of_transposing
from nnssl.sampling import gather_voxels, sample_members, top_members
from nnssl.schedules import gaussian_ramp


@dataclass(frozen=True)
class CAMLConfig(Config):
    weight_supervised: NonNegative = 1.0  # weight of each network's L_sup (ours: twice the published)
    weight_consistency: NonNegative = 2.0  # lambda_c: weight of L_c (ours: twice the published)
    weight_dice: NonNegative = 0.5  # lambda_d: weight of L_d (ours)
    weight_correlation: NonNegative = 0.1  # lambda_o: weight of L_o (ours: twice the published)
    # share of the training over which r rises (CAML with 4 labeled cases; 0.2 with 8, 0.15 with 16)
    ramp_fraction: Share = 0.4
    # share of channels that both encoders' features of x_s lose (ours; the papers' V-Nets drop channels, too)
    channel_dropout: Share = 0.0
    cutmix_probability: Share = 0.5  # probability of a CutMix box in a sample of x_s (ours)
    # form of L_o: over the rows of each class (ours), or over single rows (CAML)
    correlation: Literal["classes", "rows"] = "classes"
    sharpening: Temperature = 0.1  # T: temperature of the sharpening (CAML)
    temperature: Temperature = 0.1  # T_o: temperature of L_o (CAML)
    embedding: Width = 64  # width of the projections and of q (CAML)
    # rows per class drawn from the bank in a step, and kept per case and class (ours)
    rows: Count = 256
    queries: Count = 12_800  # voxels i per class, at most (CAML)
    # largest share of the unlabeled voxels that are queries (ours: small patches; in CAML 12,800 are 0.6 %)
    query_share: PositiveShare = 0.05
    # heads of CMA (CAML); where its stage's width is no multiple, their greatest common divisor
    attention_heads: Few = 4
    mlp_ratio: Ratio = 4.0  # hidden width of CMA's MLP over its width (CAML)
    # voxels of the second-deepest stage above which CMA stands behind the deepest (ours, for shallow plans)
    attention_tokens: Voxels = 2048


class CAML(SemiMethod):
    name = "CAML"
    config_class = CAMLConfig
    per_case: ClassVar[Mapping[str, tuple[str, int]]] = {
        "bank.rows": ("labeled", 1),
        "bank.count": ("labeled", 1),
    }
    meaning: ClassVar[Mapping[str, str]] = {
        "supervised": SUPERVISED,
        "supervised_aux": "The same of the auxiliary network.",
        "consistency": "Mean squared difference between each network's probabilities and the sharpened ones "
        "of the other.",
        "dice": "Dice loss of each network on unlabeled patches against the other's sharpened probabilities.",
        "correlation": "How little the two networks agree on which labeled voxels an unlabeled voxel "
        "resembles.",
    }
    config: CAMLConfig

    def build(self) -> None:
        c, features = self.config, self.student.encoder.output_channels
        network = self.planned.build_network(self.planned.input_channels, self.labels.channels)
        self.auxiliary = interpolate_instead_of_transposing(network)
        voxels = [math.prod(g) for g in stage_grids(self.planned.patch_size, self.student.encoder.strides)]
        self.stage = max(0, len(features) - 2)
        if voxels[self.stage] > c.attention_tokens:
            self.stage = len(features) - 1
        self.attention = CrossSampleAttention(
            features[self.stage], math.gcd(features[self.stage], c.attention_heads), c.mlp_ratio
        )
        self.head_v, self.head_a = (CorrelationHead(features[0], c.embedding) for _ in "va")
        self.case_index = {case: i for i, case in enumerate(self.planned.labeled_cases)}
        self.bank = CaseBank(self.labels.num_classes, len(self.case_index), c.rows, c.embedding)
        self.walk = self.planned.compiled(forward_streams)
        self.walk_auxiliary = self.planned.compiled(_forward_auxiliary)
        self.pending: tuple[Tensor, Tensor] | None = None

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        n = len(batch.labeled)
        box = cutmix_mask(
            len(batch.weak), batch.weak.shape[2:], batch.weak.device, self.config.cutmix_probability
        )
        weak_v, weak_a, strong = cutmix_all(*((x, box) for x in (*self.weak_logits(batch), batch.strong[0])))
        images = torch.cat([batch.labeled, strong])  # one pass for both streams: CMA looks across them
        dropout = self.config.channel_dropout
        walked_v = self.walk(self.student, images, n, dropout)
        walked_a = self.walk_auxiliary(self.auxiliary, images, self.attention, self.stage, n, dropout)
        onehot, labeled_mask = self.labels.encode(batch.full_target())

        logits_v, logits_a = full_resolution(walked_v.outputs), full_resolution(walked_a.outputs)
        p_v, p_a = self.probabilities(logits_v), self.probabilities(logits_a)
        with torch.no_grad():
            views = (
                torch.cat([strong[:n], weak]) for strong, weak in ((logits_v, weak_v), (logits_a, weak_a))
            )
            sharp_v, sharp_a = (sharpen(z, self.config.sharpening, self.labels) for z in views)
            agreed = self.labels.classes(self.labels.harden(p_v)) & self.labels.classes(
                self.labels.harden(p_a)
            )  # (K', B + U, S)
            right = agreed[:, :n] & self.labels.classes(onehot)
            mask = None
            if labeled_mask is not None:
                right = right & labeled_mask[:, 0].bool()
                mask = torch.cat([labeled_mask.float(), torch.ones_like(p_v[n:, :1])])
        dice_v, dice_a = soft_dice_losses(
            [Compared(p_v[n:], sharp_a[n:]), Compared(p_a[n:], sharp_v[n:])],
            skip_first=not self.labels.has_regions,
        )
        finest_v, finest_a = walked_v.features[-1], walked_a.features[-1]
        self.pending = self.labeled_rows(finest_v[:n], finest_a[:n], right)
        return {
            "supervised": self.supervised_loss(split_batch(walked_v.outputs, n)[0], batch.target),
            "supervised_aux": self.supervised_loss(split_batch(walked_a.outputs, n)[0], batch.target),
            "consistency": mse_consistency(p_v, sharp_a, mask) + mse_consistency(p_a, sharp_v, mask),
            "dice": dice_v + dice_a,
            "correlation": self.correlation_term(finest_v[n:], finest_a[n:], p_v[n:].detach(), agreed[:, n:]),
        }

    def weights(self, t: float) -> dict[str, float]:
        c = self.config
        ramp = gaussian_ramp(t, c.ramp_fraction)
        return {
            "supervised": c.weight_supervised,
            "supervised_aux": c.weight_supervised,
            "consistency": c.weight_consistency * ramp,
            "dice": c.weight_dice * ramp,
            "correlation": c.weight_correlation * ramp,
        }

    def after_step(self, batch: SemiBatch, t: float) -> None:
        if self.pending is not None:
            self.bank.push([self.case_index[case] for case in batch.labeled_cases], *self.pending)
            self.pending = None

    @torch.no_grad()
    def weak_logits(self, batch: SemiBatch) -> tuple[Tensor, Tensor]:
        """Logits (U, K, S) of v and a on the weak views; a as in training, with CMA across labeled and
        unlabeled samples."""
        images = torch.cat([batch.labeled, batch.weak])
        walked_a = self.walk_auxiliary(self.auxiliary, images, self.attention, self.stage)
        unlabeled_a = split_batch(walked_a.outputs, len(batch.labeled))[1]
        return full_resolution(self.student(batch.weak)), full_resolution(unlabeled_a)

    @torch.no_grad()
    def labeled_rows(self, features_v: Tensor, features_a: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """What the bank receives after the step: rows (K', B, P, E) and which are valid (K', B, P).

        features: (B, F, S); right: (K', B, S), voxels of class k that both networks call k.
        """
        classes, n = right.shape[:2]
        index, valid = (
            x.unflatten(0, (classes, n))
            for x in sample_members(right.flatten(2).flatten(0, 1), self.config.rows)
        )
        voxels = right[0, 0].numel()
        index = index + voxels * torch.arange(n, device=index.device)[:, None]  # counted sample after sample
        rows_v, rows_a = (
            in_float32(head.projector, gather_voxels(f, index))
            for head, f in ((self.head_v, features_v), (self.head_a, features_a))
        )
        return (rows_v + rows_a) / 2, valid

    def correlation_term(self, features_v: Tensor, features_a: Tensor, p_v: Tensor, agreed: Tensor) -> Tensor:
        """L_o. features: (U, F, S); p_v: (U, K, S), detached; agreed: (K', U, S)."""
        limit = min(self.config.queries, math.ceil(self.config.query_share * agreed[0].numel()))
        by_class = self.config.correlation == "classes"
        if by_class:
            index, query_valid = sample_members(agreed.flatten(1), limit)
        else:
            certainty = self.labels.class_probabilities(p_v)
            index, query_valid = top_members(certainty.flatten(1), agreed.flatten(1), limit)
        q_v, q_a = (
            head(gather_voxels(f, index))
            for head, f in ((self.head_v, features_v), (self.head_a, features_a))
        )
        rows, filled = self.bank.sample(self.config.rows)
        row_valid = filled & (filled.sum(1, keepdim=True) >= self.config.rows)
        if by_class:
            return class_correlation(q_v, q_a, rows, query_valid, row_valid, self.config.temperature)
        return omni_correlation(
            q_v.flatten(0, 1),
            q_a.flatten(0, 1),
            rows.flatten(0, 1),
            query_valid.flatten(),
            row_valid.flatten(),
            self.config.temperature,
        )


class CorrelationHead(nn.Module):
    """Projector and predictor, two-layer MLPs on gathered feature vectors (..., F) -> (..., E), not
    normalised; float32 under autocast too."""

    def __init__(self, features: int, embedding: int) -> None:
        super().__init__()
        self.projector, self.predictor = (_mlp(width, embedding) for width in (features, embedding))

    def forward(self, x: Tensor) -> Tensor:
        return in_float32(self.predictor, in_float32(self.projector, x))


def _mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(inplace=True), nn.Linear(width, width))


def _forward_auxiliary(
    network: Any, x: Tensor, attention: nn.Module, stage: int, clean: int | None = None, dropout: float = 0.0
) -> Walk:
    """As `forward_streams`, with attention behind an encoder stage."""
    return forward_streams(
        network,
        x,
        clean,
        dropout,
        modulate=lambda s, features: attention(features) if s == stage else features,
    )
