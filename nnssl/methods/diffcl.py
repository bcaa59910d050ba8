"""Diff-CL: cross pseudo-supervision of a diffusion and a convolutional network (arXiv 2503.09408).

    L   = L_sup(f) + mu(t) (L_p(f) + eta L_cl)  +  L_s(g) + mu(t) L_p(g)
    L_sup(f) = nnU-Net's loss of f(x_l) against y_l
    L_s(g)   = nnU-Net's loss of g(x_tau, tau, x_l) against y_l,    x_tau from x_0 = b (2 onehot(y_l) - 1)
    L_p(f)   = CE + Dice of f(x_s) against harden p, p = (p_f + p_g) / 2, where p is certain
    L_p(g)   = CE + Dice of g(x_tau, tau, x_s) against y_f = harden p_f, x_tau from x_0 = b (2 y_f - 1),
               where p_f is certain
    L_cl     = InfoNCE, anchor c_k, positives from the unlabeled voxels called k of middling similarity to
               c_k, negatives from those called otherwise

f           student, the planned network with a high-frequency Mamba (HFM) behind one encoder stage; deployed
g           the planned architecture again, input image + noisy label channels, conditioned on the diffusion
            step tau; never ships
p_f, p_g    probabilities(f(x_w)); DDIM_S(g, x_w) from pure noise; certain: max_k p >= threshold
x_w, x_s    weak and strong view of the same unlabeled patch, voxels in correspondence; x_s with CutMix boxes,
            pseudo-labels cut alike
q           unit embeddings of the last decoder stage of f; c_k = mean of a bank of labeled embeddings of
            class k, detached
mu(t)       Gaussian ramp over the first 40 % of training

Differs from the paper:
- Strong views with CutMix and channel dropout (Yang et al., CVPR 2023) instead of independent augmentation:
  planned networks have no dropout layers.
- f learns what both say together instead of y_g: where they differ, their mean is undecided. In short
  schedules g is certain before it knows; `self_teaching` false: y_g alone, where p_g is certain.
- From a pretrained network g starts as that network, blind to the noisy labels, instead of afresh.
- No moving averages: in short schedules they lag behind f.
- Label maps are scaled by b < 1: at b = 1 a blur of x_tau finds the labels again at most noise levels, and g
  need not look at the image.
- L_cl moves its head at full rate and the shared features at eta: a small weight alone would slow both.
- Positives are of middling similarity, negatives all voxels called otherwise: the most and the least similar
  ones, the paper's, soon teach nothing.
- Similarities are computed on a random subset of the certain voxels of each class: for the cost.
- g learns from a share of the patches of a step: for the cost.
- Regions are independent +-b channels. Ignored voxels are 0 in x_0 and carry no loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl.banks import ClassBank
from nnssl.batch import SemiBatch
from nnssl.config import (
    Config,
    Count,
    NonNegative,
    OpenShare,
    PositiveShare,
    Range,
    Share,
    Temperature,
    Voxels,
    Width,
)
from nnssl.data.mixing import cutmix_all, cutmix_mask
from nnssl.diffusion.gaussian import GaussianDiffusion
from nnssl.distributed import world_size
from nnssl.losses.contrastive import info_nce
from nnssl.losses.pseudo_label import Compared, confidence_mask, cross_entropy_dices
from nnssl.method import SUPERVISED, Outputs, SemiMethod, full_resolution, inactive, inference, split_batch
from nnssl.networks.dropout import forward_streams
from nnssl.networks.heads import VoxelProjector, scale_gradient
from nnssl.networks.hf_mamba import describe_hfm, insert_hfm
from nnssl.networks.time_conditioned import TimeConditionedUNet
from nnssl.sampling import gather_voxels, sample_members, top_members
from nnssl.schedules import gaussian_ramp


@dataclass(frozen=True)
class DiffCLConfig(Config):
    weight_pseudo: NonNegative = 0.5  # mu: largest weight of L_p, of both networks (ours)
    # eta: share of L_cl's gradient that reaches the features of f (ours; at 0.1 it moves f as much as L_sup)
    weight_contrast: Share = 0.01
    # whether f learns from the mean of p_f and p_g; otherwise from p_g alone (ours)
    self_teaching: bool = True
    threshold: Share = 0.95  # confidence above which a pseudo-label of f or g counts (ours)
    # share of channels that f's encoder features of x_s lose (UniMatch)
    channel_dropout: Share = 0.5
    cutmix_probability: Share = 0.5  # probability of a CutMix box in a sample of x_s (ours)
    ramp_fraction: Share = 0.4  # t_ramp: share of the training over which mu rises (ours, as in CAML)
    diffusion_steps: Annotated[int, Range(1, 10_000)] = 1000  # T: steps of the diffusion (Diff-CL)
    ddim_steps: Count = 1  # S: sampling steps (ours)
    # (tau_0 + 1) / T: 1: sampling starts from pure noise, as published; below: from p_f with as much noise
    sampling_start: PositiveShare = 1.0
    label_scale: PositiveShare = 0.1  # b: scale of x_0 (input scaling of Chen, arXiv 2301.10972; value ours)
    # k: exponent of tau = T u^(1/k), u uniform; above 1, high noise is drawn more often (ours)
    noise_power: Annotated[float, Range(0.1, 100)] = 1.0
    # share of a step's labeled and unlabeled patches that g learns from: its cost; 0: no diffusion (ours)
    denoiser_share: Share = 0.5
    denoiser_divisor: Annotated[int, Range(1, 64)] = 1  # planned features over those of g (ours)
    embedding: Width = 64  # E: width of q (ours)
    bank_size: Count = 1024  # labeled embeddings per class in the bank (ours)
    bank_per_step: Count = 64  # embeddings per class that a step renews (ours)
    candidates: Count = 4096  # unlabeled voxels per class whose similarities are computed (ours)
    # share of a class's voxels, those of middling similarity, that positives are drawn from (ours)
    positive_fraction: PositiveShare = 0.5
    num_positives: Count = 256  # positives per class, at most (ours)
    num_negatives: Count = 512  # negatives per class, at most (ours)
    temperature: Temperature = 0.1  # temperature of L_cl (Diff-CL)
    hfm_stages: Annotated[int, Range(0, 64)] = 1  # encoder stages with an HFM; 0: none (Diff-CL)
    # the first stage with at most this many voxels in a patch gets an HFM (ours)
    hfm_max_tokens: Voxels = 8192
    # share of Nyquist along the finest axis below which frequencies are removed (ours)
    hfm_cutoff: OpenShare = 0.25
    hfm_state: Width = 8  # state per channel of Mamba (ours; Mamba: 16)

    def check(self) -> None:
        """`ddim_steps` <= `sampling_start` * `diffusion_steps`; `bank_per_step` <= `bank_size`."""
        if self.ddim_steps > self.sampling_start * self.diffusion_steps:
            raise ValueError(
                f"ddim_steps must be at most sampling_start * diffusion_steps, found {self.ddim_steps}, "
                f"{self.sampling_start} and {self.diffusion_steps}"
            )
        if self.bank_per_step > self.bank_size:
            raise ValueError(
                f"bank_per_step must not exceed bank_size {self.bank_size}, found {self.bank_per_step}"
            )


class DiffCL(SemiMethod):
    name = "DiffCL"
    config_class = DiffCLConfig
    meaning: ClassVar[Mapping[str, str]] = {
        "supervised": SUPERVISED,
        "pseudo": "Cross-entropy and Dice of the student on the strong view against what the student and the "
        "diffusion network, on the weak view, are certain of together.",
        "contrast": "InfoNCE: voxels of a class are pulled together and away from voxels of other classes.",
        "diffusion": "nnU-Net's loss of the diffusion network on labeled patches.",
        "diffusion_pseudo": "Cross-entropy and Dice of the diffusion network against the student's certain "
        "pseudo-labels.",
        "f_certain": "Share of the unlabeled voxels of which the student is certain.",
        "g_certain": "Share of those of which the diffusion network is certain.",
        "g_adds": "Share of those of which the two are certain together, and the student alone is not.",
        "g_withholds": "Share of those of which the student alone is certain, and the two together are not: "
        "nothing is learned.",
        "g_outvotes": "Share of those that the two together call otherwise than the student alone does.",
    }
    config: DiffCLConfig
    fresh_blocks = (".hfm.",)
    network_keys = ("hfm_stages", "hfm_max_tokens", "hfm_cutoff", "hfm_state")

    @classmethod
    def adapt_network(
        cls, network: nn.Module, config: Any, patch_size: tuple[int, ...], spacing: tuple[float, ...]
    ) -> nn.Module:
        """The planned network with its HFM."""
        if config.hfm_stages == 0:
            return network
        return insert_hfm(
            network,
            patch_size,
            spacing,
            max_tokens=config.hfm_max_tokens,
            num_stages=config.hfm_stages,
            cutoff=config.hfm_cutoff,
            d_state=config.hfm_state,
        )

    def build(self) -> None:
        c, k = self.config, self.labels.channels
        self.diffusion = GaussianDiffusion(c.diffusion_steps)
        self.denoiser = TimeConditionedUNet(
            self.planned.build_network(self.planned.input_channels + k, k, c.denoiser_divisor)
        )
        self.projector = VoxelProjector(self.student.encoder.output_channels[0], c.embedding)
        self.bank = ClassBank(self.labels.num_classes, c.bank_size, c.embedding)
        self.walk = self.planned.compiled(forward_streams)
        self.pending: tuple[Tensor, Tensor] | None = None

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        n = len(batch.labeled)
        p_f, p_g = self.pseudo_probabilities(batch.weak)
        box = cutmix_mask(
            len(batch.weak), batch.weak.shape[2:], batch.weak.device, self.config.cutmix_probability
        )
        p_f, p_g, strong = cutmix_all(*((x, box) for x in (p_f, p_g, batch.strong[0])))
        p = self.taught(p_f, p_g)
        pseudo_f, certain_f = self.labels.harden(p_f), self.accepted(p_f, t)
        pseudo, certain = self.labels.harden(p), self.accepted(p, t)
        onehot, labeled_mask = self.labels.encode(batch.full_target())
        images = torch.cat([batch.labeled, strong])  # one pass for both streams, through f and through g

        walked = self.walk(self.student, images, n, self.config.channel_dropout)
        labeled_f, unlabeled_f = split_batch(walked.outputs, n)

        compared = [Compared(full_resolution(unlabeled_f), pseudo, certain)]
        if self.config.denoiser_share > 0:
            i, j = (self.denoised(len(x)).to(x.device, non_blocking=True) for x in (batch.labeled, strong))
            x_0 = self.label_map(torch.cat([onehot[i], pseudo_f[j]]))
            if labeled_mask is not None:
                x_0[: len(i)] *= labeled_mask[i]
            tau = self.diffusion.draw_steps(len(x_0), x_0.device, self.config.noise_power)
            noisy = self.diffusion.q_sample(x_0, tau, torch.randn_like(x_0))
            outputs_g = self.denoiser(noisy, tau, images[torch.cat([i, n + j])])
            labeled_g, unlabeled_g = split_batch(outputs_g, len(i))
            target_g = [y[i] for y in batch.target] if isinstance(batch.target, list) else batch.target[i]
            compared.append(Compared(full_resolution(unlabeled_g), pseudo_f[j], certain_f[j]))

        if self.config.weight_contrast > 0:
            contrast = self.contrast(walked.features[-1], n, onehot, labeled_mask, pseudo_f, certain_f)
        else:
            contrast = inactive(self.projector.parameters())
        self.count_accepted(pseudo, certain)
        self.diagnostics = {"f_certain": certain_f.mean()}
        of_f, *of_g = cross_entropy_dices(compared, self.labels)
        terms = {
            "supervised": self.supervised_loss(labeled_f, batch.target),
            "pseudo": of_f,
            "contrast": contrast,
        }
        if self.config.denoiser_share == 0:
            off = inactive(self.denoiser.parameters())
            return {**terms, "diffusion": off, "diffusion_pseudo": off}
        differs = (pseudo != pseudo_f).any(1, keepdim=True)
        self.diagnostics |= {
            "g_certain": self.accepted(p_g, t).mean(),
            "g_adds": (certain * (1 - certain_f)).mean(),
            "g_withholds": (certain_f * (1 - certain)).mean(),
            "g_outvotes": differs.float().mean(),
        }
        return {
            **terms,
            "diffusion": self.supervised_loss(labeled_g, target_g),
            "diffusion_pseudo": of_g[0],
        }

    def accepted(self, p: Tensor, t: float) -> Tensor:
        """Of the student's own: where they teach the denoiser."""
        return confidence_mask(p, self.config.threshold, self.labels)

    def is_unlabeled(self, term: str) -> bool:
        return term in ("pseudo", "contrast", "diffusion_pseudo")

    def weights(self, t: float) -> dict[str, float]:
        mu = self.config.weight_pseudo * gaussian_ramp(t, self.config.ramp_fraction)
        return {
            "supervised": 1.0,
            "pseudo": mu,
            "contrast": mu if self.config.weight_contrast > 0 else 0.0,
            "diffusion": float(self.config.denoiser_share > 0),
            "diffusion_pseudo": mu * (self.config.denoiser_share > 0),
        }

    def after_step(self, batch: SemiBatch, t: float) -> None:
        if self.pending is not None:
            self.bank.push(*self.pending)
            self.pending = None

    def describe(self) -> str:
        return describe_hfm(self.student, self.planned.patch_size)

    def pseudo_probabilities(self, weak: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """p_f and p_g (U, K, S) for weak views (U, C, S), without gradient; p_f twice without diffusion.

        noise: (U, K, S), where the chains start; drawn if None.
        """
        c = self.config
        with inference(self.student, self.denoiser):
            p_f = self.probabilities(full_resolution(self.student(weak)))
            if c.denoiser_share == 0:
                return p_f, p_f
            x_tau = torch.randn_like(p_f) if noise is None else noise
            taus = self.diffusion.trailing_steps(c.ddim_steps, c.sampling_start)
            if c.sampling_start < 1:
                first = torch.full((len(p_f),), taus[0], device=p_f.device)
                x_tau = self.diffusion.q_sample(self.label_map(p_f), first, x_tau)
            x_0 = self.diffusion.ddim_sample(
                lambda x, tau: self.estimate(self.denoiser(x, tau, weak)), x_tau, taus
            )
            return p_f, self.shares(x_0)

    def denoised(self, n: int) -> Tensor:
        """Which of n patches g learns from in this step: drawn, because their places in a batch differ (the
        last ones hold foreground)."""
        k = max(1, round(n * self.config.denoiser_share))
        return torch.arange(n) if k == n else torch.randperm(n)[:k]

    def taught(self, p_f: Tensor, p_g: Tensor) -> Tensor:
        """What f learns, before it is hardened: (U, K, S)."""
        return (p_f + p_g) / 2 if self.config.self_teaching else p_g

    def estimate(self, outputs: Outputs) -> Tensor:
        """x0_hat in [-b, b] from the denoiser's outputs."""
        return self.label_map(self.probabilities(full_resolution(outputs)))

    def label_map(self, shares: Tensor) -> Tensor:
        """x_0 in [-b, b] from one-hot labels or probabilities."""
        return self.config.label_scale * (2 * shares - 1)

    def shares(self, x_0: Tensor) -> Tensor:
        """The inverse of `label_map`."""
        return (x_0 / self.config.label_scale + 1) / 2

    def contrast(
        self,
        features: Tensor,
        n: int,
        onehot: Tensor,
        labeled_mask: Tensor | None,
        called: Tensor,
        certain: Tensor,
    ) -> Tensor:
        """L_cl, and the labeled embeddings that the bank will receive after the step.

        Args:
            features: (B + U, F, S) of the last decoder stage.
            n: B.
            onehot: labels (B, K, S); labeled_mask (B, 1, S) or None.
            called: y_f, (U, K, S) zeros and ones; certain: (U, 1, S), where it counts.
        """
        c = self.config
        member = self.labels.classes(onehot)
        if labeled_mask is not None:
            member = member & labeled_mask[:, 0].bool()
        index, valid = sample_members(member.flatten(1), -(-c.bank_per_step // world_size()))
        with torch.no_grad():
            self.pending = self.projector(gather_voxels(features[:n].detach(), index)), valid

        center, known = self.bank.mean()
        center = F.normalize(center, dim=-1)
        member = (self.labels.classes(called) & certain[:, 0].bool()).flatten(1)  # (K', U * V)
        index, valid = sample_members(member, c.candidates)
        gathered = scale_gradient(gather_voxels(features[n:], index), c.weight_contrast)
        q = self.projector(gathered)  # (K', N, E): candidates that f calls k
        everything = q.flatten(0, 1)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            own = torch.einsum("kne,ke->kn", q, center)
            positive, positive_valid = _sample_middle_share(
                own, valid & known[:, None], c.positive_fraction, c.num_positives
            )
            called_other = ~member[
                :, index.flatten()
            ]  # regions overlap: a candidate of one may be called another too
            negative, negative_valid = sample_members(
                valid.flatten() & called_other & known[:, None], c.num_negatives
            )
        return info_nce(
            center,
            torch.gather(q, 1, positive[..., None].expand(-1, -1, q.shape[-1])),
            everything[negative],
            positive_valid,
            negative_valid,
            c.temperature,
        )


def _sample_middle_share(score: Tensor, member: Tensor, fraction: float, n: int) -> tuple[Tensor, Tensor]:
    """Up to n places drawn from the members of every row whose rank by score is in its middle share. Shapes
    as in `top_members`."""
    order, valid = top_members(score, member, score.shape[1])
    count, rank = member.sum(1, keepdim=True), torch.arange(order.shape[1], device=order.device)
    left_out = ((1 - fraction) / 2 * count).floor()  # at either end
    drawn, drawn_valid = sample_members(valid & (rank >= left_out) & (rank < count - left_out), n)
    return order.gather(1, drawn), drawn_valid
