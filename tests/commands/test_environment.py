from __future__ import annotations

import json
import platform
from importlib import metadata

import pytest

from nnssl import __version__
from nnssl.commands import environment
from nnssl.commands.cli import main
from nnssl.training import cost
from nnssl.training.console import duration
from tests.place import SHORT, Place


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
    monkeypatch.setenv("TORCH_LOGS", "/users/someone/logs")
    monkeypatch.setenv("HOME", "/users/someone")
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


@pytest.mark.usefixtures("place")
def test_check_predicts_what_a_step_of_a_trainer_costs(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["check", "-d", "777", "-c", "3d_fullres", "-tr"]
    main([*chosen, "nnUNetTrainerMeanTeacher", "--json"])
    content = json.loads(capsys.readouterr().out)
    found = content["costs"]["3d_fullres"]
    for device in ("cuda", "cpu"):
        assert found[device]["peak"] > found[device]["fixed"] > found[device]["parameters"] > 0
    assert found["cuda"]["peak"] < found["cpu"]["peak"]  # half precision
    assert found["cuda"]["flops"] > 1.5 * found["supervised"]["flops"]
    line, tried = [
        f["found"] for f in content["findings"] if f["place"] == "3d_fullres, nnUNetTrainerMeanTeacher"
    ]
    assert "a step is predicted to need" in line and f"a card of {found['smallest_card_gb']} GB" in line
    trial = found["trial"]
    assert trial["seconds"] > 0 and trial["share"] == 1 and "CPU thread" in trial["device"]
    assert f"a step takes {trial['seconds']:.2g} s on {trial['device']} ({trial['steps']} steps" in tried
    assert f"{trial['schedule']:,} steps {duration(trial['seconds'] * trial['schedule'])};" in tried
    main([*chosen, "nnUNetTrainerNoSuch"])
    assert "FAIL  -tr nnUNetTrainerNoSuch" in capsys.readouterr().out
    main([*chosen, "nnUNetTrainer"])
    assert "what a step costs is not predicted" in capsys.readouterr().out
    assert main(["check", "-tr", "nnUNetTrainerSemi"]) == 1
    assert "name the dataset with -d" in capsys.readouterr().err


def test_a_key_that_a_method_refuses_is_one_finding_and_the_baseline_goes_by_it(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.plan(**SHORT, deploy="teacher", agreement=True)
    chosen = ["check", "-d", "777", "-c", "3d_fullres", "-tr"]
    main([*chosen, "nnUNetTrainerCPS"])
    found = capsys.readouterr().out
    assert 'FAIL  3d_fullres, nnUNetTrainerCPS: "deploy": "teacher" is not possible' in found
    assert "ok    Dataset777_Tiny" in found
    main([*chosen, "nnUNetTrainerSupervised"])
    assert "a step is predicted to need" in capsys.readouterr().out


@pytest.mark.usefixtures("place")
def test_a_failing_trial_is_told_and_the_rest_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(cost, "try_steps", full)
    main(["check", "-d", "777", "-c", "3d_fullres", "-tr", "nnUNetTrainerSupervised"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("warn") and "CUDA out of memory. Tried to allocate" in line for line in lines)
    assert any("a step is predicted to need" in line for line in lines)


def test_absent_packages_are_said_to_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    found = environment.versions()
    assert found["torch"] == metadata.version("torch") and found["no-such-package"] == "not installed"
