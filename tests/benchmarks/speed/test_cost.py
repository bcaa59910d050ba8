from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.speed.cost import accuracy_table, cards_table
from benchmarks.speed.timing import RESULTS
from nnssl.commands.trainers import list_trainers, trainers_folder
from nnssl.files import read_json

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "small-gpu.md"


def test_the_page_shows_the_cards_of_the_results() -> None:
    found, page = read_json(RESULTS / "cost_cards.json"), PAGE.read_text(encoding="utf-8")
    assert {f"nnUNetTrainer{name}" for name in found} == set(list_trainers(trainers_folder()))
    assert cards_table(found) in page, f"copy the table from {RESULTS / 'cost_cards.md'}"


def test_the_page_shows_how_good_the_predictions_are() -> None:
    found, page = read_json(RESULTS / "cost_cpu.json"), PAGE.read_text(encoding="utf-8")
    assert accuracy_table(found) in page, f"copy the table from {RESULTS / 'cost_cpu.md'}"
    assert len(found["rows"]) >= 6
    for row in found["rows"]:
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.15), row["trainer"]
