from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.leaderboard import __main__, summary
from benchmarks.leaderboard.suite import SuiteError
from tests.benchmarks.leaderboard.test_report import content, suite, write_rows


def test_methods_are_ranked_by_paired_gains_over_suites_and_budgets(tmp_path: Path) -> None:
    write_rows(tmp_path, suite())
    for row in suite().rows():
        if row.method == "DiffCL" and row.labeled == 4:  # below supervised there
            path = tmp_path / "smoke" / f"{row.name}.json"
            path.write_text(json.dumps({**content(row, -0.05), "cpu_seconds": 360}), encoding="utf-8")
    text = summary.write_summary([suite()], tmp_path)
    table = {e["method"]: e for e in json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))}
    assert table.keys() == {"supervised", "self_training", "DiffCL"}  # not the upper bound
    assert {m: e["mean_rank"] for m, e in table.items()} == {
        "supervised": 2.5,
        "self_training": 1.5,
        "DiffCL": 2.0,
    }
    assert table["DiffCL"]["mean_gain"] == pytest.approx((0.1 - 0.05) / 2)
    assert table["DiffCL"]["cost"] == pytest.approx((1 + 3) / 2)
    assert table["DiffCL"]["verdicts"] == {"smoke, 2 labels": "above", "smoke, 4 labels": "below"}
    assert "| DiffCL | 2.00 | 2 | +2.50 | 1 | 0 | 1 | 2.00 | +10.00 | -5.00 |" in text
    assert text == (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_methods_with_fewer_rows_come_last_and_shift_no_ranks(tmp_path: Path) -> None:
    write_rows(tmp_path, suite())
    for path in (tmp_path / "smoke").glob("DiffCL_n4_*.json"):
        path.unlink()
    lines = summary.write_summary([suite()], tmp_path).splitlines()
    assert lines[-1].startswith("| DiffCL |  | 1 | +10.00 |")
    table = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert {e["method"]: e["mean_rank"] for e in table} == {
        "self_training": 1.0,
        "supervised": 2.0,
        "DiffCL": None,
    }


def test_ranks_and_gains_stand_on_seeds_that_all_ranked_methods_have(tmp_path: Path) -> None:
    """A further seed of one method, however lucky, moves neither."""
    write_rows(tmp_path, suite())
    before = summary.ranked(summary.columns([suite()], tmp_path))
    more = dataclasses.replace(suite(), seeds=[0, 1, 99])
    for row in more.rows():
        if row.seed == 99 and row.method in ("supervised", "DiffCL"):
            path = tmp_path / "smoke" / f"{row.name}.json"
            path.write_text(json.dumps(content(row, 0.5 * (row.method == "DiffCL"))), encoding="utf-8")
    after = summary.ranked(summary.columns([more], tmp_path))
    told = ("method", "mean_rank", "mean_gain", "gains", "ranks")
    assert [[e[key] for key in told] for e in after] == [[e[key] for key in told] for e in before]


def test_rows_to_rank_are_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path, dataclasses.replace(suite(), methods=["supervised"]))
    with pytest.raises(SuiteError, match="no budget of smoke has a supervised row and another one"):
        summary.write_summary([suite()], tmp_path)
    assert __main__.main(["summary", "smoke", "--results", str(tmp_path / "nowhere")]) == 1
    assert "use `run` first" in capsys.readouterr().err
