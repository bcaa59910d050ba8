from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.leaderboard.suite import FOLDER, SuiteError, load_suite
from nnssl.commands.trainers import list_trainers, trainers_folder

GOOD = """
title = "t"
dataset = "Dataset900_Phantoms"
configuration = "3d_fullres"
validation = 2
budgets = [1, 2]
seeds = [0, 1]
methods = ["supervised", "supervised_all", "self_training", "nnUNetTrainerDiffCL", "ours"]

[plan]
spacing = [2.5, 2.5, 2.5]

[schedule]
num_epochs = 4
num_iterations_per_epoch = 3

[method.nnUNetTrainerDiffCL]
seeds = [7]
budgets = [2]
options = { ddim_steps = 2 }

[method.ours]
trainer = "nnUNetTrainerDiffCL"
schedule = { initial_lr = 0.1 }
"""


def write(folder: Path, text: str) -> str:
    (folder / "one.toml").write_text(text, encoding="utf-8")
    return str(folder / "one.toml")


def test_a_suite_asks_for_every_method_budget_and_seed(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path, GOOD))
    names = [row.name for row in suite.rows()]
    assert suite.name == "one"
    assert names[:6] == ["supervised_n1_s0", "supervised_n1_s1", "supervised_n2_s0", "supervised_n2_s1"] + [
        f"supervised_all_all_s{seed}" for seed in (0, 1)
    ]
    assert "DiffCL_n2_s7" in names
    assert len(set(names)) == len(names) == 4 + 2 + 4 + 1 + 4


def test_rows_carry_fold_trainer_and_their_own_settings(tmp_path: Path) -> None:
    rows = {row.name: row for row in load_suite(write(tmp_path, GOOD)).rows()}
    assert [rows[n].fold for n in ("supervised_n1_s0", "supervised_n2_s0", "supervised_all_all_s0")] == [
        0,
        1,
        2,
    ]
    assert (
        rows["self_training_n1_s0"].trainer == rows["supervised_n1_s0"].trainer == "nnUNetTrainerSupervised"
    )
    assert rows["DiffCL_n2_s7"].settings == {
        "num_epochs": 4,
        "num_iterations_per_epoch": 3,
        "seed": 7,
        "DiffCL": {"ddim_steps": 2},
    }
    assert rows["ours_n1_s1"].trainer == "nnUNetTrainerDiffCL"
    assert rows["ours_n1_s1"].settings["initial_lr"] == 0.1


def test_self_training_may_have_a_second_row_of_its_own_schedule(tmp_path: Path) -> None:
    text = GOOD.replace('"self_training"', '"self_training", "self-training, longer"')
    text += '\n[method."self-training, longer"]\ntrainer = "self_training"\nschedule = { num_epochs = 8 }\n'
    rows = {row.name: row for row in load_suite(write(tmp_path, text)).rows()}
    once, twice = rows["self_training_n1_s0"], rows["self-training-longer_n1_s0"]
    assert (
        (twice.kind, twice.trainer)
        == (once.kind, once.trainer)
        == ("self_training", "nnUNetTrainerSupervised")
    )
    assert twice.settings["num_epochs"] == 2 * once.settings["num_epochs"]


def test_seeds_by_budget_leave_the_other_budgets_at_the_seeds_of_the_suite(tmp_path: Path) -> None:
    text = GOOD.replace("seeds = [7]\nbudgets = [2]", "seeds = { 2 = [7, 8, 9] }")
    assert text != GOOD
    names = {row.name for row in load_suite(write(tmp_path, text)).rows() if row.method == "DiffCL"}
    assert names == {"DiffCL_n1_s0", "DiffCL_n1_s1", "DiffCL_n2_s7", "DiffCL_n2_s8", "DiffCL_n2_s9"}


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ('title = "t"', 'title = "other"', False),
        ("budgets = [1, 2]", "budgets = [2, 1]", False),
        ("num_epochs = 4", "num_epochs = 4\nterm_gradients = 20", False),
        ("num_epochs = 4", "num_epochs = 5", True),
        ("num_epochs = 4", "num_epochs = 4\nchannels_last = true", True),
        ("spacing = [2.5", "spacing = [3.5", True),
        ("validation = 2", "validation = 3", True),
        ("validation = 2", 'validation = 2\ncases = ["a", "b"]', True),
    ],
)
def test_fingerprints_change_with_what_decides_numbers_and_with_nothing_else(
    tmp_path: Path, old: str, new: str, changes: bool
) -> None:
    before, after = (
        {r.name: r.fingerprint for r in load_suite(write(tmp_path, t)).rows()}
        for t in (GOOD, GOOD.replace(old, new))
    )
    assert before.keys() == after.keys()
    assert [before[n] != after[n] for n in before] == [changes] * len(before)


def test_options_of_one_method_leave_the_fingerprints_of_the_others(tmp_path: Path) -> None:
    texts = (GOOD, GOOD.replace("ddim_steps = 2", "ddim_steps = 4"))
    before, after = (
        {r.name: r.fingerprint for r in load_suite(write(tmp_path, text)).rows()} for text in texts
    )
    assert {n for n in before if before[n] != after[n]} == {"DiffCL_n2_s7"}


STARTING = GOOD + 'start = "supervised"\n'


def test_a_row_may_start_from_the_network_of_another_of_its_budget_and_seed(tmp_path: Path) -> None:
    rows = {r.name: r for r in load_suite(write(tmp_path, STARTING)).rows()}
    assert {n: r.start for n, r in rows.items() if r.start} == {
        f"ours_n{n}_s{s}": f"supervised_n{n}_s{s}" for n in (1, 2) for s in (0, 1)
    }
    other = STARTING.replace(
        "[method.ours]", "[method.supervised]\nschedule = { initial_lr = 0.02 }\n[method.ours]"
    )
    changed = {r.name: r.fingerprint for r in load_suite(write(tmp_path, other)).rows()}
    assert {r.method for n, r in rows.items() if r.fingerprint != changed[n]} == {"supervised", "ours"}


@pytest.mark.parametrize("source", ["nnUNetTrainerDiffCL", "supervised_all", "self_training", "ours", "none"])
def test_a_start_from_what_is_no_single_training_of_that_budget_and_seed_is_refused(
    tmp_path: Path, source: str
) -> None:
    with pytest.raises(SuiteError, match=r"start: row ours_n1_s0 would start from \w+_n1_s0, which is not"):
        load_suite(write(tmp_path, STARTING.replace('"supervised"\n', f'"{source}"\n')))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "t"', "", "title missing"),
        ('title = "t"', 'titel = "t"', "unknown key 'titel'|title missing"),
        (
            "validation = 2",
            'validation = 2\ncolour = "red"',
            "unknown key 'colour'; valid keys are title, dataset",
        ),
        ("budgets = [1, 2]", "budgets = [1, 1]", "budgets: expected different whole numbers from 1"),
        ("budgets = [1, 2]", "budgets = []", "budgets: expected different whole numbers"),
        ("budgets = [1, 2]", 'budgets = [1, 2]\ncases = ["b", "a"]', "cases must be the first and the last"),
        ("budgets = [1, 2]", 'budgets = [1, 2]\ncases = ["a"]', "cases must be the first and the last"),
        ("seeds = [0, 1]\nm", "seeds = [-1]\nm", "seeds: expected different whole numbers from 0"),
        ("Dataset900_Phantoms", "Phantoms", "dataset must be named like"),
        ("validation = 2", 'validation = 2\ndevice = "tpu"', "device must be cpu or cuda"),
        ("num_epochs = 4", "epochs = 4", 'unknown key "epochs"'),
        ("num_epochs = 4", 'num_epochs = "4"', r"\[schedule\]: num_epochs must be a whole number"),
        ("num_epochs = 4\n", "", "num_epochs missing"),
        ("num_epochs = 4", "num_epochs = 1", "self-training halves it"),
        (
            "[method.ours]",
            "[method.self_training]\nschedule = { num_epochs = 1 }\n[method.ours]",
            "self-training halves it",
        ),
        ("num_epochs = 4", "num_epochs = 4\nseed = 1", "use the list `seeds`"),
        ("spacing = [2.5", "spacings = [2.5", 'unknown key "spacings"; did you mean spacing'),
        ("spacing = [2.5", "spacing = [0.0", r"\[plan\]: spacing must be .* numbers above 0"),
        ("ddim_steps = 2", "ddim_steps = 0", r"\[method.nnUNetTrainerDiffCL\] options: ddim_steps must be"),
        (
            "[schedule]",
            '[[published]]\nmethod = "supervised"\ndice = 86.0\n[schedule]',
            r"\[\[published\]\]: labeled, source missing",
        ),
        ('trainer = "nnUNetTrainerDiffCL"', "", "'ours' is neither supervised"),
        ("[method.ours]", "[method.yours]", "method.yours. is not in methods"),
        ("budgets = [2]", "budgets = [3]", "not in budgets"),
        ("seeds = [7]", "seeds = 7", "seeds must be list or dict, found 7"),
        (
            "seeds = [7]",
            "seeds = { 2 = 7 }",
            r"\[method.nnUNetTrainerDiffCL\] seeds: expected different whole numbers",
        ),
        (
            "seeds = [7]",
            "seeds = { 2 = [] }",
            r"\[method.nnUNetTrainerDiffCL\] seeds: expected different whole numbers",
        ),
        ("seeds = [7]", "seeds = { 1 = [7] }", r"seeds: \['1'\] not in budgets = \[2\]"),
        (
            "[method.ours]",
            "[method.supervised_all]\nseeds = { 2 = [0] }\n[method.ours]",
            "expected a list, this row has no budget",
        ),
        (
            '"ours"]',
            '"ours", "DiffCL"]\n[method.DiffCL]\ntrainer = "nnUNetTrainerDiffCL"\nseeds = [7]',
            "DiffCL_n2_s7; rename one",
        ),
        ("num_epochs = 4", "num_epochs = = 4", r"one\.toml.*line"),
        ('"ours"]', '["ours"]]', "methods must be a list of different names"),
        ("budgets = [2]", "budgets = [[2]]", "budgets: expected different whole numbers"),
        ("validation = 2", "validation = [2]", "validation must be a number or a list of names"),
        ("[schedule]", "[environment]\nx = 1\n[schedule]", "must hold texts"),
    ],
)
def test_a_bad_suite_is_refused_with_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(SuiteError, match=message) as caught:
        load_suite(write(tmp_path, GOOD.replace(old, new)))
    assert "one.toml" in str(caught.value)


def test_a_method_that_is_no_table_is_refused(tmp_path: Path) -> None:
    text = (
        GOOD.split("[plan]")[0]
        + "[schedule]\nnum_epochs = 4\nnum_iterations_per_epoch = 3\n[method]\nours = 3\n"
    )
    with pytest.raises(SuiteError, match=r"\[method.ours\] must be a table, found 3"):
        load_suite(write(tmp_path, text))


def test_an_unknown_suite_lists_those_there_are() -> None:
    with pytest.raises(
        SuiteError,
        match=r"nothing\.toml does not exist. Suites here: acdc_cpu, .*hippocampus_cpu, .*la_cpu, .*smoke",
    ):
        load_suite("nothing")


@pytest.mark.parametrize("path", sorted((FOLDER / "suites").glob("*.toml")), ids=lambda p: p.stem)
def test_every_suite_of_the_repository_is_sound(path: Path) -> None:
    suite = load_suite(path.stem)
    assert {row.trainer for row in suite.rows()} <= set(list_trainers(trainers_folder()))
    assert {entry["method"] for entry in suite.published} <= set(suite.methods)
