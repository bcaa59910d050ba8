"""What earlier versions wrote, and what users' own code imports, keeps working.

old_plans.json and old_state.json come from 0.1.0 before its modules were moved: a plan with every key of
every method at its default, and the keys of the methods' state with shapes on the networks of
`tests.building.Task` (without Diff-CL's HFM and ACTION's heads, whose form has changed since). `copies`
have the keys of the deployed network.
"""

from __future__ import annotations

import importlib
import io
import json
import pickletools
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nnssl_trainers
from nnssl.config import resolve
from nnssl.files import read_json
from nnssl.methods import known_methods
from nnssl.training.checkpoint import load_method
from nnssl.training.randomness import rng_state
from tests.building import Task
from tests.place import SHORT, SMALL, Place, run

HERE = Path(__file__).parent
STATES = read_json(HERE / "old_state.json")
PLANS = read_json(HERE / "old_plans.json")
METHODS = [name for name, section in PLANS["nnssl"].items() if isinstance(section, dict)]


def method_class(name: str) -> Any:
    module = importlib.import_module(f"nnssl_trainers.nnUNetTrainer{name}")
    return getattr(module, f"nnUNetTrainer{name}").method_class


@pytest.mark.parametrize("name", METHODS)
def test_every_key_of_an_old_plans_file_is_taken_as_it_stands(name: str) -> None:
    cls = method_class(name)
    general, config = resolve(PLANS["nnssl"], name, cls.config_class, known_methods())
    assert general is not None and config is not None
    given = {k: v for k, v in PLANS["nnssl"].items() if k not in METHODS}
    assert len(given) == 12 and PLANS["nnssl"][name].keys() <= asdict(config).keys()
    for found, wanted in ((asdict(general), given), (asdict(config), PLANS["nnssl"][name])):
        assert {k: json.loads(json.dumps(found[k])) for k in wanted} == wanted


def test_an_old_plans_file_trains(place: Place) -> None:
    shutil.copy(HERE / "old_plans.json", place.preprocessed / "nnUNetPlans.json")
    trainer = place.trainer()
    trainer.initialize()
    assert trainer.num_epochs == 1000 and trainer.method.config.hfm_stages == 1


@pytest.mark.parametrize("name", STATES)
def test_an_old_state_of_every_method_fits(name: str) -> None:
    cls = method_class(name)
    as_it_was = {"hfm_stages": 0, "denoiser_divisor": 1} if name == "DiffCL" else {}
    config = cls.config_class(**as_it_was)
    method = Task().method(cls, config)
    copies = [f"{copy}.{k}" for copy in STATES[name]["copies"] for k in method.student.state_dict()]
    shapes = {k: v.shape for k, v in method.state_dict().items() if k in copies}
    shapes |= STATES[name]["keys"]
    state = {k: torch.full(tuple(shape), 0.25) for k, shape in shapes.items()}
    assert load_method(method, method.student, state) == ([], [])
    found = method.state_dict()
    assert all((found[k] == 0.25).all() for k in shapes if found[k].is_floating_point())


def test_an_old_checkpoint_continues_as_it_was(place: Place) -> None:
    small = {**SMALL, "hfm_stages": 0}
    place.plan(**SHORT, DiffCL=small)
    trainer = place.trainer()
    trainer.on_train_end = lambda: None
    trainer.num_epochs = 1
    run(trainer)
    history = {"epoch": 0, "lr": 0.01, "loss/supervised": 1.5, "weight/supervised": 1.0}
    checkpoint = {
        "network_weights": trainer.network.state_dict(),
        "optimizer_state": trainer.optimizer.state_dict(),
        "grad_scaler_state": None,
        "logging": trainer.logger.get_checkpoint(),
        "_best_ema": 0.125,
        "current_epoch": 1,
        "init_args": trainer.my_init_kwargs,
        "trainer_name": "nnUNetTrainerDiffCL",
        "inference_allowed_mirroring_axes": (0, 1, 2),
        "nnssl": {
            "method": {k: v for k, v in trainer.method.state_dict().items() if not k.startswith("student.")},
            "rng": [rng_state()],
            "history": [history],
            "config": {"general": {"seed": 0}, "method": small},
            "versions": {"nnssl": "0.1.0", "torch": "2.5.0", "numpy": "1.26.4"},
        },
    }
    path = str(place.results / "old.pth")
    torch.save(checkpoint, path)
    resumed = place.trainer(resume=True)
    resumed.load_checkpoint(path)
    assert resumed.current_epoch == 1 and resumed._best_ema == 0.125 and resumed.history.rows == [history]
    wanted = trainer.method.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in resumed.method.state_dict().items())
    resumed.on_train_start()
    restored, saved = rng_state(), checkpoint["nnssl"]["rng"][0]
    assert torch.equal(restored["torch"], saved["torch"]) and restored["python"] == saved["python"]
    np.testing.assert_array_equal(restored["numpy"][1], saved["numpy"][1])


def test_a_checkpoint_names_no_class_of_ours(place: Place) -> None:
    """Else it could not be loaded once a module has another name."""
    trainer = place.trainer()
    trainer.initialize()
    path = str(place.results / "checkpoint.pth")
    trainer.save_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        operations = pickletools.genops(io.BytesIO(archive.read(name)))
        named = {str(argument) for code, argument, _ in operations if code.name == "GLOBAL"}
    assert any(n.startswith("torch") for n in named) and not any(n.startswith("nnssl") for n in named)


def test_imports_of_users_own_trainers() -> None:
    from nnssl.method import SemiMethod, TeacherMethod
    from nnssl.trainer import SemiTrainer

    assert SemiTrainer is importlib.import_module("nnssl.training.trainer").SemiTrainer
    assert issubclass(TeacherMethod, SemiMethod)
    assert Path(nnssl_trainers.__path__[0], "nnUNetTrainerDiffCL.py").is_file()
