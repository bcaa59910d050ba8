"""From nnU-Net's plan to what a method sees of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnssl.labels import LabelSpace
from nnssl.method import Planned

if TYPE_CHECKING:
    from nnssl.training.trainer import SemiTrainer


def geometry(configuration_manager: Any) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Patch size in voxels and spacing in mm, axis by axis."""
    patch = tuple(int(i) for i in configuration_manager.patch_size)
    return patch, tuple(float(i) for i in configuration_manager.spacing)[-len(patch) :]


def preprocessed_cases(folder: str) -> list[str]:
    """Names of the cases in a preprocessed folder; RuntimeError with the remedy if there is none."""
    if not os.path.isdir(folder):
        raise RuntimeError(
            f"{folder} does not exist: run `nnssl plan-and-preprocess` or nnUNetv2_plan_and_preprocess for "
            f"this configuration first"
        )
    return infer_dataset_class(folder).get_identifiers(folder)


def planned(trainer: SemiTrainer) -> Planned:
    """Everything of a trainer's plan that a method may need."""
    labels = trainer.label_manager
    patch_size, spacing = geometry(trainer.configuration_manager)
    labeled_cases = trainer.do_split()[0] if trainer.method_class.needs_unlabeled else []

    def build(input_channels: int, output_channels: int) -> nn.Module:
        return nnUNetTrainer.build_network_architecture(
            trainer.plans_manager,
            trainer.configuration_manager,
            input_channels,
            output_channels,
            trainer.enable_deep_supervision,
        )

    return Planned(
        build_network=build,
        input_channels=trainer.num_input_channels,
        labels=LabelSpace(labels.num_segmentation_heads, labels.has_regions, labels.ignore_label),
        patch_size=patch_size,
        spacing=spacing,
        supervised_loss=trainer.loss,
        labeled_cases=tuple(sorted(labeled_cases)),
        compile=trainer._do_i_compile(),
    )


class Trainable(nn.Module):
    """A method's trainable parameters, each once: what nnU-Net's `configure_optimizers` should find in the
    place of the network."""

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.list = nn.ParameterList(p for p in method.parameters() if p.requires_grad)
