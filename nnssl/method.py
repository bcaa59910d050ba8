"""The one abstraction: what one paper adds to supervised nnU-Net training, and nothing else."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from nnssl.batch import SemiBatch, Target
from nnssl.config import Config
from nnssl.ema import copy_weights, ema_update, frozen_copy
from nnssl.labels import LabelSpace

Outputs = Tensor | list[Tensor]
F = TypeVar("F", bound=Callable)
SUPERVISED = "nnU-Net's loss (cross-entropy and Dice, at every scale) of the student on labeled patches."


@dataclass(frozen=True)
class Planned:
    """What nnU-Net planned, as far as a method may need it.

    build_network    (input channels, output channels, divisor of all features = 1) -> a fresh network of the
                     planned architecture, same deep supervision
    input_channels   C of an image, with those of a cascade's previous stage
    labels           how logits are read
    patch_size       voxels per axis
    spacing          mm per axis of the preprocessed volumes, same length as patch_size
    supervised_loss  nnU-Net's own compound loss: (network outputs, target) -> scalar
    labeled_cases    names of all labeled training cases, sorted
    unlabeled_cases  names of all unlabeled ones, sorted
    mirror_axes      axes of a patch that may be mirrored
    steps            training steps of the whole run
    compile          whether to torch.compile networks and network walks
    previous         of the input channels the last ones that are a cascade's previous segmentation, one-hot:
                     no noise on these
    """

    build_network: Callable[..., nn.Module]
    input_channels: int
    labels: LabelSpace
    patch_size: tuple[int, ...]
    spacing: tuple[float, ...]
    supervised_loss: Callable[[Any, Target], Tensor]
    labeled_cases: tuple[str, ...] = ()
    unlabeled_cases: tuple[str, ...] = ()
    mirror_axes: tuple[int, ...] = ()
    steps: int = 250_000
    compile: bool = False
    previous: int = 0

    @property
    def scale_weights(self) -> tuple[float, ...]:
        """Weights of the deep supervision scales in `supervised_loss`, finest first."""
        return tuple(float(w) for w in getattr(self.supervised_loss, "weight_factors", (1.0,)))

    def compiled(self, function: F) -> F:
        """`torch.compile(function)` where compilation is on, else the function itself."""
        if not self.compile:
            return function
        return torch.compile(function)  # type: ignore[return-value]  # it keeps the signature


class SemiMethod(nn.Module):
    """Base of all methods. Student, teachers, second networks, heads and banks are submodules and buffers:
    they are saved, moved to the device and wrapped for several GPUs together. A subclass writes `build`,
    `terms` and `weights`; everything else is optional.

    name               key of the method's section in the plans file
    config_class       its keys: a frozen dataclass with the base `Config`
    needs_unlabeled    whether there is an unlabeled stream at all
    num_strong_views   strong views per unlabeled patch
    agreement          value of the key `agreement` where the plans file leaves it open
    fresh_blocks       parts of the names of the student's tensors that the planned network lacks, so that
                       -pretrained_weights leaves them as they are
    network_keys       keys of the configuration that `adapt_network` reads: with another value the same
                       weights are another function
    per_case           buffers with an entry per case: `labeled` or `unlabeled`, and its axis; a continued run
                       finds them by name, though cases came or went
    meaning            a sentence about every term, and about every diagnostic, for reports
    diagnostics        further detached scalars of the last step, logged as epoch means beside the terms; the
                       same keys in every step
    acceptance         of the last step: `count_accepted`; None where every pseudo-label is taken
    pretrained         whether this run began with -pretrained_weights; known before the first step

    A step is `before_step`, `terms`, backward pass and optimizer, `after_step`. `terms` changes nothing that
    is saved: called twice with the same random state, it gives the same losses. It may leave behind
    `diagnostics`, which are only logged, and `pending`, the rows that `after_step` will write to a bank.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[Config]]
    needs_unlabeled: ClassVar[bool] = True
    num_strong_views: ClassVar[int] = 1
    agreement: ClassVar[bool] = False
    fresh_blocks: ClassVar[tuple[str, ...]] = ()
    network_keys: ClassVar[tuple[str, ...]] = ()
    per_case: ClassVar[Mapping[str, tuple[str, int]]] = {}
    meaning: ClassVar[Mapping[str, str]] = {}

    student: Any  # a planned network: nn.Module with encoder and decoder

    def __init__(self, student: nn.Module, config: Any, planned: Planned) -> None:
        super().__init__()
        self.student = student
        self.config = config
        self.planned = planned
        self.labels = planned.labels
        self.diagnostics: dict[str, Tensor] = {}
        self.acceptance: Tensor | None = None
        self.pretrained = False
        self.build()

    @classmethod
    def adapt_network(
        cls, network: nn.Module, config: Any, patch_size: tuple[int, ...], spacing: tuple[float, ...]
    ) -> nn.Module:
        """The deployed network, from the planned one. Called in training and in inference; default: the
        planned network itself."""
        return network

    def build(self) -> None:
        """Create copies, further networks, heads and banks as attributes."""

    def make_copies(self) -> None:
        """(Re)make what is a copy of the student; called once before the first step of a fresh run, after any
        pretrained weights."""

    def is_unlabeled(self, term: str) -> bool:
        """Whether a term is learned from unlabeled scans: then the key `agreement` weighs it."""
        return not term.startswith("supervised")

    def before_step(self, t: float) -> None:
        """Before the step at progress t: changes of phase. Default: nothing."""

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        """Unweighted scalar losses, with gradient. t: training progress in [0, 1]."""
        raise TypeError(f"{type(self).__name__} must define terms()")

    def weights(self, t: float) -> dict[str, float]:
        """lambda_k(t), with the same keys as `terms`."""
        raise TypeError(f"{type(self).__name__} must define weights()")

    def after_step(self, batch: SemiBatch, t: float) -> None:
        """After the optimizer's step (not after a skipped one): averages, banks."""

    def describe(self) -> str:
        """One line for the log about what was decided from the plan; default: nothing to say."""
        return ""

    def announce(self, t: float) -> str:
        """One line about what the method does now, asked at the start of every epoch and logged when it
        changes; default: nothing."""
        return ""

    def accepted(self, p: Tensor, t: float) -> Tensor | None:
        """Where pseudo-labels made of probabilities p (U, K, S) teach at progress t: (U, 1, S), above 0
        there. None: everywhere, or not to be told from p."""
        return None

    def deployed(self, which: str) -> nn.Module:
        """The network that becomes the model. which: `student` or `teacher` (config key `deploy`)."""
        if which != "student":
            raise ValueError(
                f'"deploy": "{which}" is not possible with {self.name}: it has no averaged network of the '
                'planned shape; use "student"'
            )
        return self.student

    def forward(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        return self.terms(batch, t)

    # helpers that every method uses

    def supervised_loss(self, outputs: Outputs, target: Target) -> Tensor:
        """nnU-Net's compound loss, deep supervision included."""
        return self.planned.supervised_loss(outputs, target)

    def count_accepted(self, pseudo: Tensor, weight: Tensor) -> None:
        """Set `acceptance` (2, K'), of each class of `LabelSpace.classes`: share of the voxels that are
        called so and teach, and share that are called so.

        pseudo: (U, K, S) zeros and ones; weight: (U, 1, S), above 0 where they teach.
        """
        with torch.autocast(pseudo.device.type, enabled=False):
            member = self.labels.classes(pseudo).flatten(1).float()
            taught = member @ (weight > 0).flatten().float()
        self.acceptance = torch.stack([taught, member.sum(1)]) / member.shape[1]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over dim 1, or sigmoid per region; float32, with gradient."""
        return self.labels.probabilities(logits)


class TeacherMethod(SemiMethod):
    """Base of the methods with a teacher f_ema: the student's exponential moving average, which may be
    deployed instead of it.

    Its config has `ema_decay` in [0, 1], where 0 makes the teacher a copy, or it overrides `after_step`. The
    teacher has no gradient and predicts in eval mode.
    """

    teacher: Any

    def build(self) -> None:
        self.teacher = frozen_copy(self.student)

    def make_copies(self) -> None:
        copy_weights(self.teacher, self.student)

    def teach(self, images: Tensor) -> Tensor:
        """probabilities(f_ema(images)): (U, C, S) -> (U, K, S), without gradient."""
        with inference(self.teacher):
            return self.probabilities(full_resolution(self.teacher(images)))

    def after_step(self, batch: SemiBatch, t: float) -> None:
        ema_update(self.teacher, self.student, self.config.ema_decay)

    def deployed(self, which: str) -> nn.Module:
        return self.teacher if which == "teacher" else self.student


def weighted_sum(
    terms: Mapping[str, Tensor], weights: Mapping[str, float], all_terms: bool = False
) -> Tensor:
    """sum_k lambda_k L_k over the terms of weight other than 0, or over all."""
    return reduce(operator.add, [weights[k] * v for k, v in terms.items() if weights[k] != 0 or all_terms])


def inactive(parameters: Iterable[nn.Parameter]) -> Tensor:
    """A term that is off: zero, with a zero gradient for every parameter, as several GPUs need."""
    return 0 * reduce(operator.add, [p.sum() for p in parameters])


def full_resolution(outputs: Outputs) -> Tensor:
    """The finest of the deep supervision outputs (B, K, S), or the only one."""
    return outputs[0] if isinstance(outputs, (list, tuple)) else outputs


def split_batch(outputs: Outputs, n: int) -> tuple[Outputs, Outputs]:
    """Outputs of the first n samples and of the rest, at every scale."""
    if isinstance(outputs, (list, tuple)):
        return [o[:n] for o in outputs], [o[n:] for o in outputs]
    return outputs[:n], outputs[n:]


@contextmanager
def inference(*networks: nn.Module) -> Iterator[None]:
    """No gradient and eval mode inside; the networks' modes are restored after."""
    modes = [n.training for n in networks]
    for network in networks:
        network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for network, mode in zip(networks, modes, strict=True):
            network.train(mode)
