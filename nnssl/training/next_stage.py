"""The unlabeled scans of a cascade: 3d_lowres predicts them for the next stage, as nnU-Net predicts the
labeled ones in its validation.

A fold's own network predicts its unlabeled scans, so that labels which the fold hides play no part. Below
``TRAINER__PLANS__3d_lowres``::

    predicted_next_stage/3d_cascade_fullres/                     nnU-Net's, labeled cases of all folds
    fold_0/predicted_next_stage_unlabeled/3d_cascade_fullres/    unlabeled cases of one fold

Each file is there whole or not at all, and says which weights predicted which scan: what is missing or of
another training is predicted when the validation runs again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from os.path import basename, dirname, isdir, isfile, join
from typing import Any

import blosc2
import numpy as np
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.export_prediction import resample_and_save
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from torch import Tensor

from nnssl.data.findings import listed
from nnssl.data.freshness import read_properties
from nnssl.data.parallel import unordered
from nnssl.data.streams import UnlabeledDataset, open_array
from nnssl.files import read_json, replacing

UNLABELED = "predicted_next_stage_unlabeled"
KEY = "nnssl"  # of a prediction's metadata


def folder_for_unlabeled(output_folder: str, configuration: str) -> str:
    """Where the training in `output_folder` puts its predictions for a next stage."""
    return join(output_folder, UNLABELED, configuration)


def folder_of_previous_stage(labeled_folder: str, fold: int | str) -> str:
    """Where a cascade finds them: `labeled_folder` is nnU-Net's, .../predicted_next_stage/CONFIGURATION."""
    model = dirname(dirname(labeled_folder))
    return folder_for_unlabeled(join(model, f"fold_{fold}"), basename(labeled_folder))


def fingerprint_of(weights: Mapping[str, Tensor], mirror_axes: Sequence[int] | None) -> str:
    """Hash over what predicts."""
    content = hashlib.blake2b(repr(mirror_axes).encode(), digest_size=16)
    for name, tensor in weights.items():
        content.update(name.encode())
        content.update(tensor.detach().cpu().numpy().tobytes())
    return content.hexdigest()


def predict_unlabeled(
    predictor: nnUNetPredictor,
    model: str,
    cases: Sequence[str],
    source: UnlabeledDataset,
    next_folder: str,
    destination: str,
) -> int:
    """Predict the cases whose prediction is missing or old; returns how many there were.

    Args:
        predictor: nnU-Net's, initialized with the trained network.
        model: `fingerprint_of` that network.
        cases: names, preprocessed for both stages.
        source: preprocessed for this stage.
        next_folder: preprocessed for the next one; decides the size.
        destination: folder of the predictions.
    """
    records = {case: _record(model, source.source_folder, next_folder, case) for case in cases}
    todo = [case for case, record in records.items() if _stored(destination, case) != record]
    os.makedirs(destination, exist_ok=True)

    def jobs() -> Iterator[tuple[Any, ...]]:
        for case in todo:
            properties = read_properties(join(source.source_folder, case + ".pkl"))
            logits = predictor.predict_sliding_window_return_logits(_image(predictor, source, case)).cpu()
            shape = open_array(next_folder, case).shape[1:]
            yield (
                logits,
                shape,
                join(destination, case + ".b2nd"),
                predictor.plans_manager,
                predictor.configuration_manager,
                properties,
                predictor.dataset_json,
                records[case],
            )

    for _ in unordered(_save, jobs(), default_num_processes, queued=2):
        pass
    return len(todo)


def _image(predictor: nnUNetPredictor, source: UnlabeledDataset, case: str) -> Tensor:
    """What the network of this stage sees of a case."""
    image, _, previous = source.load_case(case)
    array = image[:]
    if previous is not None:
        labels = predictor.label_manager.foreground_labels
        array = np.vstack((array, convert_labelmap_to_one_hot(previous[:], labels, output_dtype=array.dtype)))
    return torch.from_numpy(array)


def _save(
    logits: Tensor,
    shape: Sequence[int],
    path: str,
    plans_manager: Any,
    configuration_manager: Any,
    properties: dict,
    dataset_json: dict,
    record: dict[str, Any],
) -> None:
    """nnU-Net's resampling to the next stage and label map."""
    with replacing(path) as partial:
        resample_and_save(
            logits,
            list(shape),
            partial.removesuffix(".b2nd"),
            plans_manager,
            configuration_manager,
            properties,
            dataset_json,
            default_num_processes,
            nnUNetDatasetBlosc2,
        )
        array = blosc2.open(partial, mode="a")
        array.schunk.vlmeta[KEY] = record


def _record(model: str, folder: str, next_folder: str, case: str) -> dict[str, Any]:
    """What a prediction depends on."""
    first, second = (_preprocessed(f, case) for f in (folder, next_folder))
    plans = [record.get("fingerprint", "") for record in (first, second)]
    return {"model": model, "plans": json.dumps(plans), "scan": _scan(first)}


def _preprocessed(folder: str, case: str) -> dict[str, Any]:
    return (read_properties(join(folder, case + ".pkl")) or {}).get("nnssl", {})


def _scan(record: Mapping[str, Any]) -> str:
    """The raw files of a preprocessed case, by content."""
    return json.dumps([[s["file"], s["blake2b"]] for s in record.get("sources", [])])


def _stored(folder: str, case: str) -> dict[str, Any] | None:
    """The record of a prediction; None without one."""
    try:
        array = open_array(folder, case)
        return dict(array.schunk.vlmeta[KEY])
    except Exception:  # blosc2 has no error class of its own
        return None


def unusable_predictions(
    cases: Sequence[str], folder: str, previous: str, unlabeled: bool = False
) -> dict[str, str]:
    """{case: reason} where the previous stage's segmentation is missing or does not fit.

    folder     preprocessed cases
    previous   their segmentations by the previous stage
    unlabeled  whether `previous` is ours, so that another scan of the same name is noticed
    """
    found = {}
    for case in cases:
        if not isfile(join(previous, case + ".b2nd")):
            found[case] = "missing"
            continue
        try:
            size = tuple(open_array(previous, case).shape)
        except Exception:  # blosc2 has no error class of its own
            found[case] = "damaged"
            continue
        wanted = tuple(open_array(folder, case).shape[1:])
        if size != wanted:
            found[case] = f"of size {size}, the scan has {wanted}"
        elif unlabeled and (_stored(previous, case) or {}).get("scan") != _scan(_preprocessed(folder, case)):
            found[case] = "of another scan"
    return found


def refuse_missing_next(configuration: str, folders: Mapping[str, str]) -> None:
    """nnU-Net's validation predicts for the next stages: refuse one that is not preprocessed.

    folders  {next stage: its folder of labeled cases}
    """
    for stage, folder in folders.items():
        if not isdir(folder):
            raise RuntimeError(
                f"{configuration} predicts the scans for {stage}, whose preprocessed data are expected in "
                f"{folder}, which does not exist. Run `nnssl plan-and-preprocess` with -c {stage}"
            )


def refuse_unpredicted(
    cases: Sequence[str], folder: str, previous: str, stage: str, fold: int | str, splits_file: str
) -> None:
    """nnU-Net's loader reads what the previous stage predicted: refuse labeled cases without.

    folder, previous  as of `unusable_predictions`
    stage             name of the previous stage
    """
    if bad := unusable_predictions(cases, folder, previous):
        shown = listed([f"{case} ({reason})" for case, reason in bad.items()], 8)
        raise RuntimeError(
            f"{len(bad)} labeled cases without a usable prediction by {stage} in {previous}: {shown}. "
            f"{_folds_that_predict(list(bad), fold, splits_file)}"
        )


def _folds_that_predict(cases: Sequence[str], fold: int | str, splits_file: str) -> str:
    """Which trainings of the previous stage have these cases in their validation."""
    splits = [] if fold == "all" else read_json(splits_file)
    folds = {case: [i for i, split in enumerate(splits) if case in split["val"]] for case in cases}
    if alone := [case for case, found in folds.items() if fold != "all" and not found]:
        return (
            f"No fold of {splits_file} has {listed(alone, 8)} in its validation, and a cascade learns from "
            "predictions of networks that did not train on the case. Make folds that cover all cases "
            "(`nnssl split` without --val), or train both stages in fold all"
        )
    needed = sorted({str(found[0]) for found in folds.values() if found}) or ["all"]
    return f"Train it with the same trainer and plan first, fold {', '.join(needed)}"


def previous_of_unlabeled(
    cases: Sequence[str], folder: str, labeled_previous: str, stage: str, fold: int | str
) -> str:
    """Folder of the previous stage's segmentations of all unlabeled cases; RuntimeError where one is missing.

    folder            preprocessed unlabeled cases
    labeled_previous  nnU-Net's folder of the same for labeled cases
    """
    previous = folder_of_previous_stage(labeled_previous, fold)
    if bad := unusable_predictions(cases, folder, previous, unlabeled=True):
        shown = listed([f"{case} ({reason})" for case, reason in bad.items()], 8)
        raise RuntimeError(
            f"{len(bad)} unlabeled cases without a usable prediction by {stage} in {previous}: {shown}. "
            f"Train {stage} with the same trainer, plan and fold first; if it is trained, run its training "
            "command again with --val"
        )
    return previous
