"""``nnssl advise``: which trainer to try on a dataset, why, and what that costs, before the hours are spent.

The choice comes from the tables of the leaderboard, which ship with the package: trainings that go on from a
finished supervised network, against supervised training continued for as long. Nothing is known beyond
what they measured, and the advice says where that ends. Time and memory come from a few steps on this device.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from os.path import dirname, isdir, isfile, join
from typing import Any
from unittest import mock

from nnssl.data.findings import listed, raise_errors
from nnssl.files import read_json

SUPERVISED = "Supervised"
NEAR = 2.5  # numbers of labels within this factor are compared
SPREAD = 0.01  # Dice; smaller differences lie within the spread of runs
SAME_COST = 1.1  # of a step: what is within this factor costs the same
SECONDS, STEPS = 60, 5  # a measurement ends after either


@dataclass(frozen=True)
class Facts:
    """What decides: of one fold and configuration."""

    dataset: str
    configuration: str
    fold: str
    labeled: int
    unlabeled: int
    classes: int
    dimension: int
    epochs: int
    steps_per_epoch: int
    previous_stage: str = ""  # of a cascade


@dataclass(frozen=True)
class Advice:
    """A trainer, the reasons, and what the tables leave open."""

    method: str
    reasons: tuple[str, ...]
    open: tuple[str, ...]

    @property
    def trainer(self) -> str:
        return f"nnUNetTrainer{self.method}"


@cache
def measured() -> dict[str, Any]:
    """What ships with the package."""
    content: dict[str, Any] = read_json(join(dirname(__file__), "measured.json"))
    return content


def choose(facts: Facts, tables: Mapping[str, Any]) -> Advice:
    """Of the trainers that did best on comparable data the cheapest, of those the one of most seeds;
    Supervised where none gained more than runs spread."""
    if not facts.unlabeled:
        return Advice(SUPERVISED, ("there are no unlabeled scans; put some into imagesUn",), ())
    comparable, open_ = _comparable(facts, tables["suites"])
    steps = facts.epochs * facts.steps_per_epoch
    longest = max((suite["steps"] for suite, _ in comparable), default=0)
    if comparable and steps > 3 * longest:
        open_.append(f"the tables are of at most {longest:,} steps, and this training takes {steps:,}")
    cells: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for suite, labels in comparable:
        for row in suite["rows"]:
            if row["labels"] == labels:
                cells.setdefault(row["method"], []).append((suite, row))
    complete = {method: found for method, found in cells.items() if len(found) == len(comparable)}
    good = {
        method: sum(row["gain"] for _, row in found) / len(found)
        for method, found in complete.items()
        if any(row["low"] > 0 for _, row in found) and not any(row["high"] < 0 for _, row in found)
    }
    best = max(good.values(), default=0.0)
    if best < SPREAD:
        where = "; ".join(f"{suite['title']}: {labels} labels" for suite, labels in comparable)
        return Advice(
            SUPERVISED,
            (f"no method was reliably better than it by a point of Dice ({where or 'nothing measured'})",),
            tuple(open_),
        )
    cost = tables["step_cost"]
    equal = [method for method, gain in good.items() if gain >= best - SPREAD]
    cheapest = min(cost.get(method, math.inf) for method in equal)
    seeds = {method: min(row["seeds"] for _, row in complete[method]) for method in equal}

    def order(method: str) -> tuple[bool, int, float]:
        return cost.get(method, math.inf) > SAME_COST * cheapest, -seeds[method], -good[method]

    chosen, *others = sorted(equal, key=order)
    reasons = [_sentence(suite, row) for suite, row in complete[chosen]]
    if others:
        reasons.append(f"no worse than {listed(others)} within the spread of runs, and as cheap or cheaper")
    if chosen in cost:
        reasons.append(f"a step takes {cost[chosen]:.1f} times a supervised one (measured on a CPU)")
    reasons.append("measured from a finished supervised network: -pretrained_weights, a fifth of its epochs")
    return Advice(chosen, tuple(reasons), tuple(open_))


def _comparable(
    facts: Facts, suites: Sequence[dict[str, Any]]
) -> tuple[list[tuple[dict[str, Any], int]], list[str]]:
    """Suites with the number of labels that comes nearest, and how they differ from these data."""
    open_ = []
    chosen = [suite for suite in suites if suite["dimension"] == facts.dimension]
    if not chosen:
        open_.append(f"nothing was measured in {facts.dimension}D; the tables are of {5 - facts.dimension}D")
        chosen = list(suites)
    nearest = [(suite, min(_budgets(suite), key=lambda n: _distance(n, facts.labeled))) for suite in chosen]
    near = [(suite, n) for suite, n in nearest if _distance(n, facts.labeled) <= math.log(NEAR) + 1e-9]
    if not near:
        numbers = sorted({n for suite in chosen for n in _budgets(suite)})
        open_.append(
            f"nothing was measured with about {facts.labeled} labels; the tables are of "
            f"{listed([*map(str, numbers)])}"
        )
        closest = min((_distance(n, facts.labeled) for _, n in nearest), default=0.0)
        near = [(suite, n) for suite, n in nearest if _distance(n, facts.labeled) <= closest + 1e-9]
    if apart := [suite for suite in suites if all(suite is not other for other, _ in near)]:
        titles = (
            f"{suite['title']} ({suite['dimension']}D, {listed([*map(str, _budgets(suite))])} labels)"
            for suite in apart
        )
        open_.append(f"measured, but too far from these data to count: {'; '.join(titles)}")
    classes = sorted({suite["classes"] for suite, _ in near})
    if facts.classes > max(classes, default=0):
        open_.append(
            f"the tables are of {listed([*map(str, classes)])} classes, these data have {facts.classes}"
        )
    if near and all(suite["device"] == "cpu" for suite, _ in near):
        open_.append("the tables are of small networks and coarse grids on a CPU")
    return near, open_


def _budgets(suite: Mapping[str, Any]) -> list[int]:
    return sorted({row["labels"] for row in suite["rows"]})


def _distance(a: int, b: int) -> float:
    return abs(math.log(a / max(b, 1)))


def _sentence(suite: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    seeds = f"{row['seeds']} seed{'s' * (row['seeds'] > 1)}"
    return (
        f"{suite['title']}, {row['labels']} labels: {100 * row['gain']:+.1f} Dice points against continued "
        f"supervised training [{100 * row['low']:.1f}, {100 * row['high']:.1f}], {suite['cases']} cases, "
        f"{seeds}"
    )


# the dataset


def facts_of(dataset_id: int, configuration: str | None, fold: str, plans_name: str) -> Facts:
    """From plan, split and folders; no image is opened. ValueError where there is no plan yet."""
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnssl.config import resolve
    from nnssl.data.inspection import inspect_plans, read_dataset_json
    from nnssl.data.raw import plans_in
    from nnssl.data.structures import structures
    from nnssl.methods import method_classes

    name = str(convert_id_to_dataset_name(dataset_id))
    folder = join(nnUNet_preprocessed, name)
    file = join(folder, f"{plans_name}.json")
    if not isfile(file):
        raise ValueError(
            f"{file} does not exist. Plans here: {plans_in(folder)}; run `nnssl plan-and-preprocess -d "
            f"{dataset_id}` first, or name one with -p."
        )
    if not isfile(copy := join(folder, "dataset.json")):
        raise ValueError(
            f"{copy} does not exist, expected nnU-Net's copy of dataset.json beside its plan. Run `nnssl "
            f"plan-and-preprocess -d {dataset_id} -p {plans_name}`, or restore it."
        )
    methods = method_classes()
    for place in (folder, join(os.environ.get("nnUNet_raw", ""), name)):
        if isfile(join(place, "dataset.json")):
            raise_errors(read_dataset_json(join(place, "dataset.json"))[0])
    raise_errors(inspect_plans(file, {m: found.config_class for m, found in methods.items()}, name))
    plans, dataset_json = PlansManager(file), read_json(copy)
    available = plans.available_configurations
    chosen = configuration or next((c for c in ("3d_fullres", "2d") if c in available), available[0])
    if chosen not in available:
        raise ValueError(f"-c {chosen}: the plan has {', '.join(available)}.")
    labeled, _, unlabeled = cases_of(dataset_id, chosen, fold, plans_name)
    general, _ = resolve(plans.plans.get("nnssl", {}), None, None, set(methods), file)
    return Facts(
        name,
        chosen,
        fold,
        len(labeled),
        len(unlabeled),
        len(structures(dataset_json)),
        len(plans.get_configuration(chosen).patch_size),
        general.num_epochs,
        general.num_iterations_per_epoch,
        plans.get_configuration(chosen).previous_stage_name or "",
    )


def cases_of(
    dataset_id: int, configuration: str, fold: str, plans_name: str
) -> tuple[list[str], list[str], list[str]]:
    """Labeled, validation and unlabeled cases that a training of the fold has. ValueError for a fold that is
    not there, or wrong."""
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnssl.data.inspection import inspect_split
    from nnssl.data.split import hidden_cases, load_splits, nnunet_split, training_cases
    from nnssl.data.unlabeled import unlabeled_cases
    from nnssl.training.arguments import check_fold, check_fold_name

    name = str(convert_id_to_dataset_name(dataset_id))
    folder = join(nnUNet_preprocessed, name)
    cases, splits_file = training_cases(name), join(folder, "splits_final.json")
    check_fold_name(fold)
    if fold != "all":
        raise_errors(inspect_split(splits_file, cases, only=int(fold)))
    check_fold(fold, splits_file)
    hidden = hidden_cases(splits_file, fold, cases)
    plans = PlansManager(join(folder, f"{plans_name}.json"))
    dataset_json = read_json(join(folder, "dataset.json"))
    _, scans = unlabeled_cases(plans, configuration, dataset_json, hidden)
    unlabeled = [scan.name for scan in scans]
    if fold == "all":
        return sorted(cases), sorted(cases), unlabeled
    folds = load_splits(splits_file) if isfile(splits_file) else nnunet_split(cases)
    return list(folds[int(fold)]["train"]), list(folds[int(fold)]["val"]), unlabeled


# the device


@dataclass(frozen=True)
class Measured:
    """Of a training step on this device: seconds, peak bytes of a GPU (0: none), bytes of a checkpoint."""

    seconds: float
    memory: int
    checkpoint: int


def measure_steps(
    dataset_id: int, configuration: str, fold: str, trainer: str, plans_name: str, device: str
) -> Measured:
    """Train a few steps on noise of the planned shape; nothing is written but below a temporary folder."""
    import gc

    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    on_gpu = device == "cuda"
    with tempfile.TemporaryDirectory() as folder, _quiet(folder):
        number = fold if fold == "all" else int(fold)
        built: Any = get_trainer_from_args(
            str(dataset_id), configuration, number, trainer, plans_name, False, torch.device(device)
        )
        if on_gpu:  # as a training sets it; and what another trainer left is not this one's
            torch.backends.cudnn.benchmark = True
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        labeled, validation, _ = cases_of(dataset_id, configuration, fold, plans_name)
        built.do_split = lambda: (labeled, validation)  # without a file for nnU-Net's own split
        built.initialize()
        built.method.make_copies()
        built.method.train()
        built.set_deep_supervision_enabled(built.enable_deep_supervision)
        built.current_epoch = built.num_epochs // 2  # all terms count
        batch = noise_for(built)
        built.train_step(batch)  # the first one compiles and allocates
        begun, steps = _now(on_gpu), 0
        while steps < STEPS and (steps == 0 or _now(on_gpu) - begun < SECONDS):
            built.train_step(batch)
            steps += 1
        seconds = (_now(on_gpu) - begun) / steps
        trained = [p for p in built.method.parameters() if p.requires_grad]
        state = [*built.method.parameters(), *built.method.buffers(), *trained]  # and their momentum
        size = sum(x.numel() * x.element_size() for x in state)
        return Measured(seconds, torch.cuda.max_memory_reserved() if on_gpu else 0, size)


@contextlib.contextmanager
def _quiet(results: str) -> Iterator[None]:
    """nnU-Net writes a log into its results, and prints."""
    from nnssl.training.tensorboard import SILENT

    with (
        mock.patch.dict(os.environ, {"nnUNet_results": results, **SILENT}),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        yield


def _now(on_gpu: bool) -> float:
    if on_gpu:
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def noise_for(trainer: Any) -> dict[str, Any]:
    """A batch as the trainer's loaders give it, of noise; every class occurs."""
    import torch

    generator = torch.Generator().manual_seed(0)
    patch, labels = trainer.configuration_manager.patch_size, trainer.label_manager

    def image(number: int) -> torch.Tensor:
        return torch.randn(number, trainer.num_input_channels, *patch, generator=generator)

    def target(scale: Sequence[float]) -> torch.Tensor:
        grid = [round(n * s) for n, s in zip(patch, scale, strict=True)]
        if labels.has_regions:
            maps = len(labels.foreground_regions) + (labels.ignore_label is not None)
            shape = (trainer.batch_size, maps, *grid)
            return torch.randint(0, 2, shape, generator=generator).to(torch.int16)
        shape = (trainer.batch_size, 1, *grid)
        return torch.randint(0, len(labels.all_labels), shape, generator=generator).to(torch.int16)

    scales = trainer._get_deep_supervision_scales() if trainer.enable_deep_supervision else None
    targets = [target(scale) for scale in scales or [[1.0] * len(patch)]]
    train, _ = trainer.do_split()
    batch: dict[str, Any] = {
        "data": image(trainer.batch_size),
        "target": targets if scales else targets[0],
        "keys": [train[i % len(train)] for i in range(trainer.batch_size)],
    }
    if trainer.method_class.needs_unlabeled:
        number = trainer.general.unlabeled_batch_size or trainer.batch_size
        scans = trainer.method.planned.unlabeled_cases
        batch["unlabeled"] = {
            "weak": image(number),
            "strong": [image(number) for _ in range(trainer.method.num_strong_views)],
            "keys": [scans[i % len(scans)] for i in range(number)],
        }
    return batch


# the command


def advise(
    dataset_id: int,
    configuration: str | None = None,
    fold: str = "0",
    plans_name: str = "nnUNetPlans",
    device: str | None = None,
    measure: bool = True,
) -> Advice:
    """Print the advice for a dataset, and what it costs on this device."""
    import torch

    facts = facts_of(dataset_id, configuration, fold, plans_name)
    advice = choose(facts, measured())
    print(
        f"{facts.dataset}, {facts.configuration}, fold {facts.fold}: {facts.labeled} labeled and "
        f"{facts.unlabeled} unlabeled cases, {facts.classes} class{'es' * (facts.classes > 1)}, "
        f"{facts.epochs} x {facts.steps_per_epoch} steps"
    )
    print(f"Advice: {advice.trainer}")
    for reason in advice.reasons:
        print(f"  - {reason}")
    if advice.open:
        print("What the tables cannot tell:")
        for line in advice.open:
            print(f"  - {line}")
    for line in mirroring(dataset_id, facts, plans_name):
        print(f"Mirroring: {line}")
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for line in predictions(facts, advice, plans_name, chosen):
        print(line)
    if measure:
        for line in costs(dataset_id, facts, advice, plans_name, chosen):
            print(line)
    for line in _next(dataset_id, facts, advice, plans_name):
        print(line)
    return advice


def _next(dataset_id: int, facts: Facts, advice: Advice, plans_name: str) -> Iterator[str]:
    """What to type."""
    plan = f" -p {plans_name}" * (plans_name != "nnUNetPlans")
    pilot = f"nnssl pilot -d {dataset_id} -c {facts.configuration} -f {facts.fold}{plan}"
    start = finished_network(facts, plans_name)
    if start:
        pilot += f" --share 0.2 -pretrained_weights {shlex.quote(start)}"
    train = f"nnssl train {dataset_id} {facts.configuration} {facts.fold}{plan} -tr {advice.trainer}"
    comparable = facts.fold != "all" and not facts.previous_stage  # a pilot refuses the others
    if advice.method != SUPERVISED:
        yield f"Next: {pilot if comparable else train}"
        return
    if not start:
        yield f"Next: {train}"
    if facts.unlabeled and comparable:
        yield f"To see what unlabeled scans do on your data: {pilot} -tr nnUNetTrainerSemi"


def finished_network(facts: Facts, plans_name: str) -> str | None:
    """Last checkpoint of a supervised training of this fold that has ended, stock nnU-Net's first."""
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    for trainer in ("nnUNetTrainer", f"nnUNetTrainer{SUPERVISED}"):
        model = get_output_folder(facts.dataset, trainer, plans_name, facts.configuration)
        file = join(str(model), f"fold_{facts.fold}", "checkpoint_final.pth")
        if isfile(file):
            return file
    return None


def predictions(facts: Facts, advice: Advice, plans_name: str, device: str) -> Iterator[str]:
    """Memory of a step of the advised and of supervised training, from the plan alone."""
    from nnunetv2.paths import nnUNet_preprocessed

    from nnssl.training.cost import describe, predict

    folder = join(nnUNet_preprocessed, facts.dataset)
    plans, dataset_json = (read_json(join(folder, f"{name}.json")) for name in (plans_name, "dataset"))
    on_card, on_cpu = {}, {}
    for method in dict.fromkeys((SUPERVISED, advice.method)):
        name = f"nnUNetTrainer{method}"
        trainer = getattr(importlib.import_module(f"nnssl_trainers.{name}"), name)
        on_card[method] = predict(trainer, plans, facts.configuration, dataset_json, "cuda")
        if device == "cpu":
            on_cpu[method] = predict(trainer, plans, facts.configuration, dataset_json, "cpu")
        yield f"{name}: {describe(on_card[method], on_card[SUPERVISED], on_cpu.get(method))}"


def costs(dataset_id: int, facts: Facts, advice: Advice, plans_name: str, device: str) -> Iterator[str]:
    """Time, memory and disk of the advised and of the supervised training, by steps on this device."""
    import torch

    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{threads} CPU thread{'s' * (threads > 1)}"
    steps, found = facts.epochs * facts.steps_per_epoch, {}
    for method in dict.fromkeys((SUPERVISED, advice.method)):
        trainer = f"nnUNetTrainer{method}"
        try:
            one = measure_steps(dataset_id, facts.configuration, facts.fold, trainer, plans_name, device)
        except (RuntimeError, ValueError, OSError) as error:
            yield f"Cost: not measured ({' '.join(str(error).split())})"
            return
        found[method] = one
        memory = f", {one.memory / 2**30:.1f} GiB of GPU memory" if one.memory else ""
        yield (
            f"{trainer}: {one.seconds:.2g} s per step on {name}, {duration(one.seconds * steps)} in all"
            f"{memory}, {3 * one.checkpoint / 2**20:,.0f} MiB of checkpoints"
        )
    tenth = sum(one.seconds for one in found.values()) * max(1, facts.epochs // 10) * facts.steps_per_epoch
    what = "both" if len(found) > 1 else "it"
    yield f"A pilot of {what} at a tenth of the schedule: {duration(tenth)}; loading and validation on top"


def duration(seconds: float) -> str:
    """As one would say it."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def mirroring(dataset_id: int, facts: Facts, plans_name: str) -> Iterator[str]:
    """Where mirroring would swap classes, which costs more than any method gains."""
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnssl.commands.check import inspect_mirroring
    from nnssl.data.raw import cases_in
    from nnssl.data.split import load_splits

    folder = join(nnUNet_preprocessed, facts.dataset)
    plans = PlansManager(join(folder, f"{plans_name}.json"))
    cases_folder = join(folder, plans.get_configuration(facts.configuration).data_identifier)
    labels = plans.get_label_manager(read_json(join(folder, "dataset.json")))
    splits = join(folder, "splits_final.json")
    if isfile(splits) and facts.fold != "all":
        cases = load_splits(splits)[int(facts.fold)]["train"]
    else:
        cases = cases_in(cases_folder, ".pkl") if isdir(cases_folder) else []
    if cases:
        for finding in inspect_mirroring(plans, facts.configuration, cases_folder, cases, labels, "fold"):
            yield f"{finding.found.removeprefix('fold: ')}. {finding.remedy}"
