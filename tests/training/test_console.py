from __future__ import annotations

import math
import time
from typing import Any

import pytest

from nnssl.training.console import FirstSteps, accepted_share, duration, epoch_line, start_block

ROW: dict[str, Any] = {
    "epoch": 3,
    "loss/supervised": 0.25,
    "loss/pseudo": 0.5,
    "weight/supervised": 1.0,
    "weight/pseudo": 0.125,
    "accepted/background": 0.9,
    "called/background": 0.9,
    "accepted/a": 0.045,
    "called/a": 0.09,
    "accepted/b": 0.01,
    "called/b": 0.01,
}


def test_an_epoch_is_one_line() -> None:
    assert epoch_line(3, 20, ROW, 0.75, {"a": 0.5, "b": math.nan}, [70.0, 10.0, 12.0, 10.0]) == (
        "Epoch 3 (4 of 20): supervised 0.2500, in validation 0.7500, pseudo 0.5000 x 0.125; accepted 55 %; "
        "Dice a 0.500, b nan; 10.0 s, 3 min left"
    )


def test_a_method_without_a_supervised_term_of_its_own() -> None:
    row = {"loss/joint": 0.5, "weight/joint": 1.0}
    line = epoch_line(0, 1, row, 0.25, {"a": 1.0}, [5.0])
    assert line == "Epoch 0 (1 of 1): joint 0.5000, validation 0.2500; Dice a 1.000; 5.0 s, 0 s left"


def test_the_accepted_share_is_that_of_the_structures_voxels() -> None:
    assert accepted_share(ROW) == pytest.approx(0.55)
    assert accepted_share({"loss/supervised": 1.0}) is None
    assert accepted_share({"accepted/a": 0.0, "called/a": 0.0}) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(40, "40 s"), (725, "12 min"), (3900, "1 h 05 min"), (3599, "1 h 00 min"), (math.nan, "unknown time")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_block_at_the_start_names_what_is_not_the_default() -> None:
    known = {
        "dataset": "Dataset501_LeftAtrium",
        "configuration": "3d_fullres",
        "fold": 0,
        "trainer": "nnUNetTrainerSemi",
        "cases": {"labeled": 4, "unlabeled": 56, "validation": 20},
        "classes": ["atrium"],
        "network": "PlainConvUNet",
        "patch_size": [80, 112, 112],
        "batch_size": 2,
        "num_epochs": 100,
        "device": "cpu (x86_64, 1 thread)",
        "precision": "float32",
        "changed": ["num_epochs", "Semi.threshold"],
        "config": {"": {"num_epochs": 100}, "Semi": {"threshold": 0.9}},
    }
    block = start_block(known)
    assert "4 labeled, 56 unlabeled, 20 validation; structures: atrium" in block
    assert "patch 80 x 112 x 112, batch 2, 100 epochs" in block
    assert "not the default: num_epochs 100, Semi.threshold 0.9" in block
    assert "not the default: nothing" in start_block({**known, "changed": []})
    assert "memory" not in block
    assert "  memory: 3.21 GiB of tensors predicted\n" in start_block(
        {**known, "predicted_memory": "3.21 GiB of tensors predicted"}
    )


def test_the_first_steps_say_once_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter([100.0, *(200.0 + 2 * i for i in range(20))])  # the second step is slow, too
    monkeypatch.setattr(time, "perf_counter", lambda: next(ends))
    first = FirstSteps(steps=250, epochs=1000, memory=lambda: 3 * 2**29)
    lines = [line for _ in range(15) if (line := first.after_step())]
    assert lines == [
        "By the first steps: 8 min per epoch, 138 h 53 min to the end, validation on top; "
        "memory so far 1.50 GiB"
    ]


def test_an_epoch_as_short_as_the_first_steps_tells_it_by_itself() -> None:
    first = FirstSteps(steps=10, epochs=2, memory=lambda: 0)
    assert [first.after_step() for _ in range(20)] == [None] * 20
