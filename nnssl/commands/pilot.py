"""``nnssl pilot``: supervised training against one method on a short schedule, before the long one."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os.path import isfile, join
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.commands.advise import SUPERVISED, cases_of, choose, facts_of, measured
from nnssl.commands.launch import launcher
from nnssl.commands.trainers import list_trainers, trainers_folder
from nnssl.data.freshness import Case, content_of, digest
from nnssl.data.parallel import usable_cores
from nnssl.data.structures import structures
from nnssl.data.unlabeled import unlabeled_cases
from nnssl.files import read_json, write_json
from nnssl.metrics import CONFIDENCE, interval
from nnssl.report.build import write_report
from nnssl.report.runs import runs_in_folders
from nnssl.report.scores import FEWEST
from nnssl.training.lookup import check_trainer
from nnssl.training.trainer import SemiTrainer


def pilot(
    dataset_id: int,
    configuration: str | None = None,
    fold: str = "0",
    trainer: str | None = None,
    plans_name: str = "nnUNetPlans",
    share: float = 0.1,
    device: str | None = None,
    output: str | None = None,
    pretrained: str | None = None,
) -> str:
    """Train supervised and with `trainer` (None: the advised one) for `share` of the epochs, same seed, and
    compare them on the validation cases; returns the table.

    Both start from the checkpoint `pretrained` (None: from scratch) and go by a plan of their own,
    ``PLANS_pilot_<hash of its content, the fold's cases, what is in them and that checkpoint>``. What is
    finished is not repeated, what was interrupted goes on. The report goes to `output` (None: beside the
    models).
    """
    if fold == "all":
        raise ValueError("-f all has no validation cases to compare on. Choose a fold.")
    if not 0 < share <= 1:
        raise ValueError(f"--share {share:g}: expected more than 0 and at most 1.")
    if pretrained and not isfile(pretrained):
        raise ValueError(f"-pretrained_weights {pretrained}: no such file.")
    if trainer:
        check_trainer(trainer)
        if trainer not in list_trainers(trainers_folder()) and not issubclass(
            recursive_find_trainer_class_by_name(trainer), SemiTrainer
        ):
            raise ValueError(
                f"-tr {trainer}: its schedule is not the plan's, so all its epochs would run. Name one "
                f"of `nnssl trainers` (nnUNetTrainer{SUPERVISED} is stock nnU-Net's training)."
            )
    facts = facts_of(dataset_id, configuration, fold, plans_name)
    if before := facts.previous_stage:
        raise ValueError(
            f"-c {facts.configuration}: it starts from {before}, which nobody has trained by the plan that a "
            f"pilot makes for itself. Compare trainers on -c {before} or 3d_fullres."
        )
    chosen = trainer or choose(facts, measured()).trainer
    baseline = f"nnUNetTrainer{SUPERVISED}"
    if chosen == baseline:
        named, why = ("-tr", "") if trainer else ("the advice is", " (`nnssl advise` says why)")
        raise ValueError(
            f"{named} {baseline}, which is what a pilot compares with{why}. Name another trainer with -tr."
        )
    dataset = str(convert_id_to_dataset_name(dataset_id))
    cases = cases_of(dataset_id, facts.configuration, fold, plans_name)
    folder = join(nnUNet_preprocessed, dataset)
    data: list[list[Any]] = [*cases, contents(folder, facts.configuration, plans_name, cases)]
    name = write_plan(folder, plans_name, share, data, pretrained)
    where = f"{name}, {facts.configuration}, fold {fold}" + (f", from {pretrained}" if pretrained else "")
    print(f"Pilot of {chosen} against {baseline}: {where}.", flush=True)
    folders = {}
    for one in (baseline, chosen):
        model = str(get_output_folder(dataset, one, name, facts.configuration))
        folders[one] = join(model, f"fold_{fold}")
        _train(dataset_id, facts.configuration, fold, one, name, folders[one], device, pretrained)
    dataset_json = read_json(join(nnUNet_preprocessed, dataset, "dataset.json"))
    table = comparison({one: dice_of(folder, dataset_json) for one, folder in folders.items()}, share)
    place = output or join(nnUNet_results, dataset, f"{name}_{facts.configuration}_report")
    return f"{table}\nReport: {write_report(runs_in_folders([*folders.values()], None), place)}"


def contents(
    folder: str, configuration: str, plans_name: str, cases: Sequence[Sequence[str]]
) -> list[list[Any]]:
    """What is in the cases: of labeled ones as they are preprocessed, of unlabeled ones as a training would
    preprocess them."""
    plans = PlansManager(join(folder, f"{plans_name}.json"))
    dataset_json = read_json(join(folder, "dataset.json"))
    labeled = join(folder, plans.get_configuration(configuration).data_identifier)
    *with_labels, others = cases
    hidden = [name for name in others if isfile(join(labeled, f"{name}.pkl"))]
    target, scans = unlabeled_cases(plans, configuration, dataset_json, hidden)
    known = [Case(name, (), "imagesTr") for names in with_labels for name in sorted(names)]
    of_labeled = replace(target, folder=labeled)
    return [
        *(content_of(case, of_labeled.files(case.name)) for case in known),
        *(content_of(scan, target.files(scan.name)) for scan in scans),
    ]


def write_plan(
    folder: str, plans_name: str, share: float, cases: Sequence[Sequence[Any]], pretrained: str | None = None
) -> str:
    """A plan with `share` of the epochs and a seed; returns its name, which says what is in it, which cases
    it is for and what trainings start from."""
    from nnssl.config import resolve
    from nnssl.methods import known_methods

    plans = read_json(join(folder, f"{plans_name}.json"))
    section = plans.get("nnssl", {})
    general, _ = resolve(section, None, None, known_methods())
    seed = 0 if general.seed is None else general.seed
    plans["nnssl"] = {**section, "num_epochs": max(1, round(share * general.num_epochs)), "seed": seed}
    known = json.dumps([plans, cases, *([digest(pretrained)] if pretrained else [])], sort_keys=True)
    content = hashlib.blake2b(known.encode(), digest_size=3).hexdigest()
    plans["plans_name"] = name = f"{plans_name}_pilot_{content}"
    if not isfile(join(folder, f"{name}.json")):
        write_json(plans, join(folder, f"{name}.json"))
    return name


def _train(
    dataset_id: int,
    configuration: str,
    fold: str,
    trainer: str,
    plans: str,
    folder: str,
    device: str | None,
    pretrained: str | None,
) -> None:
    """A training to the end of its validation, in a process of its own."""
    import torch

    if isfile(join(folder, "validation", "summary.json")):
        print(f"{trainer}: done already ({folder})", flush=True)
        return
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    begun = any(n.startswith("checkpoint_") and n.endswith(".pth") for n in names)
    goes_on = ["--c"] if begun else ["-pretrained_weights", pretrained] if pretrained else []
    command = ["train", str(dataset_id), configuration, fold, "-tr", trainer, "-p", plans, "-device", chosen]
    print(f"$ {shlex.join(['nnssl', *command, *goes_on])}", flush=True)
    start = launcher(usable_cores(), parent=os.getpid())
    if status := _carry_out([*start, "nnssl.commands.cli:main", "nnssl", *command, *goes_on]):
        raise RuntimeError(
            f"{trainer} ended with status {status}; what it said stands above. Rerun to resume."
        )


def _carry_out(command: Sequence[str]) -> int:
    return subprocess.run(command).returncode


# the comparison


def dice_of(folder: str, dataset_json: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{case: {class: Dice}} by nnU-Net's own validation; NaN where a class is neither there nor found."""
    summary = read_json(join(folder, "validation", "summary.json"))
    found = {}
    for case in summary["metric_per_case"]:
        metrics = case["metrics"]
        found[os.path.basename(case["prediction_file"])] = {  # keyed by a region's tuple or a class's value
            name: float(metrics[key if (key := str(values)) in metrics else str(values[0])]["Dice"])
            for name, values in structures(dataset_json).items()
        }
    return found


def comparison(found: Mapping[str, Mapping[str, Mapping[str, float]]], share: float) -> str:
    """Dice per class of both trainers, their paired difference, and what it means."""
    (base, first), (other, second) = found.items()
    cases = sorted(first.keys() & second.keys())
    classes = list(next(iter(first.values())))
    a, b = (np.array([[one[c][k] for k in classes] for c in cases], dtype=float) for one in (first, second))
    invented = np.isfinite(a) != np.isfinite(b)  # one found what is not there, and the other was right
    a, b = (np.where(invented & np.isnan(one), 1.0, one) for one in (a, b))
    shown = [one.removeprefix("nnUNetTrainer") for one in (base, other)]
    lines = ["{:24}{:>14}{:>14}".format("Dice, %", *shown)]
    for index, name in enumerate(classes):
        lines.append("{:24}{:>14}{:>14}".format(name, *(_percent(one[:, index]) for one in (a, b))))
    lines.append("{:24}{:>14}{:>14}".format("mean", _percent(a), _percent(b)))
    if invented.any():
        number = int(invented.sum())
        lines.append(
            f"{number} time{'s' * (number > 1)} only one of them found a structure that is not there: "
            "Dice 0, and 1 for the other."
        )
    both = np.isfinite(a) & np.isfinite(b)
    kept = both.any(axis=1)
    difference = np.where(both, b - a, 0.0)[kept].sum(axis=1) / both[kept].sum(axis=1)
    if not kept.any():
        return "\n".join([*lines, "No validation case has a class that both trainings could be compared by."])
    if not a[both].any() and not b[both].any():
        lines.append("Neither training has found a structure yet: take a longer pilot (--share).")
    number = len(difference)
    if number < FEWEST:
        points = f"difference {100 * difference.mean():+.1f} points over {number} validation case"
        return "\n".join([*lines, f"{points}{'s' * (number > 1)}: too few to tell (at least {FEWEST})"])
    low, high = interval(difference)
    lines.append(
        f"difference {100 * difference.mean():+.1f} points, {CONFIDENCE} % interval over {number} "
        f"cases [{100 * low:.1f}, {100 * high:.1f}], one seed, {100 * share:g} % of the schedule"
    )
    if low > 0:
        lines.append(f"{other} is better here: worth the full schedule.")
    elif high < 0:
        lines.append(f"{other} is worse here: try another one (`nnssl trainers`), or train supervised.")
    else:
        lines.append("Undecided: a longer pilot (--share) or more validation cases would tell.")
    return "\n".join(lines)


def _percent(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    return f"{100 * finite.mean():.1f}" if finite.size else "-"
