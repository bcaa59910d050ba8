"""Every trainer's step on CUDA, as far as it can be known without a GPU: devices, dtypes, and what makes the
host wait. See docs/explanation/cuda.md."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from nnssl.batch import SemiBatch
from nnssl.commands.trainers import list_trainers, trainers_folder
from nnssl.method import SemiMethod, full_resolution
from nnssl.methods.filtermatch import FilterMatch
from nnssl.methods.mean_teacher import MeanTeacher, MeanTeacherConfig
from nnssl.training.optimizer_step import OptimizationStep
from tests.building import Task
from tests.fake_cuda import CUDA, FakeCuda, half_precision
from tests.test_method_contract import ROWS, TASKS

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# progress at which a method does something of its own; elsewhere one moment stands for all
MOMENTS = {"ACTION": (0.0, 0.3, 0.5), "BCP": (0.0, 0.5), "FilterMatch": (0.0, 0.5)}
# settings that take another way through a method
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "side by side": ("Semi", {"paste_share": 0.0}),
    "pasted": ("Semi", {"paste_share": 1.0, "deep_supervision": False}),
    "two passes": ("Semi", {"mirrored_pass": True}),
    "restyled": ("Semi", {"histogram_matching": 1.0}),
    "unmoved": ("Semi", {"turns": False, "mirrorings": False}),
    "rows": ("CAML", {"correlation": "rows"}),
    "from an estimate": ("DiffCL", {"sampling_start": 0.5, "weight_contrast": 0.0}),
    "averaged teacher": ("FixMatch", {"ema_decay": 0.99}),
    "all ways": ("FilterMatch", {"pretrain_fraction": 0.0, "mirror_from": 0.0}),
}

TRIED = TASKS | {"2d_ignore_label": Task(dim=2, channels=3, ignore=True)}
EVERY_DAY = [
    ("3d", "float16"),
    ("2d_ignore_label", "bfloat16"),
    ("regions_with_ignore", "float16"),
]
AT_NIGHT = [(task, dtype) for task in TRIED for dtype in HALF if (task, dtype) not in EVERY_DAY]


@functools.lru_cache(maxsize=4)  # moments and dtypes share a build
def on_cuda(
    name: str, task: str, settings: tuple[tuple[str, Any], ...] = ()
) -> tuple[FakeCuda, SemiMethod, Any]:
    row = ROWS[name]
    method = TRIED[task].method(row.method, dataclasses.replace(row.config, **dict(settings)))
    cuda = FakeCuda()
    cuda.module(method)
    return cuda, method, cuda.batch(TRIED[task].batch())


def step(cuda: FakeCuda, method: SemiMethod, batch: Any, t: float, dtype: torch.dtype) -> list[str]:
    """Forward pass and update of one step; what the host waited for."""
    if isinstance(method, FilterMatch):
        method._outside = set()  # what was read after the last choice; the stand-in for values knows no names
        method._last_step = None  # else the time between the moments of a test would be one of choice
    with cuda:
        method.before_step(t)
        with half_precision(dtype):
            terms = method(batch, t)
        method.after_step(batch, t)
    assert terms.keys() == method.weights(t).keys()
    assert cuda.halves == []
    for key, term in (terms | method.diagnostics).items():
        assert term.device == CUDA and term.ndim == 0, key
        assert term.dtype == torch.float32, key
    for name, tensor in (*method.named_parameters(), *method.named_buffers()):
        assert tensor.device == CUDA, name
    return list(cuda.waits)


@pytest.mark.parametrize(
    ("task", "dtype"),
    [*EVERY_DAY, *(pytest.param(*pair, marks=pytest.mark.nightly) for pair in AT_NIGHT)],
)
@pytest.mark.parametrize("name", ROWS)
def test_a_step_stays_on_the_device(name: str, task: str, dtype: str) -> None:
    for t in MOMENTS.get(name, (0.5,)):
        waits = step(*on_cuda(name, task), t, HALF[dtype])
        assert waits == [], t


@pytest.mark.parametrize("setting", SETTINGS)
def test_other_settings_stay_on_the_device(setting: str) -> None:
    name, changes = SETTINGS[setting]
    assert step(*on_cuda(name, "3d", tuple(changes.items())), 0.5, torch.float16) == []


def test_filtermatch_waits_where_scans_leave_the_pool() -> None:
    cuda, method, _ = on_cuda("FilterMatch", "2d")
    assert isinstance(method, FilterMatch)
    method._outside = None  # as in a continued run
    with cuda:
        method.shrink_pool()
        method.outside()
    assert cuda.waits == ["tolist", "tolist"]


def test_every_trainer_has_a_row() -> None:
    methods = {row.method.__name__ for row in ROWS.values()}
    trainers = {name.removeprefix("nnUNetTrainer") for name in list_trainers(trainers_folder())}
    assert trainers == methods


# what would be found


class Faulty(MeanTeacher):
    """Does something wrong with the student's logits, which are of half precision, and a float32 buffer."""

    fault: Callable[[Tensor, Tensor], Any]

    def build(self) -> None:
        super().build()
        self.register_buffer("kept", torch.zeros(4, 4))

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        with torch.no_grad():
            logits = full_resolution(self.student(batch.labeled))
        type(self).fault(logits.flatten()[:16].view(4, 4), self.get_buffer("kept"))
        return super().terms(batch, t)


def full_precision_product(half: Tensor, kept: Tensor) -> Tensor:
    with torch.autocast("cuda", enabled=False):
        return half @ kept


def test_the_optimizer_step_waits_once_also_where_a_network_has_no_gradient() -> None:
    cuda, (active, resting) = FakeCuda(), (torch.nn.Linear(3, 2), torch.nn.Linear(3, 2))
    for module in (active, resting):
        cuda.module(module)
    for p in active.parameters():
        p.grad = cuda.tensor(p.detach())
    networks = [list(module.parameters()) for module in (active, resting)]
    optimizer = torch.optim.SGD([p for network in networks for p in network], 0.1, momentum=0.9, foreach=True)
    taken = OptimizationStep(optimizer, None, "bfloat16", CUDA, 3, networks)
    loss = cuda.tensor(torch.zeros(()))
    with cuda, mock.patch.object(Tensor, "backward"):
        assert taken.take(loss, [loss])
    assert cuda.waits == ["tolist"]


ROW = torch.tensor([0, 1, 2, 3])
MIXED: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "a tensor made on the CPU": (lambda half, kept: kept + torch.ones(4), "device"),
    "a mask made on the CPU": (lambda half, kept: torch.where(torch.ones(4) > 0, kept, half), "device"),
    "a buffer left on the CPU": (lambda half, kept: F.linear(kept, torch.ones(4, 4)), "device"),
    "a number made on the CPU in a stack": (
        lambda half, kept: torch.stack([kept.sum(), torch.zeros(())]),
        "device",
    ),
    "a product of two dtypes": (full_precision_product, "dtype"),
    "rows of half precision into a bank": (
        lambda half, kept: kept.index_copy_(0, ROW.to(CUDA), half),
        "dtype",
    ),
    "scattered half precision": (lambda half, kept: kept.scatter_(0, ROW.to(CUDA)[None], half), "dtype"),
    "an average of two dtypes": (lambda half, kept: kept.lerp_(half, 0.5), "dtype"),
    "written by index": (lambda half, kept: kept.__setitem__(ROW.to(CUDA), half), "dtype"),
}
WAITING: dict[str, tuple[Callable[[Tensor, Tensor], Any], list[str]]] = {
    "item": (lambda half, kept: half.sum().item(), ["item"]),
    "float": (lambda half, kept: float(half.sum()), ["item"]),
    "bool": (lambda half, kept: bool(kept.any()), ["item"]),
    "if": (lambda half, kept: 1 if kept.sum() > 0 else 0, ["item"]),
    "tolist": (lambda half, kept: kept.tolist(), ["tolist"]),
    "cpu": (lambda half, kept: kept.cpu(), ["cpu"]),
    "numpy": (lambda half, kept: kept.cpu().numpy(), ["cpu"]),
    "to": (lambda half, kept: kept.to("cpu"), ["cpu"]),
    "a new tensor": (lambda half, kept: torch.tensor([1.0, 2.0], device=kept.device), ["to cuda"]),
    "a moved tensor": (lambda half, kept: torch.ones(3).to(kept.device), ["to cuda"]),
    "a copied tensor": (lambda half, kept: kept.copy_(torch.ones(4, 4)), ["to cuda"]),
    "a list as an index": (lambda half, kept: kept[[0, 2]], ["to cuda"]),
}
RAISING: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "a boolean index": (lambda half, kept: kept[kept > 0], "index"),
    "nonzero": (lambda half, kept: kept.nonzero(), "nonzero"),
    "masked_select": (lambda half, kept: kept.masked_select(kept > 0), "masked_select"),
    "equal": (lambda half, kept: torch.equal(kept, kept), "equal"),
}


def faulty_step(fault: Callable[[Tensor, Tensor], Any]) -> tuple[FakeCuda, Callable[[], list[str]]]:
    task = TASKS["2d"]
    planted: type[SemiMethod] = type("Planted", (Faulty,), {"fault": staticmethod(fault)})
    method = task.method(planted, MeanTeacherConfig())
    cuda = FakeCuda()
    cuda.module(method)
    return cuda, lambda: step(cuda, method, cuda.batch(task.batch()), 0.5, torch.float16)


def test_the_step_to_plant_faults_in_is_sound() -> None:
    moved = torch.tensor([1.0])
    assert faulty_step(lambda half, kept: moved.to(kept.device, non_blocking=True) + kept + half)[1]() == []


@pytest.mark.parametrize("name", MIXED)
def test_mixed_devices_and_dtypes_are_found(name: str) -> None:
    fault, what = MIXED[name]
    with pytest.raises(Exception, match=what):
        faulty_step(fault)[1]()


def test_half_precision_outside_of_networks_is_found() -> None:
    cuda, run = faulty_step(lambda half, kept: half * half)
    with pytest.raises(AssertionError):
        run()
    assert [place.partition(" in ")[0] for place in cuda.halves] == ["mul"]


@pytest.mark.parametrize("name", WAITING)
def test_waiting_is_found(name: str) -> None:
    fault, waits = WAITING[name]
    assert faulty_step(fault)[1]() == waits


@pytest.mark.parametrize("name", RAISING)
def test_shapes_that_depend_on_values_are_found(name: str) -> None:
    fault, wait = RAISING[name]
    cuda, run = faulty_step(fault)
    with pytest.raises((DynamicOutputShapeException, DataDependentOutputException)):
        run()
    assert cuda.waits == [wait]
