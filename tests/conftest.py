"""Settings of every test run (one thread, no display, nothing of the user's nnU-Net in sight) and the
datasets that tests share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

for name in [name for name in os.environ if name.startswith("nnUNet_")]:
    del os.environ[name]
os.environ.update(
    nnUNet_compile="f",
    nnUNet_def_n_proc="1",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    # virtual machines that hide half of AMX end bfloat16 with an illegal instruction
    ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16",
    # threads of commands that the tests start: spinning ones crawl where several processes share the cores
    OMP_WAIT_POLICY="PASSIVE",
)

import torch  # reads the environment when loaded  # noqa: E402

torch.set_num_threads(1)

if TYPE_CHECKING:  # nnU-Net takes seconds to import, and most tests need little of it
    from tests.place import Place
    from tests.raw_dataset import Tiny


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first where several processes share the work: none is left over at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A dataset with a plan, nothing preprocessed, and the environment that points at it."""
    from tests.raw_dataset import planned_dataset

    return planned_dataset(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a planned and preprocessed dataset, made once for all processes of pytest; not to be
    changed."""
    from tests.place import plan_and_preprocess

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, done = base / "planned", base / "planned.done"
    with FileLock(base / "planned.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            plan_and_preprocess(folder)
            done.touch()
    return folder


@pytest.fixture
def place(planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy of the planned dataset, with small networks, a short schedule and two hidden labels."""
    from tests.place import SHORT, SMALL, Place, point_at

    shutil.copytree(planned, tmp_path, dirs_exist_ok=True)
    point_at(tmp_path, monkeypatch)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")  # nnU-Net's planning does not work with it
    place = Place(tmp_path)
    place.plan(**SHORT, DiffCL=SMALL)
    place.split()
    return place


@pytest.fixture
def drawn(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A dataset with a plan and the names of preprocessed cases: what a trainer needs to be initialized."""
    from nnssl.commands.trainers import trainers_folder
    from tests.place import ARCHITECTURE, SHORT, Place
    from tests.raw_dataset import plans

    monkeypatch.setenv("nnUNet_extTrainer", trainers_folder())
    configuration = {**plans()["configurations"]["3d_fullres"], "architecture": ARCHITECTURE}
    tiny.edit_plan(configurations={"3d_fullres": configuration})
    tiny.labeled.mkdir()
    for index in range(6):
        (tiny.labeled / f"lab_{index:02d}.b2nd").touch()
    drawn = Place(tmp_path)
    drawn.plan(**SHORT)
    drawn.split()
    return drawn
