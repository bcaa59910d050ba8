from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.quality import unlike
from tests.raw_dataset import write_case, write_dataset


def test_sound_scans_pass_and_every_planted_fault_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_dataset(tmp_path, labeled=0, unlabeled=0)
    for index in range(5):
        write_case(folder / "imagesTr", f"case_{index}", index, folder / "labelsTr", num_channels=1)
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    (folder / "dataset.json").write_text(json.dumps({**content, "channel_names": {"0": "MR"}}))
    monkeypatch.setattr(sys, "argv", ["unlike", str(folder)])
    monkeypatch.setattr(unlike, "DRAWS", 2)
    unlike.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    table = {row[0]: row[1:] for row in rows if len(row) == 3}
    assert table.pop("labeled") == ["2", "4"]
    assert table.pop("as they are") == ["0 of 6", "0 of 2"]
    assert table == {fault: ["6 of 6", "2 of 2"] for fault in unlike.FAULTS}
