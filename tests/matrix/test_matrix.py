"""Every trainer with everything that nnU-Net can be asked to train; the table in the documentation is that of
the matrix."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.matrix.cells import GREEN, prepared, run_cell, trainers
from tests.matrix.columns import COLUMNS, Workspace

DOCS = Path(__file__).resolve().parents[2] / "docs"
TRAINERS = trainers()
# columns far from what other tests train; every trainer has a cell in one
SOME = ["resenc", "modalities", "anisotropic", "regions_ignore", "six_classes", "one_class"]
SOME += ["png", "tiff", "pretrained"]
SUBSET = sorted((SOME[i % len(SOME)], trainer) for i, trainer in enumerate(TRAINERS))


@pytest.fixture(scope="module")
def place(request: pytest.FixtureRequest) -> Iterator[Workspace]:
    with prepared(request.param) as place:
        yield place


def trains(place: Workspace, column: str, trainer: str) -> None:
    cell = run_cell(place, column, trainer)
    assert cell["status"] == GREEN, cell


@pytest.mark.slow
@pytest.mark.parametrize(("place", "column", "trainer"), [(c, c, t) for c, t in SUBSET], indirect=["place"])
def test_a_cell_of_each_trainer(place: Workspace, column: str, trainer: str) -> None:
    trains(place, column, trainer)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("place", "column", "trainer"),
    [(c, c, t) for c in COLUMNS for t in TRAINERS if (c, t) not in SUBSET],
    indirect=["place"],
)
def test_every_other_cell(place: Workspace, column: str, trainer: str) -> None:
    trains(place, column, trainer)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads((DOCS / "reference" / "compatibility.json").read_text(encoding="utf-8"))


def test_the_results_have_every_cell_and_none_that_fails(results: dict[str, Any]) -> None:
    found = {name: column["title"] for name, column in results["columns"].items()}
    hint = "run python -m tests.matrix docs/reference/compatibility.json"
    assert found == {name: column.title for name, column in COLUMNS.items()}, hint
    for name, column in results["columns"].items():
        assert sorted(column["cells"]) == TRAINERS, f"{name}: {hint}"
        failing = {t: cell for t, cell in column["cells"].items() if cell["status"] == "failing"}
        assert not failing, failing


def test_the_committed_page_is_that_of_the_results(results: dict[str, Any]) -> None:
    generator = runpy.run_path(str(DOCS / "generate_compatibility.py"))
    written = (DOCS / "reference" / "compatibility.md").read_text(encoding="utf-8")
    assert written == generator["page"](results), "run python docs/generate_compatibility.py"


def test_refusals_are_told_with_their_reason() -> None:
    page = runpy.run_path(str(DOCS / "generate_compatibility.py"))["page"]
    cells = {
        "nnUNetTrainerA": {"status": "green"},
        "nnUNetTrainerB": {"status": "refused", "reason": "ValueError: not\nthis"},
        "nnUNetTrainerC": {"status": "failing", "reason": "KeyError: x"},
    }
    content = {"versions": {"nnunetv2": "1"}, "columns": {"2d": {"title": "a title", "cells": cells}}}
    lines = page(content).splitlines()
    assert "3 cells: 1 green, 1 refused, 1 failing, with nnunetv2 1." in lines
    assert "| a title | ✓ | refused 1 | **fails** 2 |" in lines
    assert "1. ValueError: not this" in lines and "2. KeyError: x" in lines
