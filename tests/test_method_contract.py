"""What every method must do: one row per method, the same battery for all."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from nnssl.method import SemiMethod, full_resolution, inference
from nnssl.methods import known_methods
from nnssl.methods.action import ACTION, ACTIONConfig
from nnssl.methods.bcp import BCP, BCPConfig
from nnssl.methods.caml import CAML, CAMLConfig
from nnssl.methods.cps import CPS, CPSConfig
from nnssl.methods.diffcl import DiffCL, DiffCLConfig
from nnssl.methods.filtermatch import FilterMatch, FilterMatchConfig
from nnssl.methods.fixmatch import FixMatch, FixMatchConfig
from nnssl.methods.mcnet import MCNet, MCNetConfig
from nnssl.methods.mean_teacher import MeanTeacher, MeanTeacherConfig
from nnssl.methods.semi import Semi, SemiConfig
from nnssl.methods.semsim import SemSim, SemSimConfig
from nnssl.methods.supervised import Supervised, SupervisedConfig
from nnssl.methods.uamt import UAMT, UAMTConfig
from nnssl.training.memory_format import use_channels_last
from tests.building import Task, with_unlabeled


@dataclass(frozen=True)
class Row:
    """A method, a small configuration, and the facts that the battery checks.

    reaches    term -> the method's children that must get gradient from it, all others must not
    weights    t -> lambda_k(t), closed form
    warm_up    steps before all terms are alive (banks fill)
    frozen     submodules without gradient
    times      term -> t at which it acts, where that is not 0.5
    """

    method: type[SemiMethod]
    config: Any
    reaches: dict[str, set[str]]
    weights: Callable[[float], dict[str, float]]
    warm_up: int = 0
    frozen: set[str] = field(default_factory=set)
    times: dict[str, float] = field(default_factory=dict)


def _ramp(t: float, end: float = 0.4) -> float:
    return math.exp(-5 * (1 - min(t / end, 1)) ** 2)


def _diffcl_weights(t: float) -> dict[str, float]:
    mu = 0.5 * _ramp(t)
    return {"supervised": 1, "pseudo": mu, "contrast": mu, "diffusion": 1, "diffusion_pseudo": mu}


def _action_weights(t: float) -> dict[str, float]:
    if t < 0.25:
        return {"supervised": 0, "global": 1, "local": 0, "pseudo": 0, "anatomical": 0}
    if t < 0.5:
        return {"supervised": 1, "global": 1, "local": 1, "pseudo": 0, "anatomical": 0}
    return {"supervised": 1, "global": 0, "local": 0, "pseudo": 1, "anatomical": 1}


ROWS = {
    "SemSim": Row(
        SemSim,
        SemSimConfig(threshold=0.0, width=16, max_tokens=256),  # untrained networks are certain of nothing
        {
            "supervised": {"student"},
            "pseudo": {"student"},
            "intra": {"student", "fusion"},
            "cross": {"student", "fusion"},
        },
        lambda t: {
            "supervised": 1.0,
            "pseudo": 0.5 * _ramp(t),
            "intra": 0.25 * _ramp(t),
            "cross": 0.25 * _ramp(t),
        },
    ),
    "Supervised": Row(
        Supervised, SupervisedConfig(), {"supervised": {"student"}}, lambda t: {"supervised": 1.0}
    ),
    "DiffCL": Row(
        DiffCL,
        DiffCLConfig(
            threshold=0.0,  # untrained networks are certain of nothing
            ddim_steps=2,
            hfm_max_tokens=512,
            embedding=8,
            bank_size=64,
            bank_per_step=16,
            num_positives=16,
            num_negatives=32,
        ),
        {
            "supervised": {"student"},
            "pseudo": {"student"},
            "contrast": {"student", "projector"},
            "diffusion": {"denoiser"},
            "diffusion_pseudo": {"denoiser"},
        },
        _diffcl_weights,
        warm_up=1,
    ),
    "FixMatch": Row(
        FixMatch,
        FixMatchConfig(threshold=0.0),
        {"supervised": {"student"}, "pseudo": {"student"}},
        lambda t: {"supervised": 1.0, "pseudo": 0.5 * _ramp(t)},
        frozen={"teacher"},
    ),
    "CPS": Row(
        CPS,
        CPSConfig(),
        {
            "supervised": {"student"},
            "supervised_second": {"second"},
            "pseudo": {"student"},
            "pseudo_second": {"second"},
        },
        lambda t: {
            "supervised": 1.0,
            "supervised_second": 1.0,
            "pseudo": 0.5 * _ramp(t),
            "pseudo_second": 0.5 * _ramp(t),
        },
    ),
    "CAML": Row(
        CAML,
        CAMLConfig(embedding=8, rows=16, queries=64),
        {
            "supervised": {"student"},
            "supervised_aux": {"auxiliary", "attention"},
            "consistency": {"student", "auxiliary", "attention"},
            "dice": {"student", "auxiliary", "attention"},
            "correlation": {"student", "auxiliary", "attention", "head_v", "head_a"},
        },
        lambda t: {
            "supervised": 1.0,
            "supervised_aux": 1.0,
            "consistency": 2 * _ramp(t),
            "dice": 0.5 * _ramp(t),
            "correlation": 0.1 * _ramp(t),
        },
        warm_up=2,
    ),
    "MeanTeacher": Row(
        MeanTeacher,
        MeanTeacherConfig(),
        {"supervised": {"student"}, "consistency": {"student"}},
        lambda t: {"supervised": 1.0, "consistency": 0.1 * _ramp(t)},
        frozen={"teacher"},
    ),
    "ACTION": Row(
        ACTION,
        ACTIONConfig(
            threshold_pseudo=0.0,
            threshold_contrast=0.0,
            embedding=8,
            num_queries=16,
            num_negatives=32,
            candidates=64,
        ),
        {
            "supervised": {"student"},
            "global": {"student", "distillation_global"},
            "local": {"student", "distillation_local"},
            "pseudo": {"student"},
            "anatomical": {"student", "representation"},
        },
        _action_weights,
        warm_up=2,  # rows of a query's own case do not count, and one row is no distribution
        frozen={"teacher", "distillation_global.teacher", "distillation_local.teacher"},
        times={"global": 0.1, "local": 0.3},
    ),
    "BCP": Row(
        BCP,
        BCPConfig(),
        {"supervised": {"student"}, "pseudo": {"student"}},
        lambda t: {"supervised": 1.0, "pseudo": 0.5 * (t >= 2 / 17)},
        frozen={"teacher"},
    ),
    "UAMT": Row(
        UAMT,
        UAMTConfig(threshold=1.0),  # untrained networks are certain of nothing
        {"supervised": {"student"}, "consistency": {"student"}},
        lambda t: {"supervised": 1.0, "consistency": 0.1 * _ramp(t, 1.0)},
        frozen={"teacher"},
    ),
    "MCNet": Row(
        MCNet,
        MCNetConfig(),
        {
            "supervised": {"student"},
            "supervised_second": {"student", "second"},
            "consistency": {"student", "second"},
        },
        lambda t: {"supervised": 1.0, "supervised_second": 1.0, "consistency": 2.0 * _ramp(t)},
    ),
    "FilterMatch": Row(FilterMatch, FilterMatchConfig(), {"joint": {"student"}}, lambda t: {"joint": 1.0}),
    "Semi": Row(
        Semi,
        SemiConfig(
            mirrored_pass=True,
            paste_share=0.5,
            histogram_matching=0.5,
            threshold=0.9,
            adaptive_thresholds=True,
            channel_dropout=0.5,
        ),  # every ingredient
        {"supervised": {"student"}, "pseudo": {"student"}},
        lambda t: {"supervised": 1.0, "pseudo": _ramp(t)},
        frozen={"teacher"},
    ),
}

TASKS = {
    "3d": Task(),
    "2d": Task(dim=2),
    "four_classes": Task(channels=5),
    "two_modalities": Task(images=2),
    "residual_encoder": Task(residual=True),
    "no_deep_supervision": Task(deep_supervision=False),
    "regions": Task(channels=2, regions=True),
    "ignore_label": Task(channels=3, ignore=True),
    "regions_with_ignore": Task(channels=2, regions=True, ignore=True),
    "cascade": Task(channels=3, images=3, previous=2),
}

rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
tasks = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())


def started(row: Row, task: Task, steps: int | None = None, t: float = 0.5) -> SemiMethod:
    """A method after its warm-up steps."""
    method = task.method(row.method, row.config)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 1e-2)
    for i in range(row.warm_up if steps is None else steps):
        step(method, optimizer, task, i, t)
    return method


def step(
    method: SemiMethod, optimizer: torch.optim.Optimizer, task: Task, i: int, t: float = 0.5
) -> dict[str, float]:
    batch = task.batch(seed=i)
    method.before_step(t)
    terms, weights = method(batch, t), method.weights(t)
    optimizer.zero_grad()
    sum(weights[k] * v for k, v in terms.items()).backward()
    optimizer.step()
    method.after_step(batch, t)
    return {k: v.item() for k, v in terms.items()}


def test_every_method_has_a_row() -> None:
    assert set(ROWS) == known_methods()


@rows
@tasks
def test_terms_are_finite_scalars_with_the_keys_of_the_weights(row: Row, task: Task) -> None:
    method = started(row, task)
    terms = method(task.batch(), 0.5)
    assert terms.keys() == method.weights(0.5).keys() == row.reaches.keys()
    assert terms.keys() | method.diagnostics.keys() == method.meaning.keys()
    assert all(sentence.endswith(".") for sentence in method.meaning.values())
    if method.acceptance is not None:
        taught, called = method.acceptance
        assert called.shape == (method.labels.num_classes,) and bool((taught <= called).all())
        assert row.method.needs_unlabeled and float(called.sum()) >= 1 - 1e-5
    for name, value in terms.items():
        assert value.ndim == 0 and torch.isfinite(value), name


@rows
@tasks
def test_every_term_is_alive_and_reaches_exactly_its_networks(row: Row, task: Task) -> None:
    methods = {t: started(row, task, t=t) for t in {row.times.get(name, 0.5) for name in row.reaches}}
    for name in row.reaches:
        t = row.times.get(name, 0.5)
        method = methods[t]
        method.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        term = method(task.batch(), t)[name]
        assert term.item() != 0, f"{name} is zero"
        term.backward()
        reached = {
            child
            for child, module in method.named_children()
            if any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
        }
        assert reached == row.reaches[name], name


@rows
@pytest.mark.parametrize("t", [0.1, 0.3, 0.9])
def test_the_previous_stage_reaches_every_network_as_zeros_and_ones(row: Row, t: float) -> None:
    """No noise, blur or average on the last channels of a cascade's input, whatever a method mixes."""
    task = TASKS["cascade"]
    method, seen = task.method(row.method, row.config), []
    networks: list[Any] = [m for m in method.modules() if hasattr(m, "encoder") and hasattr(m, "decoder")]
    for network in networks:
        first = next(m for m in network.encoder.modules() if isinstance(m, torch.nn.Conv3d))
        first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    method.before_step(t)
    method(task.batch(), t)
    assert seen
    for x in seen:
        image, previous = x[:, :1], x[:, 1:3]
        assert set(previous.unique().tolist()) == {0.0, 1.0} and image.unique().numel() > 2


@rows
def test_weights_follow_their_closed_form(row: Row) -> None:
    method = TASKS["2d"].method(row.method, row.config)
    for t in (0.0, 0.25, 0.5, 1.0):
        assert method.weights(t) == pytest.approx(row.weights(t))


@rows
def test_same_seed_gives_the_same_losses(row: Row) -> None:
    def run() -> list[dict[str, float]]:
        task = TASKS["3d"]
        method = task.method(row.method, row.config, seed=5)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 1e-2)
        return [step(method, optimizer, task, i) for i in range(3)]

    assert run() == run()


@rows
def test_a_restored_state_gives_the_next_loss_bit_for_bit(row: Row) -> None:
    task = TASKS["3d"]
    method = started(row, task, steps=2)
    other = task.method(row.method, row.config, seed=99)
    other.load_state_dict(method.state_dict())
    values = []
    for m in (method, other):
        torch.manual_seed(7)
        values.append({k: v.item() for k, v in m(task.batch(seed=8), 0.5).items()})
    assert values[0] == values[1]


@rows
def test_frozen_networks_have_no_gradient_and_keep_their_weights_in_the_step(row: Row) -> None:
    method = started(row, TASKS["3d"])
    for name in row.frozen:
        network = method.get_submodule(name)
        assert not any(p.requires_grad for p in network.parameters())
    before = {n: [p.clone() for p in method.get_submodule(n).parameters()] for n in row.frozen}
    sum(method(TASKS["3d"].batch(), 0.5).values()).backward()
    for name, old in before.items():
        assert all(
            torch.equal(a, b) for a, b in zip(old, method.get_submodule(name).parameters(), strict=True)
        )


@rows
def test_terms_change_nothing_that_is_saved(row: Row) -> None:
    task = TASKS["2d"]
    method = started(row, task, t=0.1)
    state = copy.deepcopy(method.state_dict())
    for t in (0.1, 0.3, 0.6):
        losses = []
        for _ in range(2):
            torch.manual_seed(3)
            losses.append({k: v.item() for k, v in method(task.batch(), t).items()})
        assert losses[0] == losses[1]
    after = method.state_dict()
    assert after.keys() == state.keys()
    for name, value in state.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name


@rows
def test_networks_keep_their_modes_through_a_step(row: Row) -> None:
    method = started(row, TASKS["3d"])
    method(TASKS["3d"].batch(), 0.5)
    assert all(m.training for m in method.modules())


@rows
def test_bfloat16_autocast_stays_near_float32(row: Row) -> None:
    task = TASKS["3d"]
    values = []
    for bf16 in (False, True):
        method = started(row, task)
        torch.manual_seed(11)
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
            terms = method(task.batch(), 0.5)
        sum(terms.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)
        values.append({k: v.item() for k, v in terms.items()})
    assert values[1] == pytest.approx(values[0], rel=0.15, abs=0.05)


@rows
@pytest.mark.parametrize(
    "task", [TASKS["3d"], TASKS["2d"], TASKS["residual_encoder"]], ids=["3d", "2d", "residual_encoder"]
)
def test_channels_last_changes_rounding_only(row: Row, task: Task) -> None:
    found = []
    for last in (False, True):
        method = started(row, task)
        if last:
            use_channels_last(method, task.dim)
        torch.manual_seed(11)
        terms = method(task.batch(), 0.5)
        sum(terms.values()).backward()
        gradients = {k: p.grad for k, p in method.named_parameters() if p.grad is not None}
        found.append(({k: v.item() for k, v in terms.items()}, gradients))
    (terms, gradients), (other_terms, other_gradients) = found
    assert other_terms == pytest.approx(terms, rel=1e-4, abs=1e-6)
    assert other_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (other_gradients[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5, name


@rows
def test_a_batch_without_foreground_gives_finite_losses_and_gradients(row: Row) -> None:
    task = TASKS["four_classes"]
    method = task.method(row.method, row.config)
    batch = task.batch()
    empty = replace(batch, target=[torch.zeros_like(t) for t in batch.target])
    terms = method(empty, 0.5)
    sum(terms.values()).backward()
    assert all(torch.isfinite(v) for v in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


@rows
def test_large_logits_stay_finite(row: Row) -> None:
    task = TASKS["3d"]
    method = started(row, task)
    with torch.no_grad():
        for layer in method.student.decoder.seg_layers:
            layer.weight *= 1e3
    terms = method(task.batch(), 0.5)
    assert all(torch.isfinite(v) for v in terms.values()), terms


@rows
@pytest.mark.parametrize("unlabeled", [1, 3])
def test_the_unlabeled_batch_may_have_another_size(row: Row, unlabeled: int) -> None:
    task = TASKS["3d"]
    batch = task.batch(unlabeled=2)
    views = tuple(torch.cat([s, s])[:unlabeled] for s in batch.strong)
    method = started(row, task)
    terms = method(
        with_unlabeled(batch, weak=torch.cat([batch.weak, batch.weak])[:unlabeled], strong=views), 0.5
    )
    assert all(torch.isfinite(v) for v in terms.values())


@rows
def test_the_deployed_network_predicts_any_tile_size(row: Row) -> None:
    task = Task(deep_supervision=False)
    method = task.method(row.method, row.config)
    with inference(method.student):
        assert full_resolution(method.student(torch.randn(1, 1, 12, 20, 8))).shape == (1, 2, 12, 20, 8)


@rows
def test_deploying_what_does_not_exist_is_refused(row: Row) -> None:
    method = TASKS["2d"].method(row.method, row.config)
    assert method.deployed("student") is method.student
    if row.method is Supervised:  # the baseline of whatever the plan deploys
        assert method.deployed("teacher") is method.student
    elif "teacher" not in dict(method.named_children()):
        with pytest.raises(ValueError, match=row.method.name):
            method.deployed("teacher")
