from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from benchmarks.quality.terms import acting, fifths, main, markdown, read_losses, term_table
from nnssl.training.history import History

NAN = math.nan


def test_epochs_count_as_far_as_they_lie_in_a_fifth() -> None:
    assert fifths([1, 2, 3, 4, 5]) == [1, 2, 3, 4, 5]
    assert fifths([1, 1, 2, 2, 3, 3, 4, 4, 5, 5]) == [1, 2, 3, 4, 5]
    assert fifths([6]) == [6] * 5
    # epochs of half a training: the third fifth is half the first epoch's, half the second's
    assert fifths([1, 2]) == [1, 1, 1.5, 2, 2]
    assert fifths([1, NAN]) == [1, 1, 1, None, None]


def rows() -> list[dict[str, float]]:
    """Five epochs. `late` is off at first, `weak` acts once, `other` never reaches the student."""
    late, weak = [NAN, NAN, 1.0, 1.0, 0.001], [0.5, 0.01, 0.01, 0.01, 0.01]
    return [
        {
            "epoch": e,
            "loss/supervised": 5.0 - e,
            "loss/late": 2.0,
            "loss/weak": 3.0,
            "loss/other": 1.0,
            "gradient/supervised": 2.0,
            "gradient/late": late[e],
            "gradient/weak": weak[e],
            "gradient/other": NAN,
            "weight/supervised": 1.0,
            "weight/late": float(e > 1),
            "weight/weak": 0.5,
            "weight/other": 1.0,
        }
        for e in range(5)
    ]


def test_gradients_are_relative_to_that_of_the_labels() -> None:
    table = term_table(rows())
    assert table["supervised"] == {"value": [5, 4, 3, 2, 1], "weight": [1] * 5, "gradient": [1] * 5}
    assert table["late"] == {
        "value": [2] * 5,
        "weight": [0, 0, 1, 1, 1],
        "gradient": [None, None, 0.5, 0.5, 0.0005],
    }
    assert table["weak"]["gradient"] == [0.25, 0.005, 0.005, 0.005, 0.005]
    assert [acting(table[k]) for k in ("supervised", "late", "weak", "other")] == [
        (5, 5),
        (2, 3),
        (1, 5),
        (0, 0),
    ]


def test_a_fifth_without_labels_is_compared_with_the_next_that_has_them() -> None:
    content = rows()
    for row, norm in zip(content, [NAN, 2.0, NAN, 4.0, 8.0], strict=True):
        row["gradient/supervised"], row["gradient/late"] = norm, 1.0
    table = term_table(content)
    assert table["late"]["gradient"] == [0.5, 0.5, 0.25, 0.25, 0.125]
    assert "stands in" in markdown(table) and "stands in" not in markdown(term_table(rows()))


def test_the_text_names_what_acts_and_what_does_not() -> None:
    text = markdown(term_table(rows()))
    lines = text.splitlines()
    assert lines[0] == "| term | | 0-20 % | 20-40 % | 40-60 % | 60-80 % | 80-100 % | acts |"
    assert "| late | value | 2 | 2 | 2 | 2 | 2 | 2 of 3 |" in lines
    assert "|  | gradient |  |  | 50 % | 50 % | 0.05 % |  |" in lines
    assert "Idle" in text and lines[-2].endswith(": weak.") and lines[-1].endswith(": other.")
    content = [{k: v for k, v in row.items() if not k.endswith(("weak", "other"))} for row in rows()]
    assert "Idle" not in markdown(term_table(content)) and "acts in 2 fifths" in markdown(term_table(content))
    bare = [{k: v for k, v in row.items() if not k.startswith("gradient/")} for row in rows()]
    assert "No gradients" in markdown(term_table(bare)) and "gradient" not in term_table(bare)["late"]


def test_the_command_reads_the_folders_of_finished_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    history = History()
    for row in rows():
        weights = {k.removeprefix("weight/"): v for k, v in row.items() if k.startswith("weight/")}
        history.add(
            int(row["epoch"]), 0.01, {k: v for k, v in row.items() if "/" in k and "weight" not in k}, weights
        )
    history.write(str(tmp_path))
    assert term_table(read_losses(tmp_path)) == term_table(rows())
    monkeypatch.setattr(sys, "argv", ["terms", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "has no checkpoint_final.pth" in capsys.readouterr().err
    (tmp_path / "checkpoint_final.pth").touch()
    main()
    assert markdown(term_table(rows())) in capsys.readouterr().out
