from __future__ import annotations

import ast
import pickle
from typing import Any

import pytest
import torch

from nnssl.config import resolve
from nnssl.errors import mark, told_line
from nnssl.files import read_json
from nnssl.training.lookup import dataset_name


def caught(function: object, *arguments: object) -> Exception:
    with pytest.raises(Exception) as info:
        function(*arguments)  # type: ignore[operator]
    return info.value


def test_what_this_library_raises_is_told() -> None:
    error = caught(resolve, {"num_epoch": 3}, None, None, set())
    assert told_line(error) == str(error)


def test_a_file_that_cannot_be_opened_is_told() -> None:
    assert "no/such/file.json" in str(told_line(caught(read_json, "no/such/file.json")))


def test_what_nnunet_raises_is_told_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

    error = caught(convert_id_to_dataset_name, 999)
    assert "\n" in str(error) and "\n" not in str(told_line(error))


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (ast.literal_eval, ["("]),  # of another package
        (dataset_name, [None, None]),  # TypeError
        (lambda: (_ for _ in ()).throw(ValueError("raised in a test")), []),
        (lambda: [].pop(), []),
    ],
)
def test_bugs_are_not_told(function: object, arguments: list[object]) -> None:
    assert told_line(caught(function, *arguments)) is None


def test_a_value_error_of_our_own_code_that_nobody_raised_is_a_bug() -> None:
    names: dict[str, Any] = {"__name__": "nnssl.somewhere"}
    exec("def raised():\n raise ValueError('on purpose')\ndef slipped():\n a, b = 'c'", names)
    assert told_line(caught(names["raised"])) == "on purpose"
    assert told_line(caught(names["slipped"])) is None


def test_out_of_memory_is_told_with_the_remedy() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")
    assert str(told_line(error)).startswith("CUDA out of memory. Tried to allocate 2 GiB. Lower batch_size")


def test_a_worker_keeps_the_mark_of_its_error() -> None:
    told, bug = caught(read_json, "no/such/file.json"), caught([].pop)
    for error in (told, bug):
        mark(error)
    sent = pickle.loads(pickle.dumps(told)).with_traceback(None)
    assert told_line(sent) and told_line(pickle.loads(pickle.dumps(bug))) is None
