"""docs/reference/configuration.md is what its generator writes."""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from nnssl.config import Config, Share

DOCS = Path(__file__).resolve().parents[1] / "docs"


@dataclass(frozen=True)
class Base(Config):
    rate: Share = 1 / 3  # T: share | of all (paper)
    # meaning of a key
    # in two lines: with a colon
    mode: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Derived(Base):
    phases: tuple[Share, ...] = (0.5, 1.0)  # shares (ours)
    mode: Literal["a", "b"] = "b"  # mode (ours)


@dataclass(frozen=True)
class Switch(Config):
    on: bool = True  # whether to act


@dataclass(frozen=True)
class Silent(Config):
    rate: Share = 0.5


@pytest.fixture(scope="module")
def generator() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "generate_reference.py"))


def test_the_committed_page_is_current(generator: dict[str, Any]) -> None:
    written = (DOCS / "reference" / "configuration.md").read_text(encoding="utf-8")
    assert written == generator["page"](), "run python docs/generate_reference.py"


def test_a_line_of_the_table_is_field_annotation_and_comment(generator: dict[str, Any]) -> None:
    lines = generator["table"](Base).splitlines()
    assert lines[0] == "| Key | Type | Default | Range | Symbol | Meaning |"
    assert lines[2] == r"| `rate` | number | `1 / 3` | from 0 to 1 | `T` | Share \| of all (paper) |"
    assert lines[3] == '| `mode` | a or b | `"a"` |  |  | Meaning of a key in two lines: with a colon |'


def test_fields_of_a_base_are_listed_and_may_be_redefined(generator: dict[str, Any]) -> None:
    lines = generator["table"](Derived).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| `rate`", "| `mode`", "| `phases`"]
    assert lines[3] == '| `mode` | a or b | `"b"` |  |  | Mode (ours) |'
    assert lines[4] == "| `phases` | list of numbers | `[0.5, 1.0]` | from 0 to 1 |  | Shares (ours) |"


def test_columns_that_stay_empty_are_left_out(generator: dict[str, Any]) -> None:
    lines = generator["table"](Switch).splitlines()
    assert lines == [
        "| Key | Type | Default | Meaning |",
        "| --- | --- | --- | --- |",
        "| `on` | true or false | `true` | Whether to act |",
    ]


def test_a_field_without_a_comment_is_refused(generator: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Silent\.rate has no comment"):
        generator["table"](Silent)
