from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnssl.data.split import absent_classes, backup, hidden_cases, make_splits, training_cases, write_splits
from tests.raw_dataset import write_dataset

CASES = [f"case_{index:02d}" for index in range(20)]


def write(path: Path, *folds: dict[str, list[str]]) -> str:
    path.write_text(json.dumps(folds), encoding="utf-8")
    return str(path)


def fold(train: str = "", val: str = "", unlabeled: str | None = None) -> dict[str, list[str]]:
    return {
        "train": train.split(),
        "val": val.split(),
        **({} if unlabeled is None else {"unlabeled": unlabeled.split()}),
    }


# hidden_cases


def test_without_file_or_key_nothing_is_hidden_and_every_fold_is_allowed(tmp_path: Path) -> None:
    assert hidden_cases(str(tmp_path / "absent.json"), "all", []) == []
    file = write(tmp_path / "splits.json", fold("a b", "c"), fold("a c", "b", ""))
    for index in (0, 1, 7, "all"):
        assert hidden_cases(file, index, ["a", "b", "c"]) == []


def test_hidden_cases_are_those_of_the_fold_sorted(tmp_path: Path) -> None:
    file = write(tmp_path / "splits.json", fold("a", "b", "d c"), fold("b", "c", "a"), fold("b", "c"))
    assert [hidden_cases(file, index, list("abcd")) for index in (0, "1", 2)] == [["c", "d"], ["a"], []]


@pytest.mark.parametrize("which", ["all", 1, 5])
def test_folds_that_would_train_on_hidden_labels_are_refused_with_the_remedy(
    tmp_path: Path, which: int | str
) -> None:
    file = write(tmp_path / "splits.json", fold("a", "b", "c"))
    with pytest.raises(
        ValueError,
        match=rf"splits\.json hides labels \(key unlabeled\), but fold {which}.* Choose fold 0, or",
    ):
        hidden_cases(file, which, list("abc"))


@pytest.mark.parametrize("key", ["train", "val"])
def test_overlap_of_hidden_and_used_cases_is_refused(tmp_path: Path, key: str) -> None:
    file = write(tmp_path / "splits.json", fold("a b", "c d", "b x" if key == "train" else "d x"))
    with pytest.raises(ValueError, match=rf"splits\.json, fold 0: [bd] is in unlabeled and in {key}"):
        hidden_cases(file, 0, list("abcdx"))


@pytest.mark.parametrize("key", ["train", "val", "unlabeled"])
def test_unknown_cases_are_refused_with_file_and_key(tmp_path: Path, key: str) -> None:
    file = write(tmp_path / "splits.json", {**fold("a", "b", "c"), key: ["stranger"]})
    with pytest.raises(ValueError, match=rf"splits\.json, fold 0, key {key}: stranger is no case"):
        hidden_cases(file, 0, list("abc"))


@pytest.mark.parametrize(
    "content",
    ["{}", "[1]", '[{"train": []}]', '[{"train": "a", "val": []}]', '{"train": [], "val": []}'],
)
def test_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "splits.json").write_text(content)
    with pytest.raises(ValueError, match=r"splits\.json: expected a list of folds"):
        hidden_cases(str(tmp_path / "splits.json"), 0, [])


def test_the_place_of_a_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_text('[{"train": [],\n "val" []}]')
    with pytest.raises(ValueError, match=r"splits\.json: not valid JSON \(line 2, column 8"):
        hidden_cases(str(tmp_path / "splits.json"), 0, [])


# make_splits


@pytest.mark.parametrize("first", [True, False])
def test_folds_are_nnunets_own_with_some_training_cases_hidden(first: bool) -> None:
    splits = make_splits(CASES[::-1], 4, None, None, first, 0)
    for ours, theirs in zip(splits, generate_crossval_split(CASES), strict=True):
        assert ours["val"] == list(theirs["val"])
        assert len(ours["train"]) == 4
        assert sorted(ours["train"] + ours["unlabeled"]) == list(theirs["train"])
        assert (ours["train"] == list(theirs["train"])[:4]) is first


def test_the_same_seed_gives_the_same_split_and_another_seed_another() -> None:
    one, same, other = (make_splits(CASES, 4, None, None, False, seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert json.loads(json.dumps(one)) == one


def test_a_smaller_random_choice_is_part_of_a_larger_one() -> None:
    for small, large in zip(
        make_splits(CASES, 3, None, None, False, 5), make_splits(CASES, 8, None, None, False, 5), strict=True
    ):
        assert set(small["train"]) < set(large["train"])


def test_named_validation_cases_give_one_fold() -> None:
    (split,) = make_splits(CASES, 2, None, CASES[:0:-4], True, 0)
    assert split["val"] == sorted(CASES[:0:-4])
    assert split["train"] == [case for case in CASES if case not in split["val"]][:2]
    assert sorted(case for cases in split.values() for case in cases) == CASES


def test_unlabeled_limits_the_hidden_cases_and_leaves_the_rest_out() -> None:
    (split,) = make_splits(CASES, 2, 3, CASES[15:], True, 0)
    assert split == {"train": CASES[:2], "val": CASES[15:], "unlabeled": CASES[2:5]}
    assert make_splits(CASES, 2, 0, CASES[15:], True, 0)[0]["unlabeled"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((CASES, 0, None, None, True, 0), r"--labeled 0: fold 0 has 16 training cases; choose 1 to 16"),
        ((CASES, 17, None, None, True, 0), r"--labeled 17: fold 0 has 16 training cases"),
        (
            (CASES, 14, 3, None, True, 0),
            r"--unlabeled 3: fold 0 has 2 cases left beside 14 labeled; choose 0 to 2",
        ),
        ((CASES, 1, -1, None, True, 0), r"--unlabeled -1"),
        (
            (CASES, 1, None, ["case_01", "x"], True, 0),
            r"--val: x is not in the dataset's imagesTr \(20 cases, e\.g\. case_00",
        ),
        ((CASES, 1, None, ["case_01", "case_01"], True, 0), r"--val: a case is named twice"),
        ((CASES, 1, None, [], True, 0), r"--val: no case is named"),
        ((CASES, 1, None, CASES, True, 0), r"--labeled 1: fold 0 has 0 training cases"),
        ((CASES[:1], 1, None, None, True, 0), r"1 labeled case\(s\): a split needs two"),
        ((CASES, 1, None, None, False, -1), r"--seed -1: expected 0 or more"),
    ],
)
def test_impossible_splits_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_splits(*arguments)


# write_splits


def test_existing_files_are_kept_under_new_names(tmp_path: Path) -> None:
    file = tmp_path / "new" / "splits_final.json"
    contents = [make_splits(CASES, number, None, None, True, 0) for number in (1, 2, 3)]
    saved = [write_splits(content, str(file)) for content in contents]
    assert saved == [None, f"{file}.bak", f"{file}.bak1"]
    assert [
        json.loads(path.read_text(encoding="utf-8"))
        for path in (Path(f"{file}.bak"), Path(f"{file}.bak1"), file)
    ] == contents
    assert len(list(file.parent.iterdir())) == 3


def test_writing_the_same_split_again_makes_no_backup(tmp_path: Path) -> None:
    file = str(tmp_path / "splits_final.json")
    for _ in range(2):
        assert write_splits(make_splits(CASES, 1, None, None, True, 0), file) is None
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_file_is_kept_too(tmp_path: Path) -> None:
    file = tmp_path / "splits_final.json"
    file.write_text("[half")
    write_splits(make_splits(CASES, 1, None, None, True, 0), str(file))
    assert Path(f"{file}.bak").read_text(encoding="utf-8") == "[half"


def test_backup_never_overwrites(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for number in range(3):
        file.write_text(str(number))
        backup(str(file))
    assert [(tmp_path / f"a.json.bak{end}").read_text(encoding="utf-8") for end in ("", "1", "2")] == [
        "0",
        "1",
        "2",
    ]


# cases and classes


def test_training_cases_come_from_raw_or_else_from_the_preprocessed_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    folder = write_dataset(tmp_path, labeled=2, unlabeled=1)
    assert training_cases(folder.name) == ["lab_00", "lab_01"]
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(ValueError, match=r"Dataset777_Tiny: no cases in nnUNet_raw \(not set\)"):
        training_cases(folder.name)
    (tmp_path / "preprocessed").mkdir()
    folder.rename(tmp_path / "preprocessed" / folder.name)
    (tmp_path / "preprocessed" / folder.name / "labelsTr").rename(
        tmp_path / "preprocessed" / folder.name / "gt_segmentations"
    )
    assert training_cases(folder.name) == ["lab_00", "lab_01"]


def labels(*foreground: int) -> Any:
    return SimpleNamespace(has_regions=False, foreground_labels=list(foreground))


def locations(folder: Path, **cases: dict[Any, list[int]]) -> str:
    for case, content in cases.items():
        (folder / f"{case}.pkl").write_bytes(pickle.dumps({"class_locations": content}))
    return str(folder)


def test_a_class_without_voxels_in_any_labeled_case_is_reported(tmp_path: Path) -> None:
    folder = locations(tmp_path, a={1: [0], 2: [], 3: []}, b={1: [], 2: [0], 3: []}, c={1: [], 2: [], 3: [0]})
    assert absent_classes(folder, ["a", "b"], labels(1, 2, 3)) == [3]
    assert absent_classes(folder, ["a", "b", "c"], labels(1, 2, 3)) == []
    assert absent_classes(SimpleNamespace(source_folder=folder), ["a"], labels(1, 2, 3)) == [2, 3]


def test_an_absent_region_is_reported_as_tuple(tmp_path: Path) -> None:
    folder = locations(tmp_path, a={(1, 2): [0], 2: []})
    assert absent_classes(
        folder, ["a"], SimpleNamespace(has_regions=True, foreground_regions=[(1, 2), 2])
    ) == [2]
    assert absent_classes(
        locations(tmp_path, a={(1, 2): [], 2: [0]}),
        ["a"],
        SimpleNamespace(has_regions=True, foreground_regions=[[1, 2], 2]),
    ) == [(1, 2)]


def test_only_labeled_cases_are_opened_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    folder = locations(tmp_path, a={1: [0], 2: []})
    (tmp_path / "hidden.pkl").write_bytes(b"nothing")
    assert absent_classes(folder, ["a"], labels(1, 2)) == [2]
    with pytest.raises(ValueError, match=r"hidden\.pkl: absent or damaged"):
        absent_classes(folder, ["a", "hidden"], labels(1, 2))
