"""Suites: what is compared, as one small TOML file. Everything in it is checked before anything runs.

    title = "Left atrium, 2.5 mm"
    dataset = "Dataset501_LeftAtrium"        # an nnU-Net raw dataset below --data
    configuration = "3d_fullres"
    validation = 20                          # the last so many names; or a list of names
    cases = ["LA_021", "LA_060"]             # optional: only these are used, first and last name
    budgets = [2, 4]                         # labeled cases, the first in name order; the others: unlabeled
    seeds = [0]
    methods = ["supervised", "supervised_all", "self_training", "nnUNetTrainerDiffCL"]

    [plan]                                   # edits of nnU-Net's plan, all optional
    spacing = [2.5, 2.5, 2.5]
    features_divisor = 4

    [schedule]                               # general keys of the section `nnssl`, the same for every row
    num_epochs = 15

    [method.nnUNetTrainerDiffCL]             # optional, for one method
    seeds = { 2 = [0, 1] }                   # by budget (the others take the suite's), or one list for all
    options = { ddim_steps = 2 }             # the method's own section
    start = "supervised"                     # -pretrained_weights: that method's row of budget and seed

`supervised` is nnUNetTrainerSupervised on the labeled cases, `supervised_all` on all but the validation cases
(the upper bound), `self_training` what a user of stock nnU-Net would do (run.py). Any other method is a
trainer; a second row of the same trainer, or of self-training, with other settings takes any name and says
`trainer = "nnUNetTrainer..."` or `"self_training"`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from nnssl.config import Config, Count, Few, GeneralConfig, NonNegative, Positive, Range, build

FOLDER = Path(__file__).parent
SUPERVISED = "nnUNetTrainerSupervised"
SPECIAL = ("supervised", "supervised_all", "self_training")
Percent = Annotated[float, Range(0, 100)]
METHOD_KEYS = {
    "trainer": str,
    "seeds": (list, dict),
    "budgets": list,
    "options": dict,
    "schedule": dict,
    "start": str,
}


@dataclass(frozen=True)
class PlanEdits(Config):
    """[plan]: edits of nnU-Net's plan."""

    spacing: tuple[Positive, ...] | None = None  # mm
    features_divisor: Few | None = None  # of the features of every stage
    batch_size: Count | None = None
    patch_size: tuple[Count, ...] | None = None


@dataclass(frozen=True)
class Published(Config):
    """[[published]]: a row of a paper's table."""

    method: str
    labeled: Count
    source: str
    dice: Percent | None = None
    jaccard: Percent | None = None
    hd95: NonNegative | None = None  # voxels, as asd
    asd: NonNegative | None = None
    note: str = ""


class SuiteError(ValueError):
    """A suite that cannot be used; the message names file and key."""


@dataclass(frozen=True)
class Row:
    """One training: a line of the leaderboard before the mean over seeds."""

    method: str  # as shown
    trainer: str
    kind: str  # trainer | supervised_all | self_training
    labeled: int | None  # None: all but the validation cases
    fold: int  # of splits_final.json: one per budget, the last one with all labels
    seed: int
    settings: Mapping[str, Any]  # the section `nnssl` of its plans file
    fingerprint: str  # over everything that decides its numbers
    start: str | None = None  # name of the row whose network this one starts from

    @property
    def name(self) -> str:
        return row_name(self.method, self.labeled, self.seed)


def row_name(method: str, labeled: int | None, seed: int) -> str:
    """As in the results: method, budget, seed."""
    budget = "all" if labeled is None else f"n{labeled}"
    return re.sub(r"[^A-Za-z0-9_]+", "-", method) + f"_{budget}_s{seed}"


@dataclass(frozen=True)
class Suite:
    """A checked suite file; `rows` is what it asks for."""

    name: str
    title: str
    dataset: str
    configuration: str
    validation: int | list[str]
    budgets: list[int]
    seeds: list[int]
    methods: list[str]
    cases: list[str] = dataclasses.field(default_factory=list)  # first and last name; empty: all
    device: str = "cpu"  # or cuda
    converter: str = ""  # how a missing dataset is made: a name of `convert`
    note: str = ""  # printed below the table
    plan: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schedule: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    method: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    published: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)
    environment: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # of the trainings, e.g. nnUNet_n_proc_DA

    @property
    def continued(self) -> str | None:
        """The method that goes on from a supervised row without unlabeled scans, if any: what rows with a
        `start` are to be compared with."""
        own = (m for m, s in self.method.items() if "start" in s and s.get("trainer") == SUPERVISED)
        return next(own, None)

    def started(self, method: str) -> bool:
        """Whether its rows start from another row's network."""
        return any("start" in s for m, s in self.method.items() if m.removeprefix("nnUNetTrainer") == method)

    @property
    def iterations(self) -> int:
        return self.schedule["num_epochs"] * self.schedule["num_iterations_per_epoch"]

    def rows(self) -> list[Row]:
        """Every training, lower bounds first, then method by method, last what starts from another row."""
        found: list[Row] = []
        fingerprints: dict[str, str] = {}
        for method in sorted(self.methods, key=lambda m: "start" in self.method.get(m, {})):
            own = self.method.get(method, {})
            named = own.get("trainer", method)
            kind = named if named in SPECIAL[1:] else "trainer"
            trainer = SUPERVISED if named in SPECIAL else named
            budgets = [None] if kind == "supervised_all" else own.get("budgets", self.budgets)
            for labeled in budgets:
                fold = len(self.budgets) if labeled is None else self.budgets.index(labeled)
                seeds = own.get("seeds", self.seeds)
                for seed in seeds.get(str(labeled), self.seeds) if isinstance(seeds, dict) else seeds:
                    settings = {**self.schedule, **own.get("schedule", {}), "seed": seed}
                    if own.get("options"):
                        settings[trainer.removeprefix("nnUNetTrainer")] = own["options"]
                    # what is only measured decides nothing
                    deciding = {k: v for k, v in settings.items() if k != "term_gradients"}
                    decides = [
                        self.dataset,
                        self.configuration,
                        self.validation,
                        self.plan,
                        self.device,
                        trainer,
                        kind,
                        labeled,
                        deciding,
                    ]
                    if self.cases:
                        decides.append({"cases": self.cases})
                    start = None
                    if "start" in own:
                        start = row_name(own["start"].removeprefix("nnUNetTrainer"), labeled, seed)
                        decides.append({"start": fingerprints.get(start)})
                    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
                    found.append(
                        Row(
                            method.removeprefix("nnUNetTrainer"),
                            trainer,
                            kind,
                            labeled,
                            fold,
                            seed,
                            settings,
                            digest,
                            start,
                        )
                    )
                    fingerprints[found[-1].name] = digest
        return found


def load_suite(name: str) -> Suite:
    """A suite by path, or by the name of one in `suites/`; SuiteError with file, key and what is valid."""
    path = Path(name) if name.endswith(".toml") else FOLDER / "suites" / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (FOLDER / "suites").glob("*.toml")))
        raise SuiteError(f"{path} does not exist. Suites here: {known}; or give the path of a .toml file.")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise SuiteError(f"{path}: {error}") from error
    try:
        return _checked(path.stem, content)
    except (SuiteError, ValueError) as error:
        raise SuiteError(f"{path}: {error}") from error


def _checked(name: str, content: dict[str, Any]) -> Suite:
    from nnssl.methods import method_classes  # imports torch

    types = {
        "title": str,
        "dataset": str,
        "configuration": str,
        "validation": (int, list),
        "budgets": list,
        "seeds": list,
        "methods": list,
    }
    optional = {
        "cases": list,
        "device": str,
        "converter": str,
        "note": str,
        "plan": dict,
        "schedule": dict,
        "method": dict,
        "published": list,
    }
    _check_types(content, {**types, **optional, "environment": dict}, "the file", required=types)
    suite = Suite(name=name, **content)
    if not re.fullmatch(r"Dataset\d{3}_\w+", suite.dataset):
        raise SuiteError(f"dataset must be named like Dataset501_LeftAtrium, found {suite.dataset!r}")
    if suite.device not in ("cpu", "cuda"):
        raise SuiteError(f"device must be cpu or cuda, found {suite.device!r}")
    _check_numbers(suite.budgets, 1, "budgets")
    _check_numbers(suite.seeds, 0, "seeds")
    if isinstance(suite.validation, int):
        _check_numbers([suite.validation], 1, "validation")
    elif not all(isinstance(case, str) for case in suite.validation):
        raise SuiteError(f"validation must be a number or a list of names, found {suite.validation}")
    if suite.cases and not (
        len(suite.cases) == 2
        and all(isinstance(case, str) for case in suite.cases)
        and suite.cases == sorted(suite.cases)
    ):
        raise SuiteError(f"cases must be the first and the last name, in order, found {suite.cases}")
    if not all(isinstance(value, str) for value in suite.environment.values()):
        raise SuiteError(f"[environment] must hold texts, found {suite.environment}")
    if (
        not suite.methods
        or not all(isinstance(m, str) for m in suite.methods)
        or len(set(suite.methods)) < len(suite.methods)
    ):
        raise SuiteError(f"methods must be a list of different names, found {suite.methods}")
    build(PlanEdits, suite.plan, "[plan]")
    build(GeneralConfig, suite.schedule, "[schedule]")
    _check_types(
        suite.schedule,
        dict.fromkeys(suite.schedule, object),
        "[schedule]",
        required=("num_epochs", "num_iterations_per_epoch"),
    )
    if "seed" in suite.schedule:
        raise SuiteError("[schedule] seed: use the list `seeds`")
    if unknown := sorted(set(suite.method) - set(suite.methods)):
        raise SuiteError(f"[method.{unknown[0]}] is not in methods = {suite.methods}")
    for method in suite.methods:
        own = suite.method.get(method, {})
        if not isinstance(own, dict):
            raise SuiteError(f"[method.{method}] must be a table, found {own!r}")
        _check_types(own, METHOD_KEYS, f"[method.{method}]")
        if "budgets" in own:
            _check_numbers(own["budgets"], 1, f"[method.{method}] budgets")
        seeds = own.get("seeds", [0])
        for found in seeds.values() if isinstance(seeds, dict) else [seeds]:
            _check_numbers(found, 0, f"[method.{method}] seeds")
        if extra := sorted(set(own.get("budgets", [])) - set(suite.budgets)):
            raise SuiteError(f"[method.{method}] budgets: {extra} not in budgets = {suite.budgets}")
        if isinstance(seeds, dict) and (
            extra := sorted(set(seeds) - set(map(str, own.get("budgets", suite.budgets))))
        ):
            raise SuiteError(
                f"[method.{method}] seeds: {extra} not in budgets = {own.get('budgets', suite.budgets)}"
            )
        if isinstance(seeds, dict) and method == "supervised_all":
            raise SuiteError("[method.supervised_all] seeds: expected a list, this row has no budget")
        build(GeneralConfig, own.get("schedule", {}), f"[method.{method}] schedule")
        trained = method_classes().get(own.get("trainer", method).removeprefix("nnUNetTrainer"))
        if trained is not None:
            build(trained.config_class, own.get("options", {}), f"[method.{method}] options")
        named = own.get("trainer", method)
        if named != "self_training" and method not in SPECIAL and not named.startswith("nnUNetTrainer"):
            raise SuiteError(
                f"methods: {method!r} is neither {', '.join(SPECIAL)} nor a trainer (nnUNetTrainer...), and "
                "names no trainer"
            )
    rows = suite.rows()
    if any(row.kind == "self_training" and row.settings["num_epochs"] < 2 for row in rows):
        raise SuiteError("[schedule] num_epochs must be at least 2: self-training halves it")
    names = [row.name for row in rows]
    beginnings = {row.name for row in rows if row.start is None and row.kind == "trainer"}
    if lost := [row for row in rows if row.start is not None and row.start not in beginnings]:
        raise SuiteError(
            f"start: row {lost[0].name} would start from {lost[0].start}, which is not among the suite's "
            "rows of one training from scratch"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SuiteError(f"methods: two of them would write the same row {twice[0]}; rename one")
    for entry in suite.published:
        build(Published, entry, "[[published]]")
    return suite


def _check_types(values: Mapping[str, Any], types: Mapping[str, Any], where: str, required: Any = ()) -> None:
    if missing := [key for key in required if key not in values]:
        raise SuiteError(f"{where}: {', '.join(missing)} missing")
    for key, value in values.items():
        if key not in types:
            raise SuiteError(f"{where}: unknown key {key!r}; valid keys are {', '.join(types)}")
        expected = types[key]
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not object):
            names = " or ".join(
                t.__name__ for t in (expected if isinstance(expected, tuple) else (expected,))
            )
            raise SuiteError(f"{where}: {key} must be {names}, found {value!r}")


def _check_numbers(values: list[Any], least: int, where: str) -> None:
    if (
        not isinstance(values, list)
        or not values
        or len(set(map(str, values))) < len(values)
        or not all(type(v) is int and v >= least for v in values)
    ):
        raise SuiteError(f"{where}: expected different whole numbers from {least}, found {values}")
