"""Pseudo-labels over time: what is saved, when, and that the training does not notice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from nnssl.commands.cli import main
from nnssl.methods.semi import SemiConfig
from nnssl.training import pictures as module
from nnssl.training.pictures import affordable, moments, spread, view
from tests.place import SHORT, Place, losses, run


@pytest.mark.parametrize(
    ("epochs", "times", "expected"),
    [(1000, 10, list(range(99, 1000, 100))), (3, 10, [0, 1, 2]), (7, 2, [3, 6]), (5, 1, [4])],
)
def test_moments_are_spread_evenly_and_end_with_the_training(
    epochs: int, times: int, expected: list[int]
) -> None:
    assert moments(epochs, times) == expected


def test_pictures_get_fewer_in_a_short_training_and_one_stays() -> None:
    assert affordable(10, 9, 250_000, 4) == 10
    assert affordable(10, 9, 1000, 4) == 4  # 36 of 12,000 passes
    assert affordable(10, 9, 4, 4) == 1


def test_scans_are_spread_from_the_first_to_the_last() -> None:
    assert spread(["d", "a", "c", "b", "e"], 3) == ["a", "c", "e"]
    assert spread(["b", "a"], 3) == ["a", "b"]


def test_a_view_is_centered_and_padded() -> None:
    volume = np.arange(2 * 4 * 5 * 6).reshape(2, 4, 5, 6)
    assert (view(volume, (2, 2, 3), (2, 4, 2), 0) == volume[:, 1:3, 0:4, 2:4]).all()
    flat = view(volume, (1, 2, 3), (9, 6), -7)
    assert flat.shape == (2, 9, 6) and (flat[:, :2] == -7).all() and (flat[:, 2:7] == volume[:, 1]).all()


@pytest.mark.slow
def test_pictures_change_no_loss_and_end_up_in_the_report(
    place: Place, capsys: pytest.CaptureFixture
) -> None:
    trained = {}
    for name, times in (("Without", 0), ("With", 2)):
        place.plan(name, **{**SHORT, "pseudo_label_pictures": times})
        trained[name] = run(place.trainer("nnUNetTrainerSemi", plans=name))
    tables = [(Path(t.output_folder) / "losses.csv").read_bytes() for t in trained.values()]
    assert tables[0] == tables[1]
    weights = [t.network.state_dict() for t in trained.values()]
    assert all(bool((weights[0][key] == value).all()) for key, value in weights[1].items())
    assert trained["With"].logger.get_value("val_losses", None) == trained["Without"].logger.get_value(
        "val_losses", None
    )
    assert not (Path(trained["Without"].output_folder) / "pseudo_labels").exists()

    folder = Path(trained["With"].output_folder) / "pseudo_labels"
    assert sorted(path.name for path in folder.iterdir()) == ["epoch_00001.npz", "scans.npz"]
    scans, content = (np.load(folder / name) for name in ("scans.npz", "epoch_00001.npz"))
    unlabeled = trained["With"].method.planned.unlabeled_cases
    assert list(scans["names"]) == [unlabeled[0], unlabeled[2], unlabeled[4]]
    for i in range(len(scans["names"])):
        labels = content[f"label_{i}"]
        assert labels.shape == scans[f"image_{i}"].shape == content[f"confidence_{i}"].shape
        assert set(np.unique(labels)) <= {0, 1, 2} and set(np.unique(content[f"accepted_{i}"])) <= {0, 1}
    dice = content["dice_student"]
    assert dice.shape == content["dice_teacher"].shape == (2,) and (dice >= 0).all() and (dice <= 1).all()

    record = json.loads((Path(trained["With"].output_folder) / "training.json").read_text(encoding="utf-8"))
    assert record["epochs_done"] == 2 and record["peak_memory"] > 2**20 and record["precision"] == "float32"
    assert (
        "pseudo_label_pictures" in record["changed"]
        and record["config"]["Semi"]["threshold"] == SemiConfig().threshold
    )
    assert record["cases"] == {"labeled": 3, "unlabeled": 5, "validation": 1}
    row = losses(trained["With"])[-1]
    assert 0 <= row["accepted/background"] <= row["called/background"] <= 1
    assert sum(row[f"called/{name}"] for name in ("background", "a", "b")) == pytest.approx(1)
    assert row["loss/supervised"] == pytest.approx(record["logging"]["train_losses"][-1])

    console = capsys.readouterr().out
    assert console.count("Epoch 1 (2 of 2): supervised") == 2 and "not the default: num_epochs 2" in console
    assert "train_loss" not in console and "train_loss" in Path(trained["With"].log_file).read_text()

    out = place.results.parent / "report"
    assert main(["--traceback", "report", trained["With"].output_folder, "-o", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "student and teacher" in page and page.count("epoch 1</th>") == len(scans["names"])
    assert (out / "report_pseudo_labels_1.png").is_file()


def test_a_continued_run_shows_the_same_scans(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "affordable", lambda times, *_: times)
    place.plan(**{**SHORT, "pseudo_label_pictures": 9})
    trainer = run(place.trainer("nnUNetTrainerSemi"))
    folder = Path(trainer.output_folder) / "pseudo_labels"
    before = list(np.load(folder / "scans.npz")["names"])
    for file in list((place.raw / "imagesUn").glob("scan_00*")):
        shutil.copy(file, file.with_name(file.name.replace("scan_00", "aaa_00")))

    def go_on(epochs: int) -> list[str]:
        place.plan(**{**SHORT, "num_epochs": epochs, "pseudo_label_pictures": 9})
        again = place.trainer("nnUNetTrainerSemi", resume=True)
        again.load_checkpoint(str(folder.parent / "checkpoint_final.pth"))
        run(again)
        return sorted(path.stem for path in folder.glob("epoch_*.npz"))

    assert go_on(3) == ["epoch_00000", "epoch_00001", "epoch_00002"]
    assert list(np.load(folder / "scans.npz")["names"]) == before and "aaa_00" not in before
    for file in (place.raw / "imagesUn").glob(f"{before[-1]}*"):
        file.unlink()
    assert go_on(4) == ["epoch_00003"]  # others than before
