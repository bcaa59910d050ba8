"""Damaged checkpoints: found wherever the damage is, named, and the sound ones beside them offered."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnssl.files import CHECKSUM_BYTES, save_torch, torch_damage
from nnssl.training.checkpoint import read_checkpoint
from tests.commands.test_export import export
from tests.place import MEAN_TEACHER, Place, trained

FINAL, LATEST, BEST = (f"checkpoint_{name}.pth" for name in ("final", "latest", "best"))


def content(size: int = 40_000) -> dict[str, Any]:
    return {
        "network_weights": {"a": torch.randn(size), "b": torch.zeros(3, dtype=torch.int64)},
        "current_epoch": 7,
        "note": ["text", 1.5, None],
    }


def damage(path: Path, start: int, number: int, generator: random.Random) -> None:
    """Other bytes in the place of `number` bytes from `start` on."""
    data = bytearray(path.read_bytes())
    for i in range(start, min(start + number, len(data))):
        data[i] ^= generator.randrange(1, 256)
    path.write_bytes(data)


def test_damage_of_any_length_is_found_wherever_it_is(tmp_path: Path) -> None:
    path, other, generator = tmp_path / "whole.pth", tmp_path / "damaged.pth", random.Random(0)
    save_torch(content(), path)
    assert torch_damage(path) == ""
    size = path.stat().st_size
    places = {0, 2000, size - 2000, *(generator.randrange(size - 2000) for _ in range(100))}
    wrong = [(start, 2000) for start in places]
    wrong += [(start, 1) for start in (*range(size - 100, size), *generator.sample(range(size), 100))]
    for start, number in wrong:
        shutil.copy(path, other)
        damage(other, start, number, generator)
        assert torch_damage(other), (start, number)
    whole = path.read_bytes()
    for end in (1, 21, 22, 62, size // 2, size - CHECKSUM_BYTES, size - 1):
        other.write_bytes(whole[:end])
        assert "truncated" in torch_damage(other) or "cannot be read" in torch_damage(other), end
    other.write_bytes(whole + b"\0" * 100)
    assert "truncated or overwritten" in torch_damage(other)
    torch.save({"a": torch.ones(3)}, other, _use_new_zipfile_serialization=False)
    assert "from before 1.6" in torch_damage(other)


def test_a_checkpoint_without_checksum_loads_and_damage_in_its_parts_is_found(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(content(), path)
    assert torch_damage(path) == "" and read_checkpoint(str(path), "cpu")["current_epoch"] == 7
    size, generator = path.stat().st_size, random.Random(1)
    whole = path.read_bytes()
    for start in (generator.randrange(size - 2000) for _ in range(50)):
        damage(path, start, 2000, generator)
        assert torch_damage(path), start
        path.write_bytes(whole)
    path.write_bytes(whole[: size // 2])
    assert torch_damage(path)


def test_pytorch_reads_a_file_with_a_checksum_as_its_own(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.pth", tmp_path / "theirs.pth"
    wanted = content()
    save_torch(wanted, ours)
    with theirs.open("wb") as stream:
        torch.save(wanted, stream)
    assert ours.read_bytes()[: -2 - CHECKSUM_BYTES] == theirs.read_bytes()[:-2]
    choices: list[dict[str, Any]] = [{}, {"mmap": True}, {"weights_only": False}]
    for options in choices:
        found = torch.load(ours, **options)
        assert found["note"] == wanted["note"] and all(
            torch.equal(found["network_weights"][k], v) for k, v in wanted["network_weights"].items()
        )


Spoil = Callable[[Path], None]


def overwrite(path: Path) -> None:
    damage(path, path.stat().st_size // 2, 2000, random.Random(2))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


SPOILED: dict[str, tuple[Spoil, str]] = {
    "2,000 bytes": (overwrite, "its content does not match its checksum"),
    "truncated": (truncate, "it is truncated or overwritten"),
    "empty": (empty, "it is empty"),
}


@pytest.fixture
def folder(drawn: Place) -> Path:
    """A fold with its final, latest and best checkpoint."""
    trainer = trained(drawn)
    for name in (LATEST, BEST):
        trainer.save_checkpoint(os.path.join(trainer.output_folder, name))
    return Path(trainer.output_folder)


@pytest.mark.parametrize("kind", SPOILED)
def test_a_damaged_checkpoint_is_refused_by_c_val_and_export(
    drawn: Place, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    spoil, found = SPOILED[kind]
    spoil(folder / FINAL)
    named = f"{folder / FINAL} cannot be used: {found}. Sound there: "
    for option in ("c", "val"):
        trainer = drawn.trainer(MEAN_TEACHER, resume=True)
        with pytest.raises(RuntimeError) as caught:
            maybe_load_checkpoint(trainer, option == "c", option == "val")
        assert str(caught.value).startswith(named)
        assert f"{LATEST} (epochs done: 1), {BEST} (epochs done: 1)" in str(caught.value)
        assert f"Move {FINAL} away, and --c resumes from {LATEST}" in str(caught.value)
    assert export(tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert named in said and "Choose with -chk" in said and not (tmp_path / "out" / "fold_0").exists()
    assert export(tmp_path / "out", "-chk", BEST) == 0

    overwrite(folder / LATEST)
    with pytest.raises(RuntimeError) as caught:
        maybe_load_checkpoint(drawn.trainer(MEAN_TEACHER, resume=True), True, False)
    assert f"Move {FINAL} and {LATEST} away, and --c resumes from {BEST}" in str(caught.value)
    for name in (FINAL, LATEST):
        (folder / name).unlink()
    resumed = drawn.trainer(MEAN_TEACHER, resume=True)
    maybe_load_checkpoint(resumed, True, False)
    assert resumed.current_epoch == 1

    overwrite(folder / BEST)
    with pytest.raises(RuntimeError, match=r"checkpoint_best.*No other checkpoint there is sound: restore"):
        maybe_load_checkpoint(drawn.trainer(MEAN_TEACHER, resume=True), True, False)


def test_a_folder_in_the_place_of_a_checkpoint_is_refused_at_the_start(
    drawn: Place, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / FINAL).unlink()
    (folder / FINAL).mkdir()
    with pytest.raises(RuntimeError, match=r"checkpoint_final.pth: it is a folder.*Move it away"):
        drawn.trainer(MEAN_TEACHER)
    assert export(tmp_path / "out") == 1
    assert f"{folder / FINAL} cannot be used: it is a folder" in capsys.readouterr().err


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    save_torch([1, 2], tmp_path / "list.pth")
    with pytest.raises(RuntimeError, match=r"list.pth is not a checkpoint of nnU-Net"):
        read_checkpoint(str(tmp_path / "list.pth"), "cpu")
    with pytest.raises(RuntimeError, match=r"absent.pth cannot be used: it does not exist"):
        read_checkpoint(str(tmp_path / "absent.pth"), "cpu")


def test_a_checkpoint_with_checksum_predicts_in_stock_nnunet(drawn: Place, tmp_path: Path) -> None:
    trainer = trained(drawn)
    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, ("0",))
    state = trainer.network.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in predictor.network.state_dict().items())
