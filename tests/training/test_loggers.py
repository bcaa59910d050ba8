"""Every number of losses.csv in wandb and TensorBoard, by the real packages, offline."""

from __future__ import annotations

import importlib
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nnssl.training import trainer as trainer_module
from nnssl.training.tensorboard import SWITCH, TensorBoardLogger, enabled
from tests.place import SHORT, Place, losses, run


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """{name: {step: value}} of all that TensorBoard shows of a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def wandb_records(file: Path) -> Iterator[Any]:
    """Of an offline run: LevelDB's log format, a header of 7 bytes, then blocks of 32 KiB with pieces of
    records."""
    proto: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, place, piece = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # too little for another header
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        if place + 7 + length > len(data):  # still being written
            return
        piece += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = proto.Record()
            record.ParseFromString(piece)
            yield record
            piece = b""


def finished_records(file: Path, seconds: float = 60.0) -> list[Any]:
    """wandb's own process writes the file, and may be behind."""
    until = time.monotonic() + seconds
    while True:
        records = list(wandb_records(file))
        if any(r.WhichOneof("record_type") == "exit" for r in records):
            return records
        assert time.monotonic() < until, f"{file} has no last record after {seconds:g} s"
        time.sleep(0.2)


def test_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for first, values in ((0, (1.0, 2.0, 3.0)), (2, (7.0,))):
        logger = TensorBoardLogger(str(tmp_path))
        logger.update_config({"nnssl": {"seed": 0}})
        for step, value in enumerate(values, first):
            logger.log("loss/a", value, step)
            logger.log("epoch_start_timestamps", 1.7e9, step)
        logger.log_summary("final_val/foreground_dice", 0.5)
    found = scalars(tmp_path / "tensorboard")
    assert found == {"loss/a": {0: 1.0, 1: 2.0, 2: 7.0}, "summary/final_val/foreground_dice": {2: 0.5}}


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    assert not enabled()
    monkeypatch.setenv(SWITCH, "1")
    assert enabled()
    monkeypatch.setenv(SWITCH, "yes")
    with pytest.raises(ValueError, match=f"{SWITCH} is 'yes', expected 0 or 1"):
        enabled()


@pytest.mark.slow
def test_all_numbers_arrive_and_the_training_does_not_notice(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb")
    place.plan(**SHORT)
    plain = losses(run(place.trainer("nnUNetTrainerFixMatch")))
    monkeypatch.setattr(trainer_module, "PREDICTED_FROM", 0)
    for name, value in {SWITCH: "1", "nnUNet_wandb_enabled": "1", "nnUNet_wandb_mode": "offline"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"WANDB_SILENT": "true", "WANDB_CACHE_DIR": "cache", "WANDB_CONFIG_DIR": "c"}.items():
        monkeypatch.setenv(name, value if name == "WANDB_SILENT" else str(tmp_path / value))
    capsys.readouterr()
    trainer = run(place.trainer("nnUNetTrainerFixMatch"))
    wandb.finish()
    rows = losses(trainer)
    assert rows == plain
    names = set(rows[0]) - {"epoch"}
    assert {"loss/pseudo", "weight/pseudo", "total", "lr", "validation_loss"} < names
    assert any(name.startswith("dice/") for name in names)

    in_tensorboard = scalars(Path(trainer.output_folder) / "tensorboard")
    file = next((Path(trainer.output_folder) / "wandb").glob("offline-run-*/*.wandb"))
    in_wandb: dict[int, dict[str, float]] = {}
    for record in finished_records(file):
        values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if values:
            step = in_wandb.setdefault(int(values["_step"]), {})
            step |= {key: json.loads(value) for key, value in values.items()}
    for row in rows:
        for name in names:
            expected = pytest.approx(row[name], rel=1e-6, nan_ok=True)
            assert in_tensorboard[name][int(row["epoch"])] == expected
            assert float(in_wandb[int(row["epoch"])][name]) == expected
    assert "train_losses" in in_tensorboard  # nnU-Net's own

    record = json.loads((Path(trainer.output_folder) / "training.json").read_text(encoding="utf-8"))
    assert record["predicted_memory"].endswith("GiB of tensors predicted")
    assert f"memory: {record['predicted_memory']}" in capsys.readouterr().out
