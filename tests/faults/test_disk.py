"""A disk that is full or read-only: every writer says so with the path and what to do, and leaves what was
there before."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nnssl import files
from nnssl.commands.cli import main
from nnssl.training.history import History, whole_plot
from tests.commands.test_export import export
from tests.place import Place, trained
from tests.raw_dataset import Tiny

pytestmark = pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")


@contextmanager
def full(free: int) -> Iterator[None]:
    """No file can grow beyond so many bytes, which ends writes as a full disk does."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """No folder can be made below `folder`, and without one nothing is written; permissions do not stop
    root."""
    make = os.mkdir

    def refuse(path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).startswith(str(folder)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        yield


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def assert_told(said: str, place: Path, remedy: str) -> None:
    assert str(place) in said and remedy in said and ".nnssl-" not in said and "\n" not in said.strip()


FAULTS = ("full", "read-only")


@contextmanager
def fault(kind: str, folder: Path, free: int = 100) -> Iterator[str]:
    """The remedy that is to be told."""
    with full(free) if kind == "full" else read_only(folder):
        yield files.FREE if kind == "full" else files.ALLOW


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("free", [100, 20_000])
def test_preprocessing(tiny: Tiny, capsys: pytest.CaptureFixture[str], kind: str, free: int) -> None:
    command = ["plan-and-preprocess", "-d", "777", "-c", "3d_fullres", "-np", "1", "--no_pbar"]
    tiny.labeled.mkdir()
    with fault(kind, tiny.preprocessed, free) as remedy:
        assert main(command) == 1
    assert_told(capsys.readouterr().err, tiny.preprocessed, remedy)
    assert not os.listdir(tiny.labeled)
    assert not [p for p in tiny.preprocessed.rglob("*") if p.name.startswith(".nnssl-")]
    assert main(command) == 0


@pytest.mark.parametrize("kind", FAULTS)
def test_splits(tiny: Tiny, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    command = ["split", "-d", "777", "--labeled", "2"]
    assert main(command) == 0
    before = content(tiny.preprocessed)
    capsys.readouterr()
    with fault(kind, tiny.preprocessed) as remedy:
        assert main([*command, "--seed", "1"]) == 1
    assert_told(capsys.readouterr().err, tiny.preprocessed / "splits_final.json", remedy)
    assert content(tiny.preprocessed) == before


def _checkpoint(place: Place, folder: Path) -> tuple[Callable[[], Any], Path]:
    trainer = trained(place)
    path = os.path.join(trainer.output_folder, "checkpoint_final.pth")
    return lambda: trainer.save_checkpoint(path), Path(path)


def _history(place: Place, folder: Path) -> tuple[Callable[[], Any], Path]:
    history = History()
    history.add(0, 0.01, {"loss/a": 1.0}, {"a": 1.0})
    history.write(str(folder))
    history.add(1, 0.01, {"loss/a": 0.5}, {"a": 1.0})
    return lambda: history.write(str(folder)), folder / "losses.csv"


def _plot_of_losses(place: Place, folder: Path) -> tuple[Callable[[], Any], Path]:
    history, path = History(), folder / "losses.png"
    history.add(0, 0.01, {"loss/a": 1.0}, {"a": 1.0})
    history._plot(str(path))
    return lambda: history._plot(str(path)), path


def _progress(place: Place, folder: Path) -> tuple[Callable[[], Any], Path]:
    def plot(output: str) -> None:
        Path(output, "progress.png").write_bytes(b"a plot" * 100)

    (folder / "progress.png").write_bytes(b"an older plot")
    return lambda: whole_plot(plot)(str(folder)), folder / "progress.png"


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("writer", [_checkpoint, _history, _plot_of_losses, _progress])
def test_files_of_a_training(drawn: Place, tmp_path: Path, kind: str, writer: Callable[..., Any]) -> None:
    folder = tmp_path / "training"
    folder.mkdir()
    write, path = writer(drawn, folder)
    before = content(path.parent)
    with fault(kind, path.parent, 10) as remedy, pytest.raises(OSError) as caught:
        write()
    assert_told(str(caught.value), path, remedy)
    assert content(path.parent) == before and path.name in before


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("part", ["plans.json", "archive"])
def test_export(
    drawn: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, part: str
) -> None:
    trained(drawn)
    assert export(tmp_path / "whole") == 0
    largest = max(f.stat().st_size for f in (tmp_path / "whole").rglob("*.pth"))
    output = tmp_path / "out"
    output.mkdir()
    capsys.readouterr()
    with fault(kind, output, largest if part == "archive" else 100) as remedy:
        assert export(output) == 1
    assert_told(capsys.readouterr().err, output, remedy)
    assert not os.listdir(output)


def test_a_full_disk_under_a_library_that_does_not_say_so_is_found(tmp_path: Path) -> None:
    files.refuse_full(tmp_path)
    with full(1000), pytest.raises(OSError, match=f"{files.FREE}.*{tmp_path}"):
        files.refuse_full(tmp_path)
    assert not os.listdir(tmp_path)
