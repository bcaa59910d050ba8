from __future__ import annotations

import numpy as np
import pytest

from benchmarks.quality.correction import SETS, corrected, markdown, measures


def rows(guess: str) -> list[dict[str, float | str]]:
    """Twenty scans; one guess is right, the other has no relation to the truth."""
    other = np.random.default_rng(1).random(20)
    return [
        {
            "case": f"c{i}",
            "dice": 0.5 + 0.02 * i,
            "agreement": 0.1 * i if guess == "agreement" else float(other[i]),
            "confidence": 0.1 * i if guess == "confidence" else float(other[i]),
        }
        for i in range(20)
    ]


def test_correcting_a_scan_brings_what_it_lacked() -> None:
    true = np.array([0.9, 0.5, 0.7])
    assert corrected(true, np.array([1, 2, 0])) == pytest.approx([0.7, 2.6 / 3, 2.9 / 3, 1.0])


def test_a_guess_that_is_right_orders_as_the_truth_does() -> None:
    found = measures(rows("agreement"), 100)
    assert found["spearman_agreement"][0] == pytest.approx(1) and found["scans"] == 20
    assert abs(found["spearman_confidence"][0]) < 0.6
    curves = found["curves"]
    assert curves["as told"] == curves["worst truly"]
    assert all(a >= b - 1e-9 for a, b in zip(curves["as told"], curves["random"], strict=True))
    assert curves["random"][-1] == pytest.approx(1)
    wrong = measures(rows("confidence"), 100)["curves"]
    assert sum(wrong["as told"]) < sum(wrong["worst truly"])


def test_the_table_tells_the_gain_per_scan() -> None:
    table = markdown({"left_atrium": measures(rows("agreement"), 100)})
    assert "| left_atrium | 20 | 69.0 | 1.00 [1.00, 1.00] |" in table
    assert "| 2 (10%) | 0.49 | 0.31 | 0.49 |" in table  # the two worst lack 0.50 and 0.48
    assert set(SETS) == {"hippocampus", "left_atrium"}
