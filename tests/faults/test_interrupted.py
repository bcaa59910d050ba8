"""What a command that ended between two writes left is completed by the next run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnssl import files
from nnssl.data.split import nnunet_split
from nnssl.training.checkpoint import complete_best
from tests.commands.test_export import MODEL, export
from tests.place import Place, trained


def test_an_export_that_ended_before_its_archive_was_in_place_is_completed(
    drawn: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(drawn)
    output = tmp_path / "out"
    assert export(output) == 0
    folder, archive = output / MODEL, output / f"{MODEL}.zip"
    whole = archive.read_bytes()
    archive.unlink()
    assert export(output) == 0 and len(archive.read_bytes()) == len(whole)
    archive.unlink()
    (folder / "plans.json").write_text("{}")  # not what this export writes
    capsys.readouterr()
    assert export(output) == 1
    assert f"{folder} already exists" in capsys.readouterr().err
    assert (folder / "plans.json").read_text() == "{}" and sorted(os.listdir(output)) == [MODEL]


@pytest.mark.parametrize(("ema", "is_best"), [([0.5], True), ([0.4, 0.5], True), ([0.5, 0.4], False)])
def test_a_latest_checkpoint_that_should_have_become_the_best_does(
    tmp_path: Path, ema: list[float], is_best: bool
) -> None:
    latest, best = tmp_path / "checkpoint_latest.pth", tmp_path / "checkpoint_best.pth"
    files.save_torch({"current_epoch": len(ema)}, latest)
    complete_best(str(latest), ema)
    assert best.exists() == is_best
    for older in (0, len(ema) + 1):  # of an epoch before, or of one that the ended run had reached
        files.save_torch({"current_epoch": older}, best)
        complete_best(str(latest), ema)
        assert torch.load(best)["current_epoch"] == (len(ema) if is_best and older == 0 else older)
    best.write_bytes(b"damaged")
    complete_best(str(latest), ema)
    assert (files.torch_damage(best) == "") == is_best


def test_a_checkpoint_that_is_not_the_latest_does_not_become_the_best(tmp_path: Path) -> None:
    files.save_torch({"current_epoch": 1}, tmp_path / "checkpoint_final.pth")
    complete_best(str(tmp_path / "checkpoint_final.pth"), [0.5])
    assert os.listdir(tmp_path) == ["checkpoint_final.pth"]


@pytest.mark.parametrize("number", [5, 8, 23])
def test_the_split_is_nnunets_own(number: int) -> None:
    cases = [f"case_{i:02d}" for i in reversed(range(number))]
    theirs = generate_crossval_split(list(np.sort(cases)), seed=12345, n_splits=5)
    assert json.dumps(nnunet_split(cases)) == json.dumps(theirs)
