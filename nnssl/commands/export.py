"""``nnssl export``: a trained model as one of plain nnU-Net, for computers without nnssl."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from os.path import isdir, isfile, join
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnssl.data.findings import listed, raise_errors
from nnssl.data.inspection import read_dataset_json
from nnssl.files import read_json, save_torch, scratch_folder, write_json
from nnssl.training.checkpoint import read_checkpoint
from nnssl.training.lookup import dataset_name

KEPT = (
    "network_weights",
    "current_epoch",
    "inference_allowed_mirroring_axes",
)  # of a checkpoint, beside init_args
FINAL = "checkpoint_final.pth"


def export_model(
    dataset_id: int,
    configuration: str,
    folds: Sequence[str],
    trainer: str,
    output: str,
    plans_name: str = "nnUNetPlans",
    checkpoint_name: str = FINAL,
    overwrite: bool = False,
) -> tuple[str, str]:
    """Write `output`/nnUNetTrainer__PLANS__CONFIG and a .zip of the same name; returns both paths.

    The folder is what nnUNetv2_predict_from_modelfolder takes, the .zip what
    nnUNetv2_install_pretrained_model_from_zip installs.
    Both are complete or absent: they are written beside their place, then moved.

    Args:
        folds: fold numbers, or `all` for the model trained on all cases.
        checkpoint_name: which checkpoint of every fold; it becomes checkpoint_final.pth.
    """
    dataset = dataset_name(dataset_id)
    source = str(get_output_folder(dataset, trainer, plans_name, configuration))
    if not isdir(source):
        raise ValueError(
            f"no trained model in {source}: train it first, or correct -tr, -p or -c. "
            f"{trained_models(source)}"
        )
    for fold in folds:  # a training that never began has made the folder alone
        checkpoint_file(source, fold, checkpoint_name)
    raise_errors(read_dataset_json(join(source, "dataset.json"))[0])
    plans, dataset_json = (read_json(join(source, name)) for name in ("plans.json", "dataset.json"))
    plans = _plain(plans)
    expected = _planned_weights(plans, configuration, dataset_json)

    name = f"nnUNetTrainer__{plans_name}__{configuration}"
    places = join(output, name), join(output, f"{name}.zip")
    if not overwrite and _there(places[1]):
        raise _exists(places[0] if _there(places[0]) else places[1])
    os.makedirs(output, exist_ok=True)
    with scratch_folder(output) as temporary:
        new, archive = join(temporary, name), join(temporary, f"{name}.zip")
        for fold in dict.fromkeys(folds):
            checkpoint = _load(source, fold, checkpoint_name)
            _check_weights(checkpoint["network_weights"], expected, trainer)
            os.makedirs(join(new, f"fold_{fold}"))
            save_torch(_plain_checkpoint(checkpoint), join(new, f"fold_{fold}", FINAL))
        for file, content in (("plans.json", plans), ("dataset.json", dataset_json)):
            write_json(content, join(new, file))
        if isfile(join(source, "dataset_fingerprint.json")):
            shutil.copy(join(source, "dataset_fingerprint.json"), new)
        _write_zip(new, archive, f"{dataset}/{name}")
        for written, place in zip((new, archive), places, strict=True):
            if place == places[0] and _same(written, place):
                continue  # of an export that was killed before its archive was in place
            if _there(place) and not overwrite:
                raise _exists(place)
            _refuse_more_than_an_export(place)
            if os.path.lexists(place):  # goes with the temporary folder
                os.rename(place, join(temporary, f"old-{os.path.basename(place)}"))
            os.rename(written, place)
    return places


def _there(place: str) -> bool:
    """Whether something is there; an empty folder is nothing."""
    return os.path.lexists(place) and not (isdir(place) and not os.listdir(place))


def _exists(place: str) -> FileExistsError:
    return FileExistsError(
        f"{place} already exists: choose another folder with -o, or replace it with --overwrite"
    )


def _refuse_more_than_an_export(place: str) -> None:
    """A training of stock nnU-Net has the same folder: its checkpoints and validation are not ours to go."""
    files = {os.path.relpath(join(root, file), place) for root, _, names in os.walk(place) for file in names}
    ours = re.compile(r"(plans|dataset|dataset_fingerprint)\.json|fold_[^/\\]+[/\\]" + re.escape(FINAL))
    if more := sorted(file for file in files if not ours.fullmatch(file)):
        raise FileExistsError(
            f"{place} is no export alone, it holds {listed(more, 3)}: choose another folder with -o"
        )


def _same(folder: str, other: str) -> bool:
    """Whether both folders hold the same files."""
    names, others = (
        {os.path.relpath(join(root, file), top) for root, _, files in os.walk(top) for file in files}
        for top in (folder, other)
    )
    return names == others and all(filecmp.cmp(join(folder, n), join(other, n), shallow=False) for n in names)


def trained_models(folder: str) -> str:
    """What there is beside a folder of results, for error messages."""
    parent = os.path.dirname(folder)
    models = sorted(m for m in os.listdir(parent) if m.count("__") == 2) if isdir(parent) else []
    return f"Trained there: {', '.join(models) or 'nothing'}"


def _load(source: str, fold: str, checkpoint_name: str) -> dict[str, Any]:
    return read_checkpoint(checkpoint_file(source, fold, checkpoint_name), "cpu", "-chk")


def checkpoint_file(source: str, fold: str, checkpoint_name: str) -> str:
    """Path of a fold's checkpoint; ValueError naming those that are there instead."""
    path = join(source, f"fold_{fold}", checkpoint_name)
    if not os.path.lexists(path):
        there = sorted(
            join(f, c)
            for f in os.listdir(source)
            if f.startswith("fold_") and isdir(join(source, f))
            for c in os.listdir(join(source, f))
            if c.startswith("checkpoint_") and c.endswith(".pth")
        )
        raise ValueError(
            f"{path} does not exist. Found: {', '.join(there) or 'no checkpoint'}. Choose with -f and -chk, "
            "or finish the training"
        )
    return path


def _planned_weights(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]
) -> dict[str, Tensor]:
    """The state of the network that a plain nnU-Net builds for this plan."""
    manager = PlansManager(plans)
    configured = manager.get_configuration(configuration)
    channels = determine_num_input_channels(manager, configured, dataset_json)
    heads = manager.get_label_manager(dataset_json).num_segmentation_heads
    network = nnUNetTrainer.build_network_architecture(
        manager, configured, channels, heads, enable_deep_supervision=False
    )
    return network.state_dict()


def _check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], trainer: str) -> None:
    """RuntimeError where a plain nnU-Net could not load the weights."""
    different = sorted(
        k
        for k in weights.keys() | expected.keys()
        if k not in weights or k not in expected or weights[k].shape != expected[k].shape
    )
    if different:
        raise RuntimeError(
            f"{trainer} changed the planned network: {len(different)} tensors differ from what plain "
            f"nnU-Net builds from the plan, e.g. {different[0]}. Export with nnUNetv2_export_model_to_zip "
            "and install nnunet-semi where you predict, or train with a configuration that keeps the "
            'planned network (Diff-CL: "hfm_stages": 0)'
        )


def _plain(plans: Mapping[str, Any]) -> dict[str, Any]:
    """A plan without our section."""
    return {k: v for k, v in plans.items() if k != "nnssl"}


def _plain_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What prediction needs of a checkpoint, under the name of nnU-Net's own trainer."""
    init_args = {**checkpoint["init_args"], "plans": _plain(checkpoint["init_args"]["plans"])}
    return {**{k: checkpoint[k] for k in KEPT}, "init_args": init_args, "trainer_name": "nnUNetTrainer"}


def _write_zip(folder: str, archive: str, inside: str) -> None:
    """All files of `folder` below `inside`; not compressed: weights hardly shrink."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as stream:
        for root, _, files in sorted(os.walk(folder)):
            for file in sorted(files):
                path = join(root, file)
                stream.write(path, f"{inside}/{os.path.relpath(path, folder).replace(os.sep, '/')}")
