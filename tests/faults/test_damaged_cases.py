"""Damaged and missing files of preprocessed cases: named, wherever they are met."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import blosc2
import pytest

from nnssl.data import intact
from nnssl.data.freshness import read_properties, write_properties
from nnssl.data.intact import DamagedCase, IntactDataset, refuse_damage
from nnssl.data.streams import UnlabeledDataset
from tests.faults.test_damaged_checkpoints import damage
from tests.place import MEAN_TEACHER, Place

LABELED, UNLABELED = "nnUNetPlans_3d_fullres", "nnUNetPlans_3d_fullres_unlabeled"


def overwrite(path: Path) -> None:
    damage(path, max(0, path.stat().st_size // 2 - 1000), 2000, random.Random(0))


@pytest.mark.parametrize("suffix", [".b2nd", "_seg.b2nd", ".pkl"])
def test_damaged_and_missing_files_of_both_streams_are_named(place: Place, suffix: str) -> None:
    for folder, case, dataset in (
        (LABELED, "lab_00", IntactDataset),
        (UNLABELED, "scan_00", UnlabeledDataset),
    ):
        path = place.preprocessed / folder / (case + suffix)
        marker = path.with_name(f"{case}.pkl")
        dataset(str(path.parent), [case]).load_case(case)
        overwrite(path)
        with pytest.raises(DamagedCase) as caught:
            dataset(str(path.parent), [case]).load_case(case)
        assert str(caught.value).startswith(f"{path}: damaged")
        assert f"Delete {marker} and run `nnssl plan-and-preprocess`" in str(caught.value)
        path.unlink()
        with pytest.raises(DamagedCase) as caught:
            dataset(str(path.parent), [case]).load_case(case)
        assert str(caught.value).startswith(f"{path}: missing") and "plan-and-preprocess" in str(caught.value)


def test_damage_of_any_length_in_the_properties_is_found(tmp_path: Path) -> None:
    path, generator = tmp_path / "case.pkl", random.Random(0)
    properties = {"class_locations": {1: list(range(3000))}, "spacing": [1.0, 2.0, 3.0]}
    write_properties(properties, str(path))
    assert read_properties(str(path)) == properties == pickle.loads(path.read_bytes())
    whole = path.read_bytes()
    places = [(generator.randrange(len(whole)), number) for number in (1, 2000) for _ in range(50)]
    for start, number in [*places, *((i, 1) for i in range(len(whole) - 16, len(whole)))]:
        path.write_bytes(whole)
        damage(path, start, number, generator)
        assert read_properties(str(path)) is None, (start, number)


def test_a_case_that_nnunet_preprocessed_has_no_checksum_and_is_read(place: Place) -> None:
    folder = place.preprocessed / LABELED
    properties = read_properties(str(folder / "lab_00.pkl"))
    assert properties is not None
    (folder / "lab_00.pkl").write_bytes(pickle.dumps({k: v for k, v in properties.items() if k != "nnssl"}))
    IntactDataset(str(folder), ["lab_00"]).load_case("lab_00")
    (folder / "lab_00_seg.b2nd").write_bytes(b"no array")
    with pytest.raises(DamagedCase, match=r"lab_00_seg.b2nd: damaged, it cannot be decompressed"):
        refuse_damage(str(folder), "lab_00", thorough=True)


def test_the_redone_case_is_intact(place: Place) -> None:
    from nnssl.commands.cli import main

    folder = place.preprocessed / LABELED
    overwrite(folder / "lab_00.b2nd")
    (folder / "lab_00.pkl").unlink()
    assert main(["plan-and-preprocess", "-d", "777", "-c", "3d_fullres", "-np", "1", "--no_pbar"]) == 0
    refuse_damage(str(folder), "lab_00")


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "workers"), [(LABELED, 0), (UNLABELED, 2)])
def test_a_training_that_meets_a_damaged_case_names_it(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    folder: str,
    workers: int,
) -> None:
    """In the main process and in a background worker."""
    monkeypatch.setenv("nnUNet_n_proc_DA", str(workers))
    case = "lab_" if folder == LABELED else "scan_"
    trainer = place.trainer(MEAN_TEACHER)
    start = trainer.initialize

    def damaged_meanwhile() -> None:
        start()
        for path in (place.preprocessed / folder).glob(f"{case}*_seg.b2nd"):
            overwrite(path)

    trainer.initialize = damaged_meanwhile
    with pytest.raises(RuntimeError, match=rf"{folder}/{case}.*_seg.b2nd: damaged.*plan-and-preprocess"):
        trainer.run_training()
    if workers:
        assert "Exception in background worker" in capfd.readouterr().out


def test_other_errors_stay_what_they_are() -> None:
    def cases() -> Any:
        raise AssertionError("looked for damage")

    with pytest.raises(ZeroDivisionError), intact.damage_named(cases):
        print(1 / 0)


def test_an_array_without_checksum_that_fails_when_it_is_read_is_named(place: Place) -> None:
    folder = place.preprocessed / LABELED
    properties = read_properties(str(folder / "lab_00.pkl"))
    assert properties is not None
    del properties["nnssl"]
    write_properties(properties, str(folder / "lab_00.pkl"))
    overwrite(folder / "lab_00_seg.b2nd")

    def load_case() -> None:
        blosc2.open(str(folder / "lab_00_seg.b2nd"), mode="r")[:]

    with (
        pytest.raises(DamagedCase, match=r"lab_00_seg.b2nd: damaged"),
        intact.damage_named(lambda: [(str(folder), "lab_00")]),
    ):
        load_case()
