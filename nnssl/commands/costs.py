"""What a training step costs, for ``nnssl check``: memory predicted, seconds tried on the device."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterator
from typing import Any

from nnssl.commands.trainers import list_trainers, trainers_folder
from nnssl.data.findings import ERROR, OK, WARNING, Finding
from nnssl.training.lookup import check_trainer


def step_costs(
    trainer: str,
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    costs: dict[str, Any],
) -> Iterator[Finding]:
    """Memory and time of a step; whether the GPU at hand is large enough, what makes it so.

    costs: gets the figures, under the configuration.
    """
    import torch
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnssl.methods.supervised import Supervised
    from nnssl.training.cost import GIB, SAVINGS, describe, predict
    from nnssl.training.trainer import SemiTrainer

    class nnUNetTrainerSupervised(SemiTrainer):
        method_class = Supervised

    try:
        check_trainer(trainer)
        if trainer in list_trainers(trainers_folder()):
            found = getattr(importlib.import_module(f"nnssl_trainers.{trainer}"), trainer)
        else:
            found = recursive_find_trainer_class_by_name(trainer)
    except (ValueError, RuntimeError) as error:
        yield Finding(ERROR, f"-tr {trainer}", str(error).removeprefix(f"-tr {trainer}: "))
        return
    if not issubclass(found, SemiTrainer):
        yield Finding(OK, f"-tr {trainer}", "no trainer of ours: what a step costs is not predicted")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        on_card = predict(found, plans, configuration, dataset_json, "cuda")
    except ValueError as error:  # a key that this method refuses
        yield Finding(ERROR, f"{configuration}, {trainer}", str(error))
        return
    here = on_card if device == "cuda" else predict(found, plans, configuration, dataset_json, "cpu")
    known: dict[str, Any] = {"cuda": dataclasses.asdict(on_card), "smallest_card_gb": on_card.smallest_card}
    known |= {"cpu": dataclasses.asdict(here)} if device == "cpu" else {}
    supervised = predict(nnUNetTrainerSupervised, plans, configuration, dataset_json, "cuda")
    known["supervised"] = dataclasses.asdict(supervised)
    costs[configuration] = known
    place = f"{configuration}, {trainer}"
    yield Finding(OK, place, describe(on_card, supervised, here if device == "cpu" else None))
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        if on_card.card > card.total_memory:
            smaller = [
                name
                for name, changes in SAVINGS.items()
                if predict(found, plans, configuration, dataset_json, "cuda", **changes).card
                <= card.total_memory
            ]
            what = f"set {smaller[0]} under nnssl in the plans file" if smaller else "plan for a smaller GPU"
            yield Finding(
                WARNING,
                place,
                f"{card.name} has {card.total_memory / GIB:.1f} GiB, a step is predicted to need "
                f"{on_card.card / GIB:.1f}",
                remedy=f"{what[0].upper()}{what[1:]}, or lower batch_size",
            )
            return
    # on a CPU the whole patch is tried where there is memory enough for it, and for what else is running
    roomy = device == "cuda" or here.peak < _main_memory() / 2
    yield from _tried(found, plans, configuration, dataset_json, device, roomy, place, known)


def _tried(
    trainer: type,
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    device: str,
    roomy: bool,
    place: str,
    known: dict[str, Any],
) -> Iterator[Finding]:
    """Seconds of a step and time of the training, by a trial on this device."""
    import torch

    from nnssl.training.console import duration
    from nnssl.training.cost import GIB, TRIAL_SECONDS, try_steps

    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{threads} CPU thread{'s' * (threads > 1)}"
    try:
        limit = TRIAL_SECONDS if roomy else 0.0
        trial = try_steps(trainer, plans, configuration, dataset_json, device, limit)
    except RuntimeError as error:  # out of memory, above all
        reason = " ".join(str(error).split())
        known["trial"] = {"device": name, "error": reason}
        yield Finding(WARNING, place, f"a trial of a step failed on {name}: {reason}")
        return
    known["trial"] = {"device": name, **dataclasses.asdict(trial)}
    whole, edges = trial.share == 1, " x ".join(map(str, trial.patch_size))
    how = f"{trial.steps} steps tried" if whole else f"estimated from steps of a patch of {edges}"
    memory = f", {trial.memory / GIB:.1f} GiB of its memory" if whole and trial.memory else ""
    yield Finding(
        OK,
        place,
        f"a step takes {trial.seconds:.2g} s on {name} ({how}){memory}, {trial.schedule:,} steps "
        f"{duration(trial.seconds * trial.schedule)}; loading and validation on top",
    )


def _main_memory() -> float:
    """Bytes of this machine; infinite where the system does not say."""
    if not hasattr(os, "sysconf"):
        return float("inf")
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
