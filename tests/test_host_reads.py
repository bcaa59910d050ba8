"""Where a training reads values of tensors on the host: in a whole step of every trainer, and anywhere in the
code that works with tensors of the device. docs/explanation/cuda.md lists both."""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import nnssl
from benchmarks.speed.cost import SMALL_3D, plan
from nnssl.commands.trainers import list_trainers, trainers_folder
from nnssl.training import cost
from nnssl.training.cost import Ledger, Rehearsal, _readable

PAGE = Path(__file__).parent.parent / "docs" / "explanation" / "cuda.md"
PACKAGE = Path(nnssl.__file__).parent
TINY = SMALL_3D | {"patch": [8, 16, 16], "features": [4, 6, 6], "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]}
SMALL_BANKS = {"DiffCL": {"hfm_max_tokens": 512}}
# numbers drawn on the CPU, whatever the device: test_cuda.py would find others
DRAWN_ON_THE_HOST = (
    "semi.draw",
    "semi.random_mirroring",
    "orientations.random_orientation",
    "filtermatch.orientation",
)
EVERY_DAY = ("FilterMatch", "MeanTeacher", "Semi")


def place() -> str:
    """The function of the package that is at work."""
    frame: Any = sys._getframe(1)
    while not frame.f_code.co_filename.startswith(str(PACKAGE)) or frame.f_code.co_filename == cost.__file__:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"


class Reads(Ledger):
    """Where fake tensors are read; they have no values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.found.append(place())
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextlib.contextmanager
def counted() -> Iterator[Reads]:
    reads = Reads()
    with FakeTensorMode(), reads, _readable():
        whole = FakeTensor.tolist

        def tolist(x: FakeTensor) -> Any:
            reads.found.append(place())
            return whole(x)

        with mock.patch.object(FakeTensor, "tolist", tolist):
            yield reads


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.nightly)
        for name in sorted(t.removeprefix("nnUNetTrainer") for t in list_trainers(trainers_folder()))
    ],
)
def test_a_whole_step_reads_once(name: str) -> None:
    """Forward, backward, update, and all that is logged."""
    trainer = getattr(importlib.import_module(f"nnssl_trainers.nnUNetTrainer{name}"), f"nnUNetTrainer{name}")
    with counted() as reads:
        rehearsal = Rehearsal(trainer, *plan(TINY, **SMALL_BANKS), "cpu")
        for t in (0.0, 0.3, 0.6):
            rehearsal.step(t)  # the first one of a phase may look at more
            reads.found.clear()
            rehearsal.step(t)
            assert [x for x in reads.found if x not in DRAWN_ON_THE_HOST] == ["optimizer_step.read"], t
            assert len(rehearsal.trainer.step.values) > 1


READING = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "synchronize", "get_scale"}
# without tensors of the device; and what is rehearsed or tried before a training
ELSEWHERE = ("data", "commands", "demo", "report", "files.py", "orientations.py", "training/cost.py")


def readers() -> dict[str, str]:
    """{class and function, or function: file} of all code that may read values of a training's tensors."""
    found: dict[str, str] = {}

    def search(node: ast.AST, name: str, file: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                search(child, f"{name}.{child.name}".lstrip("."), file)
                continue
            if isinstance(child, ast.Call):
                called = child.func
                if (isinstance(called, ast.Attribute) and called.attr in READING) or (
                    isinstance(called, ast.Name) and called.id == "read"
                ):
                    found[name] = file
            search(child, name, file)

    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        if not file.startswith(ELSEWHERE):
            search(ast.parse(path.read_text(encoding="utf-8")), "", file)
    return found


def test_the_page_names_all_code_that_reads() -> None:
    found = readers()
    assert found["OptimizationStep.take"] == "training/optimizer_step.py"
    page = PAGE.read_text(encoding="utf-8")
    section = page[page.index("## When the host waits") : page.index("## Half precision")]
    named = {x for row in section.splitlines() if row.startswith("| `") for x in named_in(row)}
    assert named == set(found)


def named_in(row: str) -> list[str]:
    """Functions in the first cell of a row."""
    return re.findall(r"`([^`]+)`", row.split("|")[1])
