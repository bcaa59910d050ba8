from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest

from nnssl.training.history import History


def test_history_writes_one_row_per_epoch_and_rewinds(tmp_path: Path) -> None:
    history = History()
    for epoch in (0, 1, 2, 1):  # the last: continued from a checkpoint after epoch 0
        history.add(epoch, 0.01, {"loss/a": epoch / 3, "loss/b": 1.0}, {"a": 1.0, "b": 0.5})
    history.write(str(tmp_path))
    with open(tmp_path / "losses.csv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["epoch", "lr", "loss/a", "loss/b", "weight/a", "weight/b"]
    assert [r["epoch"] for r in rows] == ["0", "1"] and float(rows[1]["loss/a"]) == pytest.approx(
        1 / 3, abs=1e-9
    )
    assert (tmp_path / "losses.png").stat().st_size > 1000
    assert history.describe() == "losses a 0.3333 (weight 1), b 1.0000 (weight 0.5)"


def test_diagnostics_are_columns_and_end_the_line_of_the_log(tmp_path: Path) -> None:
    history = History()
    history.add(0, 0.01, {"loss/a": 0.5, "diagnostic/share": 0.25}, {"a": 1.0})
    history.write(str(tmp_path))
    assert (tmp_path / "losses.csv").read_text(encoding="utf-8").splitlines()[
        0
    ] == "epoch,lr,loss/a,diagnostic/share,weight/a"
    assert history.describe() == "losses a 0.5000 (weight 1); share 0.25"


def test_columns_that_come_or_go_where_a_run_continues_are_all_written(tmp_path: Path) -> None:
    history = History()
    history.add(0, 0.01, {"loss/a": 0.5, "gradient/a": 2.0}, {"a": 1.0})
    history.add(1, 0.01, {"loss/a": 0.4}, {"a": 1.0})
    history.write(str(tmp_path))
    lines = (tmp_path / "losses.csv").read_text(encoding="utf-8").splitlines()
    assert lines == ["epoch,lr,loss/a,gradient/a,weight/a", "0,0.01,0.5,2,1", "1,0.01,0.4,nan,1"]


def test_the_picture_takes_a_five_hundredth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, drawn, clock = History(), [], [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def plot(path: str) -> None:
        drawn.append(clock[0])
        clock[0] += 0.5

    monkeypatch.setattr(history, "_plot", plot)
    for epoch in range(10):
        history.add(epoch, 0.01, {"loss/a": 0.5}, {"a": 1.0})
        history.write(str(tmp_path), last=epoch == 9)
        clock[0] += 100
    assert drawn == [1000.0, 1300.5, 1601.0, 1901.5]
    assert len((tmp_path / "losses.csv").read_text(encoding="utf-8").splitlines()) == 11
