"""ACTION: anatomical-aware contrastive distillation in three phases (You et al., IPMI 2023).

    phase 1, encoder, unlabeled patches alone   L = L_g
    phase 2, encoder and decoder                L = L_sup + L_g + L_l
    phase 3                                     L = L_sup + L_u + lambda_a L_a

    L_sup = nnU-Net's loss of f(x_l) against y_l
    L_g   = KL( softmax_j(z . m_j / T_t) || softmax_j(s . m_j / T_s) ) over z itself and the rows of a bank
    L_l   = the same on crops of the logits, labeled and unlabeled
    L_u   = w CE of f(x_m) against harden p_m
    L_a   = hard voxels of f against class means, with class-aware negatives (`anatomical_contrast`)

f          student, the planned network; deployed
f_ema      teacher: exponential moving average of f, set to f at the start of phase 3; no gradient; may be
           deployed instead ("deploy": "teacher")
x_w, x_s   weak and strong view of the same unlabeled patch, voxels in correspondence
x_m, p_m   x_s and probabilities f_ema(x_w), both with the same ClassMix in half of the samples
w          share of the voxels of p_m above 0.97
s, z       unit embeddings: predictor(projector(f)) and projector_ema(f_ema), of pooled bottlenecks in L_g
m_j        z, then z of earlier patches of other cases; the 36 images seen last

Differs from the paper:
- One learning rate schedule over the whole run: nnU-Net has one.
- Bottlenecks are pooled by mean and maximum: instance norm nearly fixes the mean of a feature map.
- ClassMix in half of the samples only: otherwise, with few classes, no sample looks like a scan. Of an odd
  number of classes it pastes the larger half.
- z itself is a row, which the student has to tell from the others, and L_g compares embeddings around the
  mean of the bank: otherwise it falls to 0 as all embeddings become the same.
- Crops are the cells of a regular grid, pooled to 8 x 8 or 4 x 4 x 4 logits each: as many in any plan.
- L_a moves its head at full rate and the shared features at lambda_a: a small weight alone would slow both.
- One view of a labeled patch, the same for student and teacher: nnU-Net's augmentation gives one.
- The representation behind L_a is one linear map of all up-sampled decoder stages, so that it is evaluated at
  sampled voxels alone. Class means and negatives come from random candidates of each class.
- A voxel of several regions counts for the last. Ignored voxels are in no class and carry no loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl.banks import EmbeddingBank, case_numbers
from nnssl.batch import SemiBatch
from nnssl.config import Config, Count, Few, NonNegative, Share, Temperature, Width
from nnssl.data.mixing import classmix_mask, cutmix_all
from nnssl.ema import copy_weights, ema_update, frozen_copy
from nnssl.losses.anatomical import anatomical_contrast
from nnssl.losses.distillation import bank_distillation
from nnssl.losses.pseudo_label import confidence_mask, cross_entropies
from nnssl.method import SUPERVISED, TeacherMethod, full_resolution, inactive, inference, split_batch
from nnssl.networks.dropout import forward_streams
from nnssl.networks.features import decode, encode
from nnssl.networks.heads import VoxelProjector, in_float32, scale_gradient
from nnssl.sampling import gather_interpolated

CROP = {2: 8, 3: 4}  # logits per axis of a crop, by the number of axes
# shares of the phases; the first sees no label, and a trained network forgets in it
FROM_SCRATCH, FROM_PRETRAINED = (0.25, 0.25, 0.5), (0.0, 0.25, 0.75)


@dataclass(frozen=True)
class ACTIONConfig(Config):
    # shares of the training that the phases take, with sum 1; 0 leaves a phase out; null: 0.25, 0.25, 0.5
    # (ACTION: 100, 100 and 200 epochs), and 0, 0.25, 0.75 in a run from pretrained weights (ours)
    phase_fractions: tuple[Share, Share, Share] | None = None
    weight_global: NonNegative = 1.0  # weight of L_g (ACTION)
    weight_local: NonNegative = 1.0  # weight of L_l (ACTION)
    weight_pseudo: NonNegative = 1.0  # weight of L_u (ACTION)
    weight_anatomical: Share = 0.01  # lambda_a: share of L_a's gradient that reaches f (ACTION's weight)
    ema_decay: Share = 0.99  # decay of the teacher and its projectors (ACTION)
    temperature_student: Temperature = 0.1  # T_s: temperature of the student's similarities (ACTION)
    temperature_teacher: Temperature = 0.01  # T_t: temperature of the teacher's similarities (ACTION)
    bank_images: Count = 36  # images whose embeddings a bank holds (ACTION)
    own_key: bool = True  # whether z itself is a row of L_g and L_l (ours)
    centered: bool = True  # whether L_g compares embeddings around the mean of its bank (ours)
    crops_per_axis: Few = 2  # cells per axis of the grid of L_l (ours)
    embedding: Width = 128  # width of s, z and of the representation of L_a (ours; public code: 512)
    classmix_probability: Share = 0.5  # probability of ClassMix in a sample of x_m (ours; published: always)
    channel_dropout: Share = 0.0  # share of channels that f's encoder features of x_m lose in phase 3 (ours)
    threshold_pseudo: Share = 0.97  # confidence above which a voxel counts towards w of L_u (ACTION)
    threshold_contrast: Share = 0.7  # confidence above which an unlabeled voxel has a class in L_a (ACTION)
    threshold_hard: Share = 0.97  # probability of its own class below which a voxel is hard (ACTION)
    num_queries: Count = 256  # hard voxels per class, drawn with replacement (ACTION)
    num_negatives: Count = 512  # negatives per hard voxel (ACTION)
    candidates: Count = 4096  # voxels per class that class means and negatives come from (ours)
    temperature: Temperature = 0.5  # temperature of L_a and of the choice of negative classes (ACTION)

    def check(self) -> None:
        """`phase_fractions` have sum 1; with `weight_global` 0 the first of them is 0, too."""
        fractions = list(self.phase_fractions or FROM_SCRATCH)
        if not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
            raise ValueError(f"phase_fractions must be shares with sum 1, found {fractions}")
        if self.weight_global == 0 and fractions[0] > 0:
            raise ValueError(
                "weight_global 0 leaves phase 1 without a loss: set the first of phase_fractions "
                f"{fractions} to 0, too"
            )


class Distillation(nn.Module):
    """One distillation over a bank: projector and predictor of the student, the projector's moving average,
    the bank."""

    def __init__(self, features: int, embedding: int, rows: int) -> None:
        super().__init__()
        self.projector = VoxelProjector(features, embedding)
        self.predictor = VoxelProjector(embedding, embedding)
        self.teacher = frozen_copy(self.projector)
        self.bank = EmbeddingBank(rows, embedding)
        self.pending: tuple[Tensor, Tensor] | None = None

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        cases: Tensor,
        temperature_student: float,
        temperature_teacher: float,
        own_key: bool,
        centered: bool,
    ) -> Tensor:
        """KL over the bank. student, teacher: (N, F) pooled features; cases: (N,) numbers."""
        with torch.autocast(student.device.type, enabled=False):  # differences between embeddings are small
            s = self.predictor(self.projector(student.float()))
            with inference(self.teacher):
                z = self.teacher(teacher.float())
            self.pending = z, cases
            return bank_distillation(
                s,
                z,
                self.bank.embeddings,
                self.bank.others(cases),
                temperature_student,
                temperature_teacher,
                own_key,
                self.bank.mean() if centered else None,
            )

    def after_step(self, decay: float) -> None:
        if self.pending is not None:  # only phases that use the distillation move it
            ema_update(self.teacher, self.projector, decay)
            self.bank.push(*self.pending)
            self.pending = None


class ACTION(TeacherMethod):
    name = "ACTION"
    config_class = ACTIONConfig
    meaning: ClassVar[Mapping[str, str]] = {
        "supervised": SUPERVISED + " Absent in phase 1.",
        "global": "How far the student's view of whole unlabeled patches, relative to those of other "
        "scans, is from the teacher's (phases 1 and 2).",
        "local": "The same of crops (phase 2).",
        "pseudo": "Cross-entropy of mixed unlabeled patches against the teacher's labels, weighted by "
        "the share of confident voxels (phase 3).",
        "anatomical": "Contrast between hard voxels and class means (phase 3).",
    }
    config: ACTIONConfig

    def build(self) -> None:
        c, encoder = self.config, self.student.encoder
        self.grid = tuple(min(c.crops_per_axis, n) for n in self.planned.patch_size)
        super().build()
        self.distillation_global = Distillation(2 * encoder.output_channels[-1], c.embedding, c.bank_images)
        self.distillation_local = Distillation(
            self.labels.channels * CROP[len(self.grid)] ** len(self.grid),
            c.embedding,
            c.bank_images * math.prod(self.grid),
        )
        self.representation = nn.Linear(
            sum(encoder.output_channels[:-1]), c.embedding
        )  # a decoder stage is as wide as its skip
        self.phase = 1  # a part of the state: the teacher is reset once, also over continued runs
        self.encode, self.decode = self.planned.compiled(encode), self.planned.compiled(decode)
        self.walk = self.planned.compiled(forward_streams)

    def get_extra_state(self) -> int:
        return self.phase

    def set_extra_state(self, state: int) -> None:
        self.phase = state

    def phase_at(self, t: float) -> int:
        """1, 2 or 3; phases without a share of the training do not occur."""
        present = [
            (i, end) for i, (f, end) in enumerate(zip(self.fractions, self.ends(), strict=True), 1) if f > 0
        ]
        return next((i for i, end in present if t < end), present[-1][0])

    def ends(self) -> list[float]:
        return list(accumulate(self.fractions))

    @property
    def fractions(self) -> tuple[float, float, float]:
        return self.config.phase_fractions or (FROM_PRETRAINED if self.pretrained else FROM_SCRATCH)

    def before_step(self, t: float) -> None:
        phase = self.phase_at(t)
        if phase == 3 and self.phase != 3:
            copy_weights(self.teacher, self.student)
        self.phase = phase

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        phases = (self.global_distillation, self.local_distillation, self.anatomical_training)
        active = phases[self.phase_at(t) - 1](batch)
        off = inactive(p for p in self.parameters() if p.requires_grad)
        return {k: active.get(k, off) for k in self.weights(t)}

    def weights(self, t: float) -> dict[str, float]:
        c, phase = self.config, self.phase_at(t)
        return {
            "supervised": float(phase > 1),
            "global": c.weight_global * (phase < 3),
            "local": c.weight_local * (phase == 2),
            "pseudo": c.weight_pseudo * (phase == 3),
            "anatomical": float(phase == 3 and c.weight_anatomical > 0),
        }

    def after_step(self, batch: SemiBatch, t: float) -> None:
        super().after_step(batch, t)
        decay = self.config.ema_decay
        self.distillation_global.after_step(decay)
        self.distillation_local.after_step(decay)

    def announce(self, t: float) -> str:
        phase = self.phase_at(t)
        what = ("global distillation, without labels", "local distillation", "anatomical contrast")[phase - 1]
        return f"phase {phase} of 3, {what}, until {self.ends()[phase - 1]:.0%} of the training"

    # phase 1

    def global_distillation(self, batch: SemiBatch) -> dict[str, Tensor]:
        """Encoders only."""
        with inference(self.teacher):
            skips_teacher = self.encode(self.teacher, batch.weak)
        skips = self.encode(self.student, batch.strong[0])
        return {"global": self.global_term(skips[-1], skips_teacher[-1], batch)}

    def global_term(self, student: Tensor, teacher: Tensor, batch: SemiBatch) -> Tensor:
        """L_g from bottlenecks (U, F, S)."""
        cases = case_numbers(batch.unlabeled_cases, student.device)
        of = self.distillation_global
        return self.distil(of, pool(student), pool(teacher), cases, self.config.centered)

    def distil(
        self, of: Distillation, student: Tensor, teacher: Tensor, cases: Tensor, centered: bool = False
    ) -> Tensor:
        c = self.config
        return of(student, teacher, cases, c.temperature_student, c.temperature_teacher, c.own_key, centered)

    # phase 2

    def local_distillation(self, batch: SemiBatch) -> dict[str, Tensor]:
        n = len(batch.labeled)
        with inference(self.teacher):
            skips_teacher = self.encode(self.teacher, torch.cat([batch.labeled, batch.weak]))
            outputs_teacher = self.decode(self.teacher, skips_teacher).outputs
        skips = self.encode(self.student, torch.cat([batch.labeled, batch.strong[0]]))
        decoded = self.decode(self.student, skips)
        cases = case_numbers((*batch.labeled_cases, *batch.unlabeled_cases), batch.labeled.device)
        crops = [crop_cells(full_resolution(o), self.grid) for o in (decoded.outputs, outputs_teacher)]
        return {
            "supervised": self.supervised_loss(split_batch(decoded.outputs, n)[0], batch.target),
            "global": self.global_term(skips[-1][n:], skips_teacher[-1][n:], batch),
            "local": self.distil(
                self.distillation_local,
                crops[0].flatten(0, 1),
                crops[1].flatten(0, 1),
                cases.repeat_interleave(math.prod(self.grid)),
            ),
        }

    # phase 3

    def anatomical_training(self, batch: SemiBatch) -> dict[str, Tensor]:
        n = len(batch.labeled)
        p_w = self.teach(batch.weak)
        pasted = classmix_mask(self.labels.classes(self.labels.harden(p_w)))
        pasted = pasted & (
            torch.rand(len(pasted), *[1] * (pasted.ndim - 1), device=pasted.device)
            < self.config.classmix_probability
        )
        p_m, x_m = cutmix_all((p_w, pasted), (batch.strong[0], pasted))
        pseudo = self.labels.harden(p_m)

        images = torch.cat([batch.labeled, x_m])
        walked = self.walk(self.student, images, n, self.config.channel_dropout)
        labeled, unlabeled = split_batch(walked.outputs, n)
        certain = self.accepted(p_m, 1.0)
        self.count_accepted(pseudo, certain)
        share = certain.mean(tuple(range(1, p_m.ndim)), keepdim=True)
        onehot, labeled_mask = self.labels.encode(batch.full_target())
        if labeled_mask is None:
            labeled_mask = torch.ones_like(onehot[:, :1], dtype=torch.bool)
        counted = torch.cat(
            [labeled_mask, confidence_mask(p_m, self.config.threshold_contrast, self.labels).bool()]
        )
        return {
            "supervised": self.supervised_loss(labeled, batch.target),
            "pseudo": (share * cross_entropies(full_resolution(unlabeled), pseudo, self.labels)).mean(),
            "anatomical": self.contrast(
                walked.features, full_resolution(walked.outputs), torch.cat([onehot, pseudo]), counted
            ),
        }

    def accepted(self, p: Tensor, t: float) -> Tensor:
        """What counts towards w."""
        return confidence_mask(p, self.config.threshold_pseudo, self.labels)

    def contrast(self, features: list[Tensor], logits: Tensor, onehot: Tensor, counted: Tensor) -> Tensor:
        """L_a over the voxels of both streams.

        Args:
            features: (B + U, F_s, S_s) of every decoder stage.
            logits: (B + U, K, S).
            onehot: labels and pseudo-labels (B + U, K, S); counted: (B + U, 1, S) bool, where they hold.
        """
        c, size = self.config, logits.shape[2:]
        with torch.no_grad():
            member = self.labels.classes(onehot) & counted[:, 0]
            if self.labels.has_regions:
                member &= member.flip(0).cumsum(0).flip(0) == 1  # of overlapping regions the last one
            hard = self.labels.class_probabilities(self.probabilities(logits)) < c.threshold_hard

        features = [scale_gradient(f, c.weight_anatomical) for f in features]

        def represent(index: Tensor) -> Tensor:
            sampled = torch.cat([gather_interpolated(f, index, size) for f in features], -1)
            return in_float32(self.representation, sampled)

        return anatomical_contrast(
            represent,
            member.flatten(1),
            hard.flatten(1),
            num_queries=c.num_queries,
            num_negatives=c.num_negatives,
            temperature=c.temperature,
            num_candidates=c.candidates,
        )


def pool(features: Tensor) -> Tensor:
    """(B, F, S) -> (B, 2 F): mean and maximum over space."""
    features = features.flatten(2).float()
    return torch.cat([features.mean(2), features.amax(2)], 1)


def crop_cells(logits: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(B, K, S) -> (B, cells, K n^d): the cells of a grid, each pooled to n = CROP[d] logits per axis, which
    keep the shape of what is in it."""
    axes, n = len(grid), CROP[len(grid)]
    pooling: Callable[..., Tensor] = F.adaptive_avg_pool3d if axes == 3 else F.adaptive_avg_pool2d
    pooled = pooling(logits.float(), [n * cells for cells in grid])
    for axis in range(axes):  # (B, K, g_1, n, g_2, n, ...)
        pooled = pooled.unflatten(2 + 2 * axis, (grid[axis], n))
    cells, inside = (list(range(first, 2 + 2 * axes, 2)) for first in (2, 3))
    return pooled.permute(0, *cells, 1, *inside).flatten(1 + axes).flatten(1, axes)
