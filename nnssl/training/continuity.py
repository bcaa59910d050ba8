"""What may not change between trainings that share weights or a folder, and what is told where it has."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.data.findings import listed
from nnssl.files import read_json
from nnssl.training.checkpoint import Cases, checkpoints_in, trained_on

# of a plan's configuration, what prediction does not depend on
OF_THE_TRAINING = ("batch_size", "batch_dice", "data_identifier", "median_image_size_in_voxels")
OF_THE_INTENSITIES = ("foreground_intensity_properties_per_channel", "transpose_forward")


def refuse_trained_on(used: Cases, validation: Sequence[str], network: str, fold: str) -> None:
    """Refuse to validate on cases whose labels `network` was trained on.

    fold    the splits file and the fold, for the message
    """
    if seen := trained_on(used, validation):
        raise RuntimeError(
            f"{fold}, key val: {listed(seen)}, whose labels {network} was trained on; expected unseen cases. "
            "Restore the split of that training (`nnssl split` keeps the one before as "
            "splits_final.json.bak), or start a new training"
        )


def changed_keys(
    checkpoint: Mapping[str, Any],
    name: str,
    general: Any,
    method: Any,
    method_name: str,
    network_keys: Collection[str],
    configuration: tuple[str, Mapping[str, Any]],
) -> list[str]:
    """Every key that is not what the checkpoint was written with; RuntimeError for those that would change
    the function of its weights.

    name             of the checkpoint, for the message
    general, method  the configs now; `network_keys` of the second shape the network
    configuration    name and content of the plan's configuration now
    """
    then, changed = checkpoint["nnssl"].get("config", {}), []
    for part, prefix, config in (
        ("general", "nnssl", general),
        ("method", f"nnssl.{method_name}", method),
    ):
        before = then.get(part, {})
        for key, value in dataclasses.asdict(config).items():
            if key not in before or before[key] == value:
                continue
            changed.append(f"{prefix}.{key} {value} (there {before[key]})")
            if part == "method" and key in network_keys:
                raise RuntimeError(
                    f"{name} was trained with {prefix}.{key} {before[key]}, the plans file has {value}: the "
                    "weights would be another function. Restore the key"
                )
    plans, (configuration_name, current) = checkpoint["init_args"]["plans"], configuration
    if configuration_name in plans["configurations"]:
        before = PlansManager(plans).get_configuration(configuration_name).configuration
        changed += [
            f"{key} {current[key]} (there {value})"
            for key, value in before.items()
            if key in current and current[key] != value
        ]
    return changed


def refuse_other_plan(model_folder: str, fold_folder: str, then: Any, now: Mapping[str, Any]) -> None:
    """nnU-Net writes the plan beside the model, for all folds: those trained before would be predicted by a
    plan that is not theirs.

    model_folder, fold_folder  nnU-Net's of the trainer and of this fold
    then                       plan -> what of it a prediction depends on
    now                        the same of this training's plan
    """
    file = os.path.join(model_folder, "plans.json")
    folds = sorted(
        path.name
        for path in Path(model_folder).glob("fold_*")
        if path != Path(fold_folder) and checkpoints_in(str(path))
    )
    if not folds or not os.path.isfile(file):
        return
    before = then(read_json(file))
    if changed := [key for key in now if before.get(key) != now[key]]:
        raise RuntimeError(
            f"{file} is the plan of {listed(folds)}, too, and this training would write another over it, "
            f"by which they would be predicted wrongly: {listed(changed)} changed. Restore the plan, "
            "give this one another plans_name (-p), or move these folds away"
        )


def of_the_function(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """What of a plan a trained network's prediction depends on, beside the keys of its method."""
    content = PlansManager(plans).get_configuration(configuration).configuration
    found = {key: value for key, value in content.items() if key not in OF_THE_TRAINING}
    return found | {key: plans.get(key) for key in OF_THE_INTENSITIES}
