"""`nnssl report` on output folders that no training had to write."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from medpy.metric import binary
from PIL import Image

from nnssl.commands.cli import main
from nnssl.metrics import interval
from nnssl.report.curves import acceptance_charts
from nnssl.report.runs import Run
from nnssl.report.scores import METRICS, Key, Scores
from tests.report.results import CASES, EPOCHS, LABELS, SPACING, Results, truth

VOID = {"meta", "img", "line", "polyline", "circle", "br"}
SEMI, SUPERVISED = "nnUNetTrainerSemi", "nnUNetTrainerSupervised"


class Page(HTMLParser):
    """What is on a page: its text, tables by id as rows of (text, value), links and sources."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.tables: dict[str, list[list[tuple[str, float | None]]]] = {}
        self.cell: tuple[list[str], float | None] | None = None
        self.table = ""
        self.feed(self.source)
        assert not self.open, "every element is closed"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [value for key, value in attrs if key in ("href", "src")]
        if tag == "table" and "id" in given:
            self.table = given["id"].removeprefix("table-")
            self.tables[self.table] = []
        if tag == "tr" and self.table:
            self.tables[self.table].append([])
        if tag in ("td", "th"):
            self.cell = ([], float(given["data-value"]) if "data-value" in given else None)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open.pop() == tag
        if tag == "table":
            self.table = ""
        if tag in ("td", "th") and self.cell and self.table:
            self.tables[self.table][-1].append(("".join(self.cell[0]), self.cell[1]))
            self.cell = None

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "script" in self.open:
            return
        self.words.append(data)
        if self.cell:
            self.cell[0].append(data)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setattr("nnssl.report.scores.FEWEST", 3)
    return Results(tmp_path)


def report(results: Results, *folders: Path | str) -> Page:
    out = results.folder / "out"
    assert main(["--traceback", "report", *map(str, folders), "-o", str(out)]) == 0
    return Page(out / "report.html")


def two_models(results: Results) -> Page:
    for trainer, terms, seed in ((SUPERVISED, ("supervised",), 3), (SEMI, ("supervised", "pseudo"), 1)):
        results.finish(results.begin(trainer, terms), seed)
    return report(results, "-d", "778", "-c", "3d_fullres", "-f", "0", "-tr", SUPERVISED, SEMI)


def expected(results: Results) -> dict[tuple[str, str, str], list[float]]:
    """Dice, Jaccard, 95HD and ASD by medpy, by (case, structure, model)."""
    found = {}
    for trainer in (SUPERVISED, SEMI):
        for case in CASES:
            path = results.fold(trainer) / "validation" / f"{case}.nii.gz"
            prediction = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
            for name, value in LABELS.items():
                p, t = prediction == value, truth(case) == value
                if not p.any() and not t.any():
                    values = [math.nan] * 4
                elif not p.any() or not t.any():
                    values = [0.0, 0.0, *[float(np.linalg.norm(np.multiply(p.shape, SPACING)))] * 2]
                else:
                    values = [binary.dc(p, t), binary.jc(p, t)]
                    values += [binary.hd95(p, t, SPACING), binary.asd(p, t, SPACING)]
                found[case, name, trainer.removeprefix("nnUNetTrainer")] = values
    return found


def test_every_number_of_the_tables_equals_its_recomputation(results: Results) -> None:
    page, values = two_models(results), expected(results)
    structures, models = ("large, round", "small"), ("Supervised", "Semi")
    _, *rows = page.tables["cases"]
    assert len(rows) == len(CASES) * len(structures) * len(models)
    for row in rows:
        case, _, structure, model = (text for text, _ in row[:4])
        shown = [value for _, value in row[4:]]
        assert shown == pytest.approx(values[case, structure, model], nan_ok=True)

    def column(structure: str, model: str, k: int) -> np.ndarray:
        if structure in structures:
            return np.array([values[case, structure, model][k] for case in CASES])
        return np.nanmean([column(s, model, k) for s in structures], axis=0)

    _, *rows = page.tables["scores"]
    assert len(rows) == 3 * 2
    for row in rows:
        for k, (text, value) in enumerate(row[2:]):
            kept = column(row[0][0], row[1][0], k)
            kept = kept[np.isfinite(kept)]
            assert value == pytest.approx(kept.mean())
            mean, sd = text.split(" ± ")
            digits = 3 if k < 2 else 2
            assert (mean, sd) == (f"{kept.mean():.{digits}f}", f"{kept.std(ddof=1):.{digits}f}")
    _, *rows = page.tables["differences"]
    assert len(rows) == 3 * 4
    names = [text.split()[0] for text, _ in page.tables["scores"][0][2:]]
    for row in rows:
        k = names.index(row[2][0].split()[0])
        gap = column(row[0][0], "Semi", k) - column(row[0][0], "Supervised", k)
        gap = gap[np.isfinite(gap)]
        assert [v for _, v in row[3:7]] == pytest.approx([gap.mean(), *interval(gap), len(gap)])
        clear = interval(gap)[0] > 0 or interval(gap)[1] < 0
        better = (gap.mean() > 0) == (k < 2)
        assert row[7][0] == ("better" if better else "worse") if clear else "no clear difference"
    with open(results.folder / "out" / "report_cases.csv", encoding="utf-8", newline="") as stream:
        written = {(r["case"], r["structure"], r["trainer"]): r["dice"] for r in csv.DictReader(stream)}
    assert written == {
        key: "" if math.isnan(v[0]) else f"{v[0]:.6g}" for key, v in values.items() if key[1] != "background"
    }


def test_the_page_stands_alone(results: Results) -> None:
    page = two_models(results)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    code = re.sub(r"data:image/png;base64,[\w+/=]+", "", page.source)
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(", code)
    for name in ("report_dice", "report_differences", "report_validation", "report_case_1_"):
        assert list((results.folder / "out").glob(f"{name}*.png"))
    assert "What the teacher says." in page.text and "Largest gain of Semi over Supervised" in page.text


def test_pictures_of_an_earlier_report_go_and_no_others(results: Results) -> None:
    two_models(results)
    folder = results.folder / "out"
    old, other, empty = (folder / name for name in ("report_case_9_old.png", "report_map.png", "report_.png"))
    shutil.copy(folder / "report_dice.png", old)
    Image.new("L", (2, 2)).save(other)
    empty.touch()
    report(results, results.fold(SEMI).parent)
    assert not old.exists() and other.exists() and empty.exists()


@pytest.mark.parametrize("name", ["report.html", "report_cases.csv", "report_dice.png"])
def test_what_is_not_of_an_earlier_report_stays(results: Results, name: str) -> None:
    (results.folder / "out").mkdir()
    (results.folder / "out" / name).write_text("mine")
    results.finish(results.begin(SEMI), 1)
    with pytest.raises(ValueError, match=f"{name} is there and was not written by an earlier report"):
        report(results, results.fold(SEMI).parent)
    assert (results.folder / "out" / name).read_text() == "mine"


def test_a_training_that_still_runs(results: Results) -> None:
    folder = results.begin(SEMI)
    page = report(results, folder.parent)
    assert "3 of 6 epochs so far" in page.text and "No case is scored yet" in page.text
    assert not {"scores", "cases", "differences"} & page.tables.keys()
    assert "accepted: large, round" in page.text and "Dice: small" in page.text
    row = [value if value is not None else text for text, value in page.tables["resources"][1]]
    assert row == ["Semi", "0", 3.0, 8.0, 24 / 3600, 24 / 3600, 1.5, "cpu", "float32"]


def test_a_validation_that_is_not_complete_is_compared_on_its_cases(results: Results) -> None:
    results.finish(results.begin(SUPERVISED), 1)
    folder = results.begin(SEMI)
    results.finish(folder, 2, CASES[:2])
    (folder / "validation" / "summary.json").unlink()
    (folder / "validation" / "case_b.nii.gz").write_bytes(b"half a file")
    page = report(results, results.fold(SUPERVISED).parent, folder.parent)
    assert {row[0][0] for row in page.tables["cases"][1:]} == {"case_a"}
    assert "the final validation is not complete, 2 cases are predicted" in page.text
    assert "case_b cannot be read" in page.text and "2 cases are left out" in page.text


def test_one_trainer_without_an_unlabeled_term(results: Results) -> None:
    results.finish(results.begin(SUPERVISED, ("supervised",)), 1)
    page = report(results, "-d", "778", "-c", "3d_fullres", "-tr", SUPERVISED)
    assert "scores" in page.tables and "differences" not in page.tables
    assert "What the labels say." in page.text and "accepted" not in page.text
    names = [row[0][0] for row in page.tables["configuration-0"][1:]]
    changed = re.findall(r"<tr class=changed><td>(.*?)</td>", page.source)
    assert names == ["num_epochs", "seed", "Own.threshold"] and changed == ["num_epochs"]


def test_a_trainer_of_nnunet_itself_has_its_curves_in_the_checkpoint(results: Results) -> None:
    folder = results.begin("nnUNetTrainer")
    results.finish(folder, 1)
    for name in ("training.json", "losses.csv"):
        (folder / name).unlink()
    page = report(results, folder.parent)
    assert "finished after 3 epochs" in page.text and "Dice: large, round" in page.text
    assert "no configuration of nnssl" in page.text


def test_folds_are_pooled_and_drawn_apart(results: Results) -> None:
    for fold, cases in ((0, CASES[:2]), (1, CASES[2:])):
        results.finish(results.begin(SEMI, fold=fold), fold, cases)
    page = report(results, results.fold(SEMI).parent)
    assert len(page.tables["cases"]) == 1 + len(CASES) * 2
    assert "Semi, fold 1" in page.text


def test_fold_all_is_read_alone_and_said_to_flatter(results: Results, capsys: pytest.CaptureFixture) -> None:
    results.finish(results.begin(SEMI), 1, CASES[:2])
    results.finish(results.begin(SEMI, fold="all"), 2)
    model = results.fold(SEMI).parent
    page = report(results, model)
    assert len(page.tables["resources"]) == 2 and len(page.tables["cases"]) == 1 + 2 * 2
    assert f"WARNING: {model / 'fold_all'}: not read beside other folds" in capsys.readouterr().out
    page = report(results, model, "-f", "all")
    assert len(page.tables["cases"]) == 1 + len(CASES) * 2
    assert "Semi, fold all: the cases of its validation were trained on, its scores flatter" in page.text


def test_without_the_labels_the_page_says_so(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    results.finish(results.begin(SEMI), 1)
    for name in ("raw", "preprocessed"):
        monkeypatch.delenv(f"nnUNet_{name}")
    page = report(results, results.fold(SEMI).parent)
    assert "set nnUNet_preprocessed" in page.text and "scores" not in page.tables


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "778", "-c", "3d_fullres"], "-tr missing"),
        (["-d", "778", "folder"], "not both"),
        (["-d", "778", "-c", "3d_fullres", "-tr", "nnUNetTrainerSemy"], "Trained there: nnUNetTrainerSemi__"),
        (["-d", "778", "-c", "3d_fullres", "-tr", SEMI, "-f", "4"], "fold_4 not there, found fold_0"),
    ],
)
def test_errors_say_what_is_there(
    results: Results, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    results.begin(SEMI)
    assert main(["report", *arguments, "-o", str(results.folder / "out")]) == 1
    assert message in capsys.readouterr().err


def test_trainings_with_other_labels_are_refused(results: Results, capsys: pytest.CaptureFixture) -> None:
    results.begin(SEMI)
    results.content["labels"] = {"background": 0, "other": 1}
    results.begin(SUPERVISED)
    folders = [str(results.fold(trainer).parent) for trainer in (SEMI, SUPERVISED)]
    assert main(["report", *folders, "-o", str(results.folder / "out")]) == 1
    assert "different labels" in capsys.readouterr().err


def test_a_checkpoint_without_a_log_is_no_error(results: Results) -> None:
    folder = results.begin("nnUNetTrainer")
    (folder / "training.json").unlink()
    torch.save({}, folder / "checkpoint_best.pth")
    page = report(results, folder.parent)
    assert "0 epochs so far" in page.text


def test_what_is_damaged_is_named_and_the_rest_is_on_the_page(
    results: Results, capsys: pytest.CaptureFixture
) -> None:
    folder = results.begin("nnUNetTrainer")
    results.finish(folder, 1)
    (folder / "training.json").write_text('{"trainer": "nn')
    (folder / "losses.csv").write_text("epoch,lr\n0,a tenth\n")
    (folder / "pseudo_labels").mkdir()
    (folder / "pseudo_labels" / "scans.npz").write_bytes(b"PK, and no more")
    final, best = (folder / f"checkpoint_{name}.pth" for name in ("final", "best"))
    torch.save({"logging": {**results.logging(), "train_losses": [0.25]}}, best)
    final.write_bytes(final.read_bytes()[:-50])
    page = report(results, folder.parent)
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    names = ("training.json", final.name, "losses.csv", "scans.npz")
    for line, name in zip(warned, names, strict=True):
        assert name in line and line.removeprefix("WARNING: ") in page.text
    assert "scores" in page.tables and "Dice: large, round" in page.text
    best.write_bytes(b"")
    (folder / "training.json").write_text("[]")
    page = report(results, folder.parent)
    assert f"{best} is not read: it is empty" in page.text and "scores" in page.tables
    assert f"{folder / 'training.json'}: holds list, expected a JSON object" in page.text
    (folder.parent / "dataset.json").write_text("{}")
    assert main(["report", str(folder.parent), "-o", str(results.folder / "out")]) == 1
    assert "dataset.json, key labels: absent" in capsys.readouterr().err


def test_images_that_have_changed_since_are_named_and_their_cases_drawn_without(results: Results) -> None:
    results.finish(results.begin(SEMI), 1)
    for number, case in enumerate(CASES):
        image = results.image(case)
        if number % 2:
            image.write_bytes(b"no image")
        else:
            array = sitk.GetArrayFromImage(sitk.ReadImage(image))
            sitk.WriteImage(sitk.GetImageFromArray(array[:-1]), image)
    page = report(results, results.fold(SEMI).parent)
    assert "cannot be read" in page.text or "has another grid than the labels" in page.text
    assert "scores" in page.tables


def test_accepted_is_a_share_of_what_is_called_so(results: Results) -> None:
    folder = results.begin(SEMI)
    charts = acceptance_charts([Run("Semi", folder)], {"Semi": 0})
    assert [chart.title for chart in charts] == [
        f"{kind}: {name}" for kind in ("accepted", "called") for name in ("large, round", "small")
    ]
    lines = [chart.series[0].y for chart in charts]
    assert lines[0] == pytest.approx([0.75] * 3) and np.isnan(lines[1]).all()
    assert lines[2:] == [[0.1] * 3, [0.0] * 3]


def test_few_cases_have_no_verdict(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnssl.report.scores.FEWEST", len(CASES) + 1)
    page = two_models(results)
    assert "too few cases" in page.text and ": better" not in page.text and ": worse" not in page.text


def test_a_training_that_began_anew_is_not_finished_by_the_one_before(results: Results) -> None:
    folder = results.begin(SEMI)
    results.finish(folder, seed=1)
    record = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(record | {"num_epochs": 2 * EPOCHS}))
    run = Run("Semi", folder)
    assert (
        not run.finished and not run.validated and run.status.startswith(f"{EPOCHS} of {2 * EPOCHS} epochs")
    )
    assert run.predictions == {} and "a training before this one" in report(results, folder).text


def test_who_rightly_finds_nothing_gains_on_who_invents_a_structure() -> None:
    nothing, invented = (
        dict.fromkeys(METRICS, math.nan),
        {"dice": 0.0, "jaccard": 0.0, "hd95": 9.0, "asd": 9.0},
    )
    keys = [Key("0", f"case_{i}") for i in range(6)]
    values = {m: {k: {"tumor": v} for k in keys} for m, v in (("A", nothing), ("B", invented))}
    scores = Scores(("tumor",), ("A", "B"), values, ())
    for metric, gap in (("dice", -1.0), ("hd95", 9.0)):
        found = scores.difference("B", "A", "tumor", metric)
        assert found == (gap, gap, gap, 6) and found.verdict(METRICS[metric].higher) == "worse"
    assert scores.difference("A", "A", "tumor", "dice") is None


def test_trainings_on_two_datasets_are_refused(results: Results, capsys: pytest.CaptureFixture) -> None:
    mine = results.begin(SEMI).parent
    other = mine.parent.parent / "Dataset779_Other" / mine.name
    shutil.copytree(mine, other)
    assert main(["report", str(mine), str(other), "-o", str(results.folder / "out")]) == 1
    assert "of two datasets, Dataset779_Other and Dataset778_Blobs" in capsys.readouterr().err


def test_copies_of_a_fold_are_left_out_by_name(results: Results, capsys: pytest.CaptureFixture) -> None:
    results.finish(results.begin(SEMI), 1)
    folder = results.fold(SEMI)
    shutil.copytree(folder, folder.with_name("fold_0_backup"))
    folder.with_name("fold_0.zip").touch()
    page = report(results, folder.parent)
    assert "expected fold_0 and so on or fold_all: fold_0.zip, fold_0_backup" in capsys.readouterr().out
    assert len(page.tables["resources"]) == 2
