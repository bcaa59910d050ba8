from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import SimpleITK as sitk

from benchmarks.leaderboard import report
from benchmarks.leaderboard.metrics import NAMES
from benchmarks.leaderboard.panel import write_panel
from benchmarks.leaderboard.suite import Suite, SuiteError, load_suite

CASES = [f"case_{k}" for k in range(6)]
GAIN = {"supervised": 0.0, "supervised_all": 0.2, "self_training": 0.05, "DiffCL": 0.1}


def suite() -> Suite:
    published: list[Mapping[str, Any]] = [
        {
            "method": "nnUNetTrainerDiffCL",
            "labeled": 2,
            "dice": 81.5,
            "source": "a paper",
            "note": "best checkpoint",
        }
    ]
    methods = ["supervised", "supervised_all", "self_training", "nnUNetTrainerDiffCL"]
    return dataclasses.replace(
        load_suite("smoke"), budgets=[2, 4], seeds=[0, 1], methods=methods, published=published
    )


def content(row: Any, gain: float) -> dict[str, Any]:
    """A finished row: Dice 0.6 + gain (+ 0.02 for 4 labels, + 0.01 for seed 1), a little different from case
    to case."""
    dice = [
        [0.6 + gain + 0.02 * (row.labeled == 4) + 0.01 * row.seed + 0.005 * k] * 2 for k in range(len(CASES))
    ]
    table = {
        name + suffix: dice if name == "dice" else [[1.5, None]] * len(CASES)
        for suffix in ("", "_lcc")
        for name in NAMES
    }
    means = {
        name: float(np.mean([v for pair in values for v in pair if v is not None]))
        for name, values in table.items()
    }
    return {
        **{
            "suite": "smoke",
            "method": row.method,
            "trainer": row.trainer,
            "dataset": "Dataset900_Phantoms",
            "labeled": row.labeled or 60,
        },
        **{
            "seed": row.seed,
            "fold": row.fold,
            "dice": means["dice"],
            "status": "finished",
            "fingerprint": row.fingerprint,
        },
        **{"metrics": means, "structures": ["organ", "lesion"], "cases": CASES, "per_case": table},
        "panel": {"case": "case_3", "aspect": 1.0},
        "curve": {"train_loss": [1.0, 0.5], "val_loss": [1.0, None], "pseudo_dice": [0.1, 0.2]},
        "config": {"general": {"num_iterations_per_epoch": 3}},
        "plan": {
            "spacing": [1.0, 1.0, 2.5],
            "patch_size": [16, 32, 32],
            "batch_size": 2,
            "network": "PlainConvUNet",
            "features": [4, 8],
        },
        **{
            "commit": "abc",
            "versions": {"torch": "2"},
            "hardware": "a processor, one thread",
            "train_seconds": 1800,
            "seconds": 1980,
            "cpu_seconds": 120,
            "peak_memory_mb": 900,
        },
    }


def write_rows(folder: Path, which: Suite) -> None:
    for row in which.rows():
        target = folder / "smoke" / f"{row.name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(content(row, GAIN[row.method])), encoding="utf-8")
        (target.parent / "panels").mkdir(exist_ok=True)
        matplotlib.image.imsave(target.parent / "panels" / f"{row.name}.png", np.zeros((8, 34, 3), np.uint8))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    write_rows(folder, suite())
    report.write_report(suite(), folder)
    return folder


def entries(folder: Path) -> dict[tuple[int, str], dict[str, Any]]:
    return {
        (e["budget"], e["method"]): e
        for e in json.loads((folder / "smoke.json").read_text(encoding="utf-8"))["table"]
    }


def test_the_table_has_mean_and_sd_over_seeds_and_differences_paired_by_case_and_seed(written: Path) -> None:
    entry = entries(written)[2, "DiffCL"]
    assert entry["seeds"] == [0, 1]
    assert entry["dice"] == pytest.approx(0.6 + 0.1 + 0.005 + 0.0125)
    assert entry["dice_sd"] == pytest.approx(np.std([0, 0.01], ddof=1))
    assert entry["dice_minus_supervised"] == pytest.approx(0.1)
    assert entry["dice_minus_supervised_interval"] == pytest.approx([0.1, 0.1])  # every case gains as much
    assert entry["dice_minus_self_training"] == pytest.approx(0.05)
    assert entry["against_supervised"] == entry["against_self_training"] == "above"
    assert entry["cpu_seconds_per_step"] == pytest.approx(120 / (2 * 3))
    assert entry["gap_closed"] == pytest.approx(0.5)


def test_no_share_of_a_gap_that_may_be_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path, suite())
    monkeypatch.setattr(report, "interval", lambda difference: (-0.01, 0.5))
    text = report.write_report(suite(), tmp_path)
    assert "**Not distinguishable from supervised only**: DiffCL (+10.00)." in text
    assert all(e.get("gap_closed") is None for e in entries(tmp_path).values())


def test_the_upper_bound_stands_under_every_budget(written: Path) -> None:
    table = entries(written)
    assert {budget for budget, method in table if method == "supervised_all"} == {2, 4}
    assert table[4, "supervised_all"]["labeled"] == 60
    assert table[4, "DiffCL"]["gap_closed"] == pytest.approx(0.1 / 0.18)


def test_markdown_says_setting_numbers_sources_and_links_pictures(written: Path) -> None:
    text = (written / "smoke.md").read_text(encoding="utf-8")
    for part in (
        "4 x 3 iterations",
        "last checkpoint",
        "a processor, one thread",
        "1 x 1 x 2.5 mm",
        "bootstrap",
        "Largest component",
    ):
        assert part in text
    assert "| DiffCL | 2 | 71.75 ± 0.71 |" in text
    assert "+10.00 [+10.00, +10.00] | above | +5.00 [+5.00, +5.00] | above | 50 | 2.00 | 20.00 |" in text
    assert "| DiffCL | 2 | 81.5 |  |  |  | 71.75 | " in text
    assert "a paper; best checkpoint" in text
    assert "Not finished" not in text
    for name in ("bars", "budgets", "overlay", "curves"):
        assert f"(smoke_{name}.png)" in text
        assert (written / f"smoke_{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in written.glob("*.svg")} == {
        f"smoke_{name}.svg" for name in ("bars", "budgets", "curves")
    }


def test_the_report_says_which_methods_do_not_beat_the_baselines(written: Path, tmp_path: Path) -> None:
    above = (
        "**Above supervised only**: DiffCL (+10.00). **Above self-training**: DiffCL (+5.00). "
        "The best, DiffCL, closes 50 % of the gap to all labels."
    )
    assert above in (written / "smoke.md").read_text(encoding="utf-8")
    write_rows(tmp_path, suite())
    for row in suite().rows():
        if row.method == "DiffCL" and row.labeled == 2:
            (tmp_path / "smoke" / f"{row.name}.json").write_text(
                json.dumps(content(row, -0.03)), encoding="utf-8"
            )
    text = report.write_report(suite(), tmp_path)
    below = "**Below supervised only**: DiffCL (-3.00). **Below self-training**: DiffCL (-8.00)."
    assert f"{below} The best, DiffCL, closes -15 % of the gap to all labels." in text
    assert "**Above supervised only**: DiffCL (+10.00)" in text  # with 4 labels


def test_rows_with_a_start_are_compared_with_supervised_training_that_went_on_as_well(tmp_path: Path) -> None:
    own: dict[str, Mapping[str, Any]] = {
        "more": {"trainer": "nnUNetTrainerSupervised", "start": "supervised"},
        "nnUNetTrainerDiffCL": {"start": "supervised"},
    }
    methods = ["supervised", "more", "nnUNetTrainerDiffCL", "nnUNetTrainerFixMatch"]
    which = dataclasses.replace(suite(), budgets=[2], published=[], methods=methods, method=own)
    for row in which.rows():
        gain = {"supervised": 0.0, "more": 0.2, "DiffCL": 0.15, "FixMatch": 0.1}[row.method]
        target = tmp_path / "smoke" / f"{row.name}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(content(row, gain)), encoding="utf-8")
    text = report.write_report(which, tmp_path)
    found = entries(tmp_path)
    assert found[2, "DiffCL"]["dice_minus_continued"] == pytest.approx(-0.05)
    assert found[2, "DiffCL"]["against_supervised"] == "above"
    assert all("dice_minus_continued" not in found[2, m] for m in ("FixMatch", "more", "supervised"))
    assert "**Below supervised, continued**: DiffCL (-5.00)." in text


def test_seeds_are_never_mixed_within_a_difference(tmp_path: Path) -> None:
    """Supervised has seed 0 alone: what DiffCL reaches with seed 1 is no part of the difference."""
    write_rows(tmp_path, suite())
    for row in suite().rows():
        path = tmp_path / "smoke" / f"{row.name}.json"
        if row.method == "supervised" and row.seed == 1:
            path.unlink()
        if row.method == "DiffCL" and row.seed == 1:
            path.write_text(json.dumps(content(row, 0.3)), encoding="utf-8")
    text = report.write_report(suite(), tmp_path)
    assert entries(tmp_path)[2, "DiffCL"]["dice_minus_supervised"] == pytest.approx(0.1)
    assert "+10.00 [+10.00, +10.00] (paired seeds: 1)" in text
    before = entries(tmp_path)[2, "DiffCL"]
    (tmp_path / "smoke" / "supervised_n2_s0.json").unlink()
    report.write_report(suite(), tmp_path)
    assert "dice_minus_supervised" not in entries(tmp_path)[2, "DiffCL"]
    assert before["dice"] == entries(tmp_path)[2, "DiffCL"]["dice"]


def test_csv_holds_the_same_table(written: Path) -> None:
    with open(written / "smoke.csv", encoding="utf-8", newline="") as file:
        rows = {(int(r["budget"]), r["method"]): r for r in csv.DictReader(file)}
    table = entries(written)
    assert rows.keys() == table.keys()
    for key, row in rows.items():
        assert float(row["dice"]) == pytest.approx(table[key]["dice"], abs=1e-6)
    assert float(rows[2, "DiffCL"]["dice_minus_supervised_interval_low"]) == pytest.approx(0.1)


def test_the_same_rows_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    write_rows(tmp_path, suite())
    report.write_report(suite(), tmp_path)
    names = sorted(p.name for p in written.glob("smoke*.*"))
    assert len(names) == 10
    assert {n: (tmp_path / n).read_bytes() for n in names} == {n: (written / n).read_bytes() for n in names}


def test_failed_and_missing_rows_are_listed_and_do_not_count(tmp_path: Path) -> None:
    which = suite()
    write_rows(tmp_path, which)
    first, second = (tmp_path / "smoke" / f"DiffCL_n2_s{seed}.json" for seed in (0, 1))
    first.write_text(
        json.dumps(
            {
                **json.loads(first.read_text(encoding="utf-8")),
                "status": "failed",
                "dice": None,
                "error": "out of memory",
            }
        ),
        encoding="utf-8",
    )
    second.unlink()
    text = report.write_report(which, tmp_path)
    assert "- `DiffCL_n2_s0`: **failed**: out of memory" in text
    assert "- `DiffCL_n2_s1`: not run" in text
    assert (2, "DiffCL") not in entries(tmp_path)
    assert (4, "DiffCL") in entries(tmp_path)


def test_a_budget_without_rows_and_missing_panels_leave_a_report_without_dead_links(tmp_path: Path) -> None:
    which = suite()
    write_rows(tmp_path, which)
    for path in (tmp_path / "smoke").glob("*_n2_*.json"):
        path.unlink()
    text = report.write_report(which, tmp_path)
    assert "(smoke_overlay.png)" in text
    assert (tmp_path / "smoke_overlay.png").is_file()
    (tmp_path / "smoke_overlay.png").unlink()
    for path in (tmp_path / "smoke" / "panels").iterdir():
        path.unlink()
    text = report.write_report(which, tmp_path)
    assert "(smoke_curves.png)" in text
    assert "overlay" not in text
    assert not (tmp_path / "smoke_overlay.png").exists()


def test_rows_of_other_settings_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path, suite())
    with pytest.raises(SuiteError, match=r"other settings.*supervised_n2_s0\.json"):
        report.write_report(
            dataclasses.replace(suite(), schedule={"num_epochs": 9, "num_iterations_per_epoch": 3}), tmp_path
        )
    with pytest.raises(SuiteError, match=r"no row in .* use `run` first"):
        report.write_report(suite(), tmp_path / "nowhere")


def test_the_format_of_the_features_stands_beside_the_numbers(tmp_path: Path) -> None:
    for last in (False, True):
        which = dataclasses.replace(
            suite(), schedule={**suite().schedule, "amp": "bfloat16", "channels_last": last}
        )
        write_rows(tmp_path / str(last), which)
        text = report.write_report(which, tmp_path / str(last))
        assert ("bfloat16, channels_last, spacing" in text) == last != ("bfloat16, spacing" in text)


def test_the_bootstrap_interval_covers_the_mean_and_shrinks_with_the_spread() -> None:
    values = np.random.default_rng(1).normal(0.03, 0.02, (1, 20))
    low, high = report.interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(20), rel=0.1)
    half = report.interval(values / 2)
    assert half == pytest.approx((low / 2, high / 2))
    apart = np.concatenate([values - 0.1, values, values + 0.1])  # seeds that differ widen it
    wide = report.interval(apart)
    assert wide[1] - wide[0] > 5 * (high - low)


@pytest.mark.parametrize(
    ("bounds", "word"), [((0.1, 0.2), "above"), ((-0.1, 0.2), "not distinguishable"), ((-0.2, -0.1), "below")]
)
def test_an_interval_has_a_verdict(bounds: tuple[float, float], word: str) -> None:
    assert report.compared(bounds) == word


def test_a_strip_shows_image_labels_prediction_and_error_on_the_slice_with_most_of_the_smallest_structure(
    tmp_path: Path,
) -> None:
    truth = np.zeros((5, 6, 7), np.uint8)
    truth[1, 1:4, 1:4] = 1
    truth[3, 2:4, 2:4] = 2  # the smallest: slice 3
    prediction = truth.copy()
    prediction[3, 5, 6] = 1
    arrays = {"imagesTr/a_0000": truth.astype(np.float32), "labelsTr/a": truth, "validation/a": prediction}
    for name, array in arrays.items():
        (tmp_path / name).parent.mkdir()
        picture = sitk.GetImageFromArray(np.asarray(array))
        picture.SetSpacing((1.0, 3.0, 5.0))
        sitk.WriteImage(picture, str(tmp_path / f"{name}.nii.gz"))
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "MRI"}}', encoding="utf-8")
    assert write_panel(
        tmp_path, tmp_path / "validation", "a", ".nii.gz", tmp_path / "a.png"
    ) == pytest.approx(3.0)
    strip = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
    assert strip.shape == (6, 4 * 7 + 3 * 2, 3)
    image, labels, predicted, error = (strip[:, k * 9 : k * 9 + 7] for k in range(4))
    differ = lambda a: {  # noqa: E731
        tuple(int(i) for i in index) for index in np.argwhere(np.abs(a - image).max(-1) > 0.01)
    }
    assert differ(labels) == {(y, x) for y in (2, 3) for x in (2, 3)}
    assert differ(predicted) == differ(labels) | {(5, 6)}
    assert differ(error) == {(5, 6)}


def test_a_share_of_the_gap_is_over_the_seeds_that_all_have() -> None:
    def rows(*dice: float) -> list[dict[str, Any]]:
        return [{"seed": k, "per_case": {"dice": [[v], [v]]}} for k, v in enumerate(dice)]

    supervised, upper = rows(0.5, 0.7), rows(0.9)
    assert report.gap_closed(rows(0.7, 0.71), supervised, upper) == pytest.approx(0.5)
    assert report.gap_closed(rows(0.7), supervised, rows(0.5)) is None
    assert report.gap_closed(rows(0.7)[1:], supervised, upper) is None
