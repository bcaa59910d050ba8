"""`nnssl advise` says what the measured tables say, and where they end; `nnssl pilot` compares trainings."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key

from benchmarks.leaderboard import advice
from nnssl.commands import advise, pilot
from nnssl.commands.advise import Advice, Facts, cases_of, choose, duration, facts_of, measure_steps, measured
from nnssl.commands.cli import main
from nnssl.commands.trainers import list_trainers, trainers_folder
from nnssl.data.unlabeled import unlabeled_folder
from tests.place import Place, fork_pools

FACTS = Facts("Dataset777_Tiny", "3d_fullres", "0", 4, 20, 1, 3, 10, 100)


def row(method: str, gain: float, low: float, high: float, labels: int = 4) -> dict[str, Any]:
    return {"method": method, "labels": labels, "seeds": 1, "gain": gain, "low": low, "high": high}


def tables(*rows: dict[str, Any], **suite: Any) -> dict[str, Any]:
    base = {"title": "Left atrium", "dimension": 3, "classes": 1, "cases": 20, "steps": 900, "device": "cpu"}
    cost = {"Cheap": 2.0, "Dear": 5.0, "Lucky": 2.0, "Supervised": 1.0}
    return {"step_cost": cost, "suites": [{**base, **suite, "rows": list(rows)}]}


def test_the_shipped_tables_are_those_of_the_repository() -> None:
    """Else run `python -m benchmarks.leaderboard.advice`."""
    assert advice.FILE.read_text(encoding="utf-8") == advice.content()
    assert {suite["name"] for suite in measured()["suites"]} >= {"la_cpu", "hippocampus_cpu", "acdc_cpu"}


def test_the_shipped_tables_name_trainers_that_are_compared_in_all_suites() -> None:
    names = [{row["method"] for row in suite["rows"]} for suite in measured()["suites"]]
    assert {"Semi", "FixMatch", "DiffCL", "SemSim"} <= set.intersection(*names)
    assert {f"nnUNetTrainer{name}" for name in set.union(*names)} <= set(list_trainers(trainers_folder()))
    # with the fewest labels unlabeled scans were worth something in every suite
    for dimension, labeled in ((2, 6), (3, 2)):
        assert choose(replace(FACTS, dimension=dimension, labeled=labeled), measured()).method != "Supervised"


def test_the_best_is_advised_and_of_equals_the_cheapest() -> None:
    found = choose(FACTS, tables(row("Dear", 0.05, 0.03, 0.07), row("Cheap", 0.045, 0.01, 0.08)))
    assert found.trainer == "nnUNetTrainerCheap"
    text = " ".join(found.reasons)
    assert "+4.5 Dice points against continued supervised training [1.0, 8.0], 20 cases, 1 seed" in text
    assert "-pretrained_weights" in text
    assert "no worse than Dear" in text and "2.0 times a supervised one" in text
    assert (
        choose(FACTS, tables(row("Dear", 0.05, 0.03, 0.07), row("Cheap", 0.03, 0.01, 0.05))).method == "Dear"
    )


def test_what_was_not_reliably_better_is_not_advised() -> None:
    assert choose(FACTS, tables(row("Lucky", 0.05, -0.01, 0.1))).method == "Supervised"
    both = tables(row("Lucky", 0.2, 0.1, 0.3))
    both["suites"] += tables(row("Lucky", -0.1, -0.2, -0.01), title="Hippocampus")["suites"]
    found = choose(FACTS, both)
    assert found.method == "Supervised" and "Hippocampus: 4 labels" in found.reasons[0]
    assert choose(replace(FACTS, unlabeled=0), tables(row("Cheap", 0.1, 0.1, 0.1))).method == "Supervised"


def test_of_equals_that_cost_the_same_the_one_of_more_seeds_is_advised() -> None:
    one, two = row("Cheap", 0.051, 0.03, 0.07), row("Lucky", 0.05, 0.03, 0.07) | {"seeds": 2}
    assert choose(FACTS, tables(one, two)).method == "Lucky"
    assert choose(FACTS, tables(one | {"seeds": 2}, two)).method == "Cheap"


def test_a_gain_within_the_spread_of_runs_is_none() -> None:
    assert choose(FACTS, tables(row("Cheap", 0.009, 0.002, 0.02))).method == "Supervised"


def test_the_advice_says_where_the_tables_end() -> None:
    content = tables(row("Cheap", 0.05, 0.03, 0.07))
    assert choose(FACTS, content).open == ("the tables are of small networks and coarse grids on a CPU",)
    for change, said in (
        ({"labeled": 40}, "about 40 labels; the tables are of 4"),
        ({"dimension": 2}, "nothing was measured in 2D"),
        ({"classes": 3}, "the tables are of 1 classes, these data have 3"),
        ({"epochs": 1000, "steps_per_epoch": 250}, "at most 900 steps, and this training takes 250,000"),
    ):
        found = choose(replace(FACTS, **change), content)  # type: ignore[arg-type]
        assert any(said in line for line in found.open), (change, found.open)
        assert found.method == "Cheap"
    content["suites"] += tables(row("Lucky", 0.2, 0.1, 0.3), title="Heart", dimension=2)["suites"]
    assert any(
        "too far from these data to count: Heart (2D, 4 labels)" in s for s in choose(FACTS, content).open
    )
    assert choose(FACTS, content).method == "Cheap"


@pytest.mark.parametrize("labeled", [1, 2, 4, 7, 10, 50])
@pytest.mark.parametrize("classes", [1, 2])
def test_advice_from_the_shipped_tables_stands_on_them(labeled: int, classes: int) -> None:
    found = choose(replace(FACTS, labeled=labeled, classes=classes), measured())
    if found.method == "Supervised":
        assert "no method was reliably better" in found.reasons[0]
    else:
        rows = [r for s in measured()["suites"] for r in s["rows"] if r["method"] == found.method]
        assert any(r["low"] > 0 and f"{100 * r['gain']:+.1f}" in " ".join(found.reasons) for r in rows)


def test_durations_are_told_as_one_would() -> None:
    assert [duration(s) for s in (3, 200, 8000, 40_000, 200_000)] == [
        "3 seconds",
        "3.3 minutes",
        "2.2 hours",
        "11 hours",
        "2.3 days",
    ]


def test_facts_and_costs_of_a_dataset(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_of(777, None, "0", "nnUNetPlans")
    assert facts == Facts("Dataset777_Tiny", "3d_fullres", "0", 3, 5, 2, 3, 2, 2)
    assert facts_of(777, "2d", "0", "nnUNetPlans").dimension == 2
    before = sorted(place.results.rglob("*")) if place.results.exists() else []
    found = measure_steps(777, "3d_fullres", "0", "nnUNetTrainerFixMatch", "nnUNetPlans", "cpu")
    assert 0 < found.seconds < 60 and found.memory == 0 and found.checkpoint > 10_000
    assert (sorted(place.results.rglob("*")) if place.results.exists() else []) == before
    assert main(["advise", "-d", "777", "-device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "3 labeled and 5 unlabeled cases, 2 classes, 2 x 2 steps" in said
    assert "s per step on 1 CPU thread," in said and "nnssl pilot -d 777 -c 3d_fullres -f 0" in said
    (place.preprocessed / "nnUNetPlans.json").unlink()
    assert main(["advise", "-d", "777"]) == 1
    assert "run `nnssl plan-and-preprocess -d 777` first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "unlabeled", "lines"),
    [
        ("Semi", 5, ["Next: nnssl pilot -d 777 -c 3d_fullres -f 0 -p other"]),
        (
            "Supervised",
            5,
            [
                "Next: nnssl train 777 3d_fullres 0 -p other -tr nnUNetTrainerSupervised",
                "To see what unlabeled scans do on your data: nnssl pilot -d 777 -c 3d_fullres -f 0 -p other "
                "-tr nnUNetTrainerSemi",
            ],
        ),
        ("Supervised", 0, ["Next: nnssl train 777 3d_fullres 0 -p other -tr nnUNetTrainerSupervised"]),
    ],
)
def test_the_command_after_the_advice_can_be_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, unlabeled: int, lines: list[str]
) -> None:
    """A pilot of supervised training alone would be refused."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    facts = replace(FACTS, unlabeled=unlabeled)
    assert list(advise._next(777, facts, Advice(method, (), ()), "other")) == lines
    train = f"Next: nnssl train 777 3d_fullres {{}} -p other -tr nnUNetTrainer{method}"
    for fold, stage in (("all", ""), ("0", "3d_lowres")):  # of which a pilot is refused, too
        facts = replace(facts, fold=fold, previous_stage=stage)
        assert list(advise._next(777, facts, Advice(method, (), ()), "other")) == [train.format(fold)]


@pytest.mark.slow
def test_a_pilot_trains_both_and_goes_on_where_it_was_interrupted(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands are those of a shell, carried out in this process."""
    fork_pools(monkeypatch)
    commands: list[list[str]] = []

    def carry_out(command: list[str]) -> int:
        commands.append(command[command.index("nnssl") + 1 :])
        if len(commands) == 2:
            raise KeyboardInterrupt
        return main(commands[-1])

    monkeypatch.setattr(pilot, "_carry_out", carry_out)
    arguments = ["pilot", "-d", "777", "-tr", "nnUNetTrainerFixMatch", "--share", "0.5", "-device", "cpu"]
    assert main(arguments) == 130
    assert "Rerun to resume" in capsys.readouterr().err
    assert main(arguments) == 0
    said = capsys.readouterr().out
    trainers = [c[c.index("-tr") + 1] for c in commands]
    assert trainers == ["nnUNetTrainerSupervised", "nnUNetTrainerFixMatch", "nnUNetTrainerFixMatch"]
    assert (
        "nnUNetTrainerSupervised: done already" in said and "over 1 validation case: too few to tell" in said
    )
    page = Path(said.rpartition("Report: ")[2].strip())
    assert page.parent.parent == place.results and "FixMatch" in page.read_text(encoding="utf-8")
    [file] = place.preprocessed.glob("nnUNetPlans_pilot_*.json")
    plans = json.loads(file.read_text(encoding="utf-8"))
    assert plans["nnssl"]["num_epochs"] == 1 and plans["nnssl"]["seed"] == 0
    assert plans["plans_name"] == file.stem
    assert len(list(place.results.glob(f"*__{file.stem}__3d_fullres/fold_0/validation/summary.json"))) == 2


def test_a_pilot_of_a_finished_network_starts_both_from_it_and_goes_on_without(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def carry_out(command: list[str]) -> int:
        """Of a training that is killed after its first checkpoint, and ends when it goes on."""
        said = command[command.index("nnssl") + 1 :]
        commands.append(said)
        trainer, plans = said[said.index("-tr") + 1], said[said.index("-p") + 1]
        folder = place.results / f"{trainer}__{plans}__3d_fullres" / "fold_0"
        folder.mkdir(parents=True, exist_ok=True)
        if "--c" not in said:
            (folder / "checkpoint_latest.pth").touch()
            return 1
        (folder / "validation").mkdir()
        case = {"prediction_file": "c.nii.gz", "metrics": {"1": {"Dice": 0.5}, "2": {"Dice": 0.5}}}
        (folder / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": [case]}))
        return 0

    monkeypatch.setattr(pilot, "_carry_out", carry_out)
    monkeypatch.setattr(pilot, "runs_in_folders", lambda *_: [])
    monkeypatch.setattr(pilot, "write_report", lambda *_: "report.html")
    start = place.results / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_0" / "checkpoint_final.pth"
    start.parent.mkdir(parents=True)
    start.write_bytes(b"weights")
    assert main(["advise", "-d", "777", "-device", "cpu", "--no-measure"]) == 0
    proposed = capsys.readouterr().out.rpartition("nnssl pilot")[2].partition(" -tr ")[0].split()
    assert proposed[-4:] == ["--share", "0.2", "-pretrained_weights", str(start)]
    arguments = ["pilot", *proposed, "-tr", "nnUNetTrainerSemi", "-device", "cpu"]
    for status in (1, 1, 0):
        assert main(arguments) == status
    assert "over 1 validation case" in capsys.readouterr().out
    given = ["-pretrained_weights", str(start)]
    assert [c[-2:] == given for c in commands] == [c[-1] != "--c" for c in commands]
    assert [c[-1] == "--c" for c in commands] == [False, True, False, True]
    [file] = place.preprocessed.glob("nnUNetPlans_pilot_*.json")
    start.write_bytes(b"other weights")
    assert main(arguments) == 1 and len(list(place.preprocessed.glob("nnUNetPlans_pilot_*.json"))) == 2
    assert file.exists()


def test_the_comparison_is_paired_and_leaves_out_what_is_not_there() -> None:
    first = {f"c{i}": {"a": 0.5 + 0.01 * i, "b": math.nan} for i in range(10)}
    better = {c: {"a": v["a"] + 0.1, "b": math.nan} for c, v in first.items()}
    text = pilot.comparison({"nnUNetTrainerSupervised": first, "nnUNetTrainerX": better}, 0.1)
    assert "difference +10.0 points, 95 % interval over 10 cases [10.0, 10.0], one seed, 10 %" in text
    assert "nnUNetTrainerX is better here" in text
    assert "worse here" in pilot.comparison({"nnUNetTrainerX": better, "nnUNetTrainerY": first}, 0.1)
    noise = np.random.default_rng(0).normal(0, 0.1, 10)
    third = {
        c: {"a": v["a"] + float(n), "b": math.nan} for (c, v), n in zip(first.items(), noise, strict=True)
    }
    assert "Undecided" in pilot.comparison({"nnUNetTrainerX": first, "nnUNetTrainerY": third}, 0.1)
    nothing = {case: {"a": 0.0, "b": math.nan} for case in first}
    assert "Neither" in pilot.comparison({"nnUNetTrainerX": nothing, "nnUNetTrainerY": nothing}, 0.1)
    assert "Neither" not in pilot.comparison({"nnUNetTrainerX": nothing, "nnUNetTrainerY": first}, 0.1)


def test_what_a_pilot_cannot_do_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in (
        (["-f", "all"], "has no validation cases"),
        (["-f", "one"], "fold one: expected a number or all"),
        (["-tr", "Semi"], "-tr Semi: no such trainer. Did you mean nnUNetTrainerSemi"),
        (["--share", "2"], "expected more than 0 and at most 1"),
        (["-tr", "nnUNetTrainer"], "-tr nnUNetTrainer: its schedule is not the plan's"),
        (
            ["-tr", "nnUNetTrainerSupervised"],
            "error: -tr nnUNetTrainerSupervised, which is what a pilot compares with. Name another",
        ),
        (["-f", "3"], "splits_final.json has 0 alone. Choose fold 0.\n"),
        (["-pretrained_weights", "nowhere.pth"], "-pretrained_weights nowhere.pth: no such file"),
    ):
        assert main(["pilot", "-d", "777", *options]) == 1
        assert said in capsys.readouterr().err
    plans = json.loads((place.preprocessed / "nnUNetPlans.json").read_text(encoding="utf-8"))
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    plans["configurations"]["3d_cascade_fullres"] = cascade
    (place.preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    assert main(["pilot", "-d", "777", "-c", "3d_cascade_fullres"]) == 1
    assert "-c 3d_cascade_fullres: it starts from 3d_lowres, which" in capsys.readouterr().err
    assert not list(Path(place.preprocessed).glob("*pilot*"))


def test_who_invents_a_structure_is_worse_than_who_finds_nothing() -> None:
    base = {f"c{i}": {"organ": 0.8, "tumor": 0.8 if i % 2 else math.nan} for i in range(12)}
    other = {f"c{i}": {"organ": 0.82, "tumor": 0.82 if i % 2 else 0.0} for i in range(12)}
    text = pilot.comparison({"nnUNetTrainerSupervised": base, "nnUNetTrainerX": other}, 0.1)
    assert "6 times only one of them found a structure that is not there" in text and "worse here" in text


def test_a_pilot_of_other_data_is_another_pilot(place: Place) -> None:
    folder = str(place.preprocessed)
    cases = [["a", "b"], ["c"], ["u"]]
    first = pilot.write_plan(folder, "nnUNetPlans", 0.5, cases)
    assert pilot.write_plan(folder, "nnUNetPlans", 0.5, cases) == first
    names = {
        pilot.write_plan(folder, "nnUNetPlans", 0.5, [*cases[:i], ["x"], *cases[i + 1 :]]) for i in range(3)
    }
    assert len(names | {first}) == 4


def test_a_pilot_after_labels_or_scans_were_changed_is_another_pilot(place: Place) -> None:
    cases = cases_of(777, "3d_fullres", "0", "nnUNetPlans")

    def now() -> list[list[Any]]:
        return pilot.contents(str(place.preprocessed), "3d_fullres", "nnUNetPlans", cases)

    def redone() -> list[list[Any]]:
        number = ("-np", "1", "--no_pbar")
        assert main(["plan-and-preprocess", "-d", "777", "-c", "3d_fullres", *number]) == 0
        return now()

    first = now()
    assert len(first) == sum(map(len, cases)) and all(first)
    label = place.raw / "labelsTr" / "lab_00.nii.gz"
    os.utime(label)
    assert redone() == first
    shutil.copy(place.raw / "labelsTr" / "lab_01.nii.gz", label)
    assert now() == first
    corrected = redone()
    assert [a == b for a, b in zip(first, corrected, strict=True)] == [False] + [True] * (len(first) - 1)
    scan = place.raw / "imagesUn" / "scan_01_0000.nii.gz"
    shutil.copy(scan.with_name("scan_01_0001.nii.gz"), scan)
    assert (rescanned := now()) != corrected and redone() == rescanned


@pytest.mark.parametrize(
    ("labels", "keys"), [({"a": 1, "b": 2}, ("1", "2")), ({"a": [1, 2], "b": [2]}, ("(1, 2)", "(2,)"))]
)
def test_dice_of_classes_and_of_regions_of_one_label(
    tmp_path: Path, labels: dict[str, Any], keys: tuple[str, str]
) -> None:
    """nnU-Net's keys, as its evaluation writes them."""
    assert keys == tuple(
        label_or_region_to_key(tuple(v) if isinstance(v, list) else v) for v in labels.values()
    )
    metrics = {key: {"Dice": value} for key, value in zip(keys, (0.5, 0.25), strict=True)}
    summary = {"metric_per_case": [{"prediction_file": "x/c.nii.gz", "metrics": metrics}]}
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "summary.json").write_text(json.dumps(summary))
    dataset = {"labels": {"background": 0, **labels}, "regions_class_order": [1, 2]}
    assert pilot.dice_of(str(tmp_path), dataset) == {"c.nii.gz": {"a": 0.5, "b": 0.25}}


def test_a_dataset_without_an_ending_is_refused_by_name(place: Place) -> None:
    file = place.raw / "dataset.json"
    content = json.loads(file.read_text())
    del content["file_ending"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="key file_ending"):
        facts_of(777, None, "0", "nnUNetPlans")


def test_a_plan_without_a_patch_is_refused_by_name(place: Place) -> None:
    file = place.preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    del plans["configurations"]["3d_fullres"]["patch_size"]
    file.write_text(json.dumps(plans))
    with pytest.raises(ValueError, match=r"configurations\.3d_fullres\.patch_size: absent"):
        facts_of(777, None, "0", "nnUNetPlans")


def test_a_plan_without_its_dataset_json_is_not_said_to_be_absent(place: Place) -> None:
    file = place.preprocessed / "dataset.json"
    file.unlink()
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))} does not exist, expected nnU-Net's copy"):
        facts_of(777, None, "0", "nnUNetPlans")


def test_advice_counts_the_scans_that_a_training_takes_and_writes_no_split(place: Place) -> None:
    splits = place.preprocessed / "splits_final.json"
    splits.unlink(missing_ok=True)
    measure_steps(777, "3d_fullres", "0", "nnUNetTrainerSupervised", "nnUNetPlans", "cpu")
    assert not splits.exists()
    with pytest.raises(ValueError, match="fold 9"):
        facts_of(777, None, "9", "nnUNetPlans")
    for content, said in (
        ('[{"train": [], "val": ["lab_00"]}]', "fold 0, key train: empty"),
        ("null", "a list of folds"),
        ("[]", "a list of folds"),
    ):
        splits.write_text(content)
        with pytest.raises(ValueError, match=said):
            facts_of(777, None, "0", "nnUNetPlans")
    splits.unlink()
    folder = Path(unlabeled_folder(str(place.preprocessed / "nnUNetPlans_3d_fullres")))
    there = sorted(file.stem for file in folder.glob("*.pkl"))
    assert facts_of(777, None, "0", "nnUNetPlans").unlabeled == len(there) > 0
    shutil.rmtree(place.raw / "imagesUn")  # a training takes what is preprocessed
    assert cases_of(777, "3d_fullres", "0", "nnUNetPlans")[2] == there
    assert facts_of(777, None, "0", "nnUNetPlans").unlabeled == len(there)
