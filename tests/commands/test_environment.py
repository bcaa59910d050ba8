from __future__ import annotations

import json
import platform
from importlib import metadata

import pytest

from nnssl import __version__
from nnssl.commands import environment
from nnssl.commands.cli import main


def test_version_is_one_line_with_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"nnssl {__version__} (python {platform.python_version()}, ")
    for name in ("nnunetv2", "torch"):
        assert f"{name} {metadata.version(name)}" in line


def test_env_shows_folders_of_nnunet_and_no_other_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_raw", "/data/raw")
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.setenv("TORCH_LOGS", "/home/someone/logs")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("API_KEY", "secret")
    assert main(["env", "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert found["variables"].items() >= {"nnUNet_raw": "/data/raw", "nnUNet_compile": "f"}.items()
    assert found["variables"]["TORCH_LOGS"] == "set (a path)"
    assert "someone" not in text and "secret" not in text
    assert "cores" in found["devices"]["cpu"]
    assert main(["env"]) == 0
    assert "  nnUNet_raw: /data/raw" in capsys.readouterr().out.splitlines()


def test_absent_packages_are_said_to_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    found = environment.versions()
    assert found["torch"] == metadata.version("torch") and found["no-such-package"] == "not installed"
