"""Two processes (gloo, CPU): the method wrapped as a whole in DistributedDataParallel, as the trainer wraps
it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from nnssl.training.checkpoint import from_all_ranks, own_buffers, restore_buffers
from tests.building import Task
from tests.test_method_contract import ROWS, Row

pytestmark = pytest.mark.slow


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    for name, row in ROWS.items():
        _train(rank, row, f"{folder}/{name}_{rank}.pt")
    dist.destroy_process_group()


def _train(rank: int, row: Row, file: str) -> None:
    task = Task()
    method = task.method(row.method, row.config, seed=rank)  # ranks start apart: DDP brings them together
    wrapped = DistributedDataParallel(method, broadcast_buffers=False)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 1e-2)
    for i in range(3):
        batch = task.batch(seed=10 * i + rank)  # each rank its own data
        method.before_step(0.5)
        terms, weights = wrapped(batch, 0.5), method.weights(0.5)
        optimizer.zero_grad()
        sum(weights[k] * terms[k] for k in terms).backward()
        optimizer.step()
        method.after_step(batch, 0.5)
    kept = copy.deepcopy(dict(own_buffers(method)))
    gathered = from_all_ranks(kept)
    method.load_state_dict(gathered[0], strict=False)  # as every rank finds it in rank 0's checkpoint
    restore_buffers(method, gathered)
    assert all(torch.equal(v, kept[k]) for k, v in own_buffers(method))
    torch.save(
        {
            "parameters": [p.detach() for p in method.parameters()],
            "buffers": copy.deepcopy(dict(method.named_buffers())),
        },
        file,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have after three steps of every method: <method>_<rank>.pt."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, args=(str(folder),), nprocs=2, join=True)
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_ranks_keep_equal_weights_and_their_own_banks(trained: Path, name: str) -> None:
    a, b = (torch.load(trained / f"{name}_{rank}.pt") for rank in (0, 1))
    for p, q in zip(a["parameters"], b["parameters"], strict=True):
        torch.testing.assert_close(p, q)
    for key in (k for k in a["buffers"] if k.endswith("rows")):
        assert not torch.equal(a["buffers"][key], b["buffers"][key])
