"""Two processes (gloo, CPU), one sample of each stream per process: the method wrapped as a whole in
DistributedDataParallel, as the trainer wraps it, gives what one process with the whole batch gives."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import nnssl.distributed
from nnssl import banks
from nnssl.banks import CaseBank, ClassBank, EmbeddingBank
from nnssl.batch import SemiBatch, UnlabeledBatch
from nnssl.data.mixing import both_ways, classmix_mask, cutmix
from nnssl.diffusion.gaussian import GaussianDiffusion
from nnssl.distributed import Gatherer, divisor, from_previous, sum_over_ranks
from nnssl.method import SemiMethod, weighted_sum
from nnssl.methods import action, bcp, caml, cps, diffcl, fixmatch, semi, semsim
from nnssl.methods.filtermatch import FilterMatch
from nnssl.orientations import Orientation
from nnssl.sampling import top_members
from nnssl.training.checkpoint import load_method, method_state
from tests.building import Task, gradient
from tests.test_method_contract import ROWS

pytestmark = pytest.mark.slow

RANKS = 2
ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {  # of Semi
    "channel_dropout": 0.0,
    "turns": False,
    "mirrorings": False,
    "histogram_matching": 0.0,
}
# every trainer without randomness that depends on how the batch is divided
CONFIG: dict[str, dict[str, Any]] = {
    "SemSim": {"channel_dropout": 0.0},
    "DiffCL": {"channel_dropout": 0.0, "denoiser_share": 1.0},
    "CAML": {"channel_dropout": 0.0, "query_share": 1.0, "queries": 10**6},
    # a threshold that samples pass to different shares
    "ACTION": {"classmix_probability": 1.0, "channel_dropout": 0.0, "threshold_pseudo": 0.55},
    "UAMT": {"noise": 0.0, "dropout": 0.0},
    "Semi": {**PLAIN, "paste_share": 0.0},
    "Semi, pasting": {**PLAIN, "paste_share": 1.0},
}
CASES = {**ROWS, "Semi, pasting": ROWS["Semi"]}
TIMES = {"BCP": (0.0, 0.5), "ACTION": (0.1, 0.3, 0.6)}
# terms that compare voxels with others of their own rank (docs/explanation/several-gpus.md)
OF_THE_RANK = {"DiffCL": {"contrast"}, "ACTION": {"anatomical"}}
# trainers whose checkpoints hold banks or running means, and t at which these change
MOVED = {"DiffCL": 0.5, "CAML": 0.5, "ACTION": 0.3, "Semi": 0.5, "FilterMatch": 0.5}
STEPS = {"ACTION": 3}  # else 2: in the second one banks and averages count


def part(batch: SemiBatch, rank: int | None) -> SemiBatch:
    """One sample of each stream, or with None the whole batch."""
    if rank is None:
        return batch
    mine = slice(rank, rank + 1)
    assert isinstance(batch.target, list) and batch.unlabeled is not None
    return SemiBatch(
        batch.labeled[mine],
        [y[mine] for y in batch.target],
        batch.labeled_cases[mine],
        UnlabeledBatch(batch.weak[mine], tuple(s[mine] for s in batch.strong), batch.unlabeled.cases[mine]),
    )


def box(n: int, size: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
    mask = torch.zeros(n, 1, *size, dtype=torch.bool)
    mask[..., : size[-1] // 2] = True
    return mask


def first_classes(member: Tensor) -> Tensor:
    """ClassMix of the first half of the neighbour's classes."""
    with mock.patch.object(torch, "rand", lambda shape, **kw: torch.linspace(0, 1, shape[1]).expand(shape)):
        return classmix_mask(member)


def first_members(member: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """In the place of `sample_members`."""
    return top_members(torch.linspace(1, 0, member.shape[1]).expand(member.shape), member, n)


@contextlib.contextmanager
def nothing_drawn() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in (bcp, caml, cps, diffcl, fixmatch, semi, semsim):
            stack.enter_context(mock.patch.object(module, "cutmix_mask", box))
        stack.enter_context(mock.patch.object(action, "classmix_mask", first_classes))
        for module in (banks, caml):
            stack.enter_context(mock.patch.object(module, "sample_members", first_members))
        turn = Orientation(((2, -2, -1),), ())
        stack.enter_context(mock.patch.object(FilterMatch, "orientation", lambda *args: turn))
        stack.enter_context(mock.patch.object(torch, "randn_like", torch.zeros_like))
        steps = mock.patch.object(
            GaussianDiffusion, "draw_steps", lambda self, n, *args: torch.full((n,), self.steps // 2)
        )
        stack.enter_context(steps)
        yield


class Counted:
    """torch.distributed as nnssl.distributed sees it; counts what it is asked to exchange."""

    calls = 0

    def __getattr__(self, name: str) -> Any:
        Counted.calls += name in ("all_reduce", "all_gather", "batch_isend_irecv")
        return getattr(dist, name)


def train(
    name: str, rank: int | None, start: Any = None, schedule: Sequence[tuple[float, int]] = ()
) -> dict[str, Any]:
    """Terms of all steps, first gradients, and what is saved, of one rank or, with None, of one process.

    start: what another training saved; schedule: (t, seed of the batch) of every step
    """
    row, task = CASES[name], Task()
    config = dataclasses.replace(row.config, **CONFIG.get(name, {}))
    method: SemiMethod = task.method(row.method, config, seed=0 if rank is None else rank)
    if name == "CAML":  # CMA, now the identity, would look across the samples of a rank
        method.get_submodule("attention.samples").requires_grad_(False)
    if rank is not None:  # ranks start apart: DDP brings them together
        wrapped: Any = DistributedDataParallel(method, broadcast_buffers=False)
        method.make_copies()
        for name_, module in method.named_modules():
            if name_.endswith("teacher") and name_ != "teacher":  # of a head, which the test seeds apart
                module.load_state_dict(method.get_submodule(f"{name_[:-7]}projector").state_dict())
    else:
        wrapped = method
    if start is not None:
        method.student.load_state_dict(start["network"])
        assert load_method(method, method.student, start["state"]) == ([], [])
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 1e-2)
    terms_of, gradients, exchanged = [], [], {}
    for t, i in schedule or [(t, i) for t in TIMES.get(name, (0.5,)) for i in range(STEPS.get(name, 2))]:
        torch.manual_seed(i)
        batch, before = part(task.batch(seed=i), rank), Counted.calls
        method.before_step(t)
        terms, weights = wrapped(batch, t), method.weights(t)
        optimizer.zero_grad()
        kept = {k: w * (k not in OF_THE_RANK.get(name, ())) for k, w in weights.items()}
        weighted_sum(terms, kept, all_terms=True).backward()
        gradients.append({k: p.grad.clone() for k, p in method.named_parameters() if p.grad is not None})
        optimizer.step()
        method.after_step(batch, t)
        terms_of.append({k: v.item() for k, v in terms.items()})
        exchanged[t] = Counted.calls - before  # the first step exchanges numbers of rows, too
    return {
        "terms": terms_of,
        "exchanged": max(exchanged.values()),
        "network": copy.deepcopy(method.student.state_dict()),
        "gradients": gradients,
        "parameters": [p.detach() for p in method.parameters()],
        "buffers": {k: v for k, v in method.named_buffers() if k in method.state_dict()},
        "state": copy.deepcopy(method_state(method, method.student)),
    }


def functions(rank: int | None) -> dict[str, Tensor]:
    """What the functions of nnssl.distributed and the banks give for a part of one batch."""
    mine = slice(None) if rank is None else slice(rank, rank + 1)
    g = torch.Generator().manual_seed(0)
    x = torch.randn((2, 3, 4, 5), generator=g)[mine].requires_grad_()
    weight = torch.randn((3, 4, 5), generator=g)
    total = sum_over_ranks((x * weight).sum((0, 2, 3)))
    (total.square().sum() / (1 if rank is None else RANKS)).backward()  # as DDP averages
    found = {"sum": total.detach(), "gradient": gradient(x), "divisor": divisor(torch.tensor(float(len(x))))}
    gather = Gatherer()
    with torch.no_grad():
        found["moved"], found["moved mask"] = from_previous(x, x > 0)
        [pasted], [into] = both_ways([x], [10 * x])
        found["from labeled"], found["from unlabeled"] = pasted[len(x) :], into[len(x) :]
        found["mixed"] = cutmix(x, box(len(x), (4, 5)))
        found["gathered"], found["gathered mask"], found["numbers"] = gather(
            x, x > 0, torch.tensor([2**40, 7])[mine]
        )
    classes, cases, rows = ClassBank(2, 6, 3), CaseBank(2, 3, 5, 3), EmbeddingBank(5, 3)
    of_steps: list[list[int]] = [[2, 0], [1, 1], [2, 2]]
    for i in range(3):
        drawn = torch.randn((2, 2, 4, 3), generator=g)[:, mine]  # (K, B, P, E)
        valid = (torch.rand((2, 2, 4), generator=g) > 0.4)[:, mine]
        classes.push(drawn[:, :, :2].flatten(1, 2), valid[:, :, :2].flatten(1, 2))
        cases.push(of_steps[i][mine], drawn, valid)
        rows.push(drawn[0, :, 0], torch.tensor([10 + i, 20 + i])[mine])
    for name, bank in (("classes", classes), ("cases", cases), ("rows", rows)):
        found |= {f"{name}.{k}": v for k, v in bank.named_buffers()}
    return found


def _uneven(rank: int) -> dict[str, Tensor]:
    """Rank 0 has one row, rank 1 three."""
    gather, n = Gatherer(), 1 + 2 * rank
    x = torch.arange(float(n))[:, None].repeat(1, 2).add(10 * rank).requires_grad_()
    joint = gather.with_gradient(x)
    (joint * torch.arange(8.0).view(4, 2)).sum().div(RANKS).backward()
    with pytest.raises(RuntimeError, match="same batch size"):
        gather(torch.zeros(n + 1, 2))
    return {"joint": joint.detach(), "gradient": gradient(x), "plain": gather(x)[0]}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=RANKS)
    torch.save({"all": functions(rank), "uneven": _uneven(rank)}, f"{folder}/functions_{rank}.pt")
    with nothing_drawn(), mock.patch.object(nnssl.distributed, "dist", Counted()):
        for name in CASES:
            torch.save(train(name, rank), f"{folder}/{name}_{rank}.pt")
        for name, t in MOVED.items():
            start = torch.load(f"{folder}/{name}_start.pt", weights_only=False)
            torch.save(train(name, rank, start, [(t, 1)]), f"{folder}/{name}_moved_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have found: <method>_<rank>.pt and functions_<rank>.pt."""
    folder = tmp_path_factory.mktemp("ranks")
    with nothing_drawn():
        for name, t in MOVED.items():
            torch.save(train(name, None, schedule=[(t, 0)]), folder / f"{name}_start.pt")
    mp.spawn(_worker, args=(str(folder),), nprocs=RANKS, join=True)
    return folder


def test_sums_rows_and_banks_are_those_of_the_whole_batch(ranks: Path) -> None:
    whole = functions(None)
    of_ranks = [torch.load(ranks / f"functions_{r}.pt")["all"] for r in range(RANKS)]
    for key, expected in whole.items():
        if key in ("gradient", "moved", "moved mask", "mixed", "from labeled", "from unlabeled"):
            torch.testing.assert_close(torch.cat([found[key] for found in of_ranks]), expected)
        else:
            for found in of_ranks:
                torch.testing.assert_close(found[key], expected if key != "divisor" else expected / RANKS)


def test_ranks_may_have_different_numbers_of_rows(ranks: Path) -> None:
    found = [torch.load(ranks / f"functions_{r}.pt")["uneven"] for r in range(RANKS)]
    expected = torch.tensor([[0.0, 0.0], [10.0, 10.0], [11.0, 11.0], [12.0, 12.0]])
    for f in found:
        assert torch.equal(f["joint"], expected) and torch.equal(f["plain"], expected)
    joint = torch.cat([f["gradient"] for f in found])
    assert torch.equal(joint, torch.arange(8.0).view(4, 2))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process_with_the_whole_batch(ranks: Path, name: str) -> None:
    with nothing_drawn():
        whole = train(name, None)
    of_ranks = [torch.load(ranks / f"{name}_{r}.pt", weights_only=False) for r in range(RANKS)]
    left_out = OF_THE_RANK.get(name, set())
    for i, terms in enumerate(whole["terms"]):
        for k, expected in terms.items():
            if k not in left_out:
                mean = sum(r["terms"][i][k] for r in of_ranks) / RANKS
                assert mean == pytest.approx(expected, abs=1e-5), (i, k)
    for k, g in whole["gradients"][0].items():
        torch.testing.assert_close(of_ranks[0]["gradients"][0][k], g, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_ranks_keep_equal_weights_and_equal_banks(ranks: Path, name: str) -> None:
    a, b = (torch.load(ranks / f"{name}_{r}.pt", weights_only=False) for r in range(RANKS))
    torch.testing.assert_close(a["parameters"], b["parameters"])
    torch.testing.assert_close(a["buffers"], b["buffers"])


@pytest.mark.parametrize("name", MOVED)
def test_a_training_moves_from_one_process_to_two_and_back(ranks: Path, name: str) -> None:
    """A step each, against three steps of one process."""
    moved = [torch.load(ranks / f"{name}_moved_{r}.pt", weights_only=False) for r in range(RANKS)]
    t = MOVED[name]
    with nothing_drawn():
        whole = train(name, None, schedule=[(t, 0), (t, 1)])
        expected = train(name, None, whole, [(t, 2)])
        found = train(name, None, moved[0], [(t, 2)])
    drawn = ("bank.rows",) if name == "DiffCL" else ()
    for k, buffer in whole["buffers"].items():
        if k not in drawn:
            found_there = moved[0]["buffers"][k]
            if k.startswith("distillation"):  # the same rows in another order
                found_there, buffer = (x.flatten().sort().values for x in (found_there, buffer))
            torch.testing.assert_close(found_there, buffer, rtol=1e-4, atol=1e-5)
        assert torch.equal(moved[0]["buffers"][k], moved[1]["buffers"][k])
    for k, v in expected["terms"][0].items():
        if k not in OF_THE_RANK.get(name, ()):
            assert found["terms"][0][k] == pytest.approx(v, abs=1e-5), k


@pytest.mark.parametrize("name", CASES)
def test_the_page_states_how_often_ranks_exchange_in_a_step(ranks: Path, name: str) -> None:
    number = torch.load(ranks / f"{name}_0.pt", weights_only=False)["exchanged"]
    page = (ROOT / "docs" / "explanation" / "several-gpus.md").read_text(encoding="utf-8")
    assert f"| {name} | {number} |" in page


@pytest.mark.parametrize("name", CASES)
def test_what_two_ranks_save_continues_on_one(ranks: Path, name: str) -> None:
    row, task = CASES[name], Task()
    config = dataclasses.replace(row.config, **CONFIG.get(name, {}))
    method = task.method(row.method, config, seed=7)
    state = torch.load(ranks / f"{name}_0.pt", weights_only=False)["state"]
    assert load_method(method, method.student, state) == ([], [])
    terms = method(task.batch(), TIMES.get(name, (0.5,))[-1])
    assert all(torch.isfinite(v) for v in terms.values())
