"""What a training finds in nnU-Net's plan and folders, and what it trains."""

from __future__ import annotations

import os
from typing import Any

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from torch import nn


def geometry(configuration_manager: Any) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Patch size in voxels and spacing in mm, axis by axis."""
    patch = tuple(int(i) for i in configuration_manager.patch_size)
    return patch, tuple(float(i) for i in configuration_manager.spacing)[-len(patch) :]


def preprocessed_cases(folder: str) -> list[str]:
    """Names of the cases in a preprocessed folder; RuntimeError with the remedy if there is none."""
    if not os.path.isdir(folder):
        raise RuntimeError(
            f"{folder} does not exist: run `nnssl plan-and-preprocess` or nnUNetv2_plan_and_preprocess for "
            "this configuration first"
        )
    return infer_dataset_class(folder).get_identifiers(folder)


class Trainable(nn.Module):
    """A method's trainable parameters, each once: what nnU-Net's `configure_optimizers` should find in the
    place of the network."""

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.list = nn.ParameterList(p for p in method.parameters() if p.requires_grad)
