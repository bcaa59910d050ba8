from __future__ import annotations

from dataclasses import dataclass

import pytest

from nnssl.config import GeneralConfig, build, resolve
from nnssl.methods.diffcl import DiffCLConfig

KNOWN = {"DiffCL", "Supervised"}


@dataclass(frozen=True)
class Example:
    rate: float = 0.5
    steps: int = 3
    fractions: tuple[float, ...] = (0.25, 0.75)
    flag: bool = True
    limit: int | None = None
    axes: tuple[int, ...] | None = None


def test_defaults_are_nnunets() -> None:
    general, _ = resolve({}, "DiffCL", DiffCLConfig, KNOWN)
    assert (
        general.num_epochs,
        general.num_iterations_per_epoch,
        general.num_val_iterations_per_epoch,
        general.initial_lr,
    ) == (
        1000,
        250,
        50,
        0.01,
    )


def test_overrides_reach_trainer_and_method() -> None:
    general, method = resolve(
        {"num_epochs": 2, "seed": 0, "DiffCL": {"ddim_steps": 2, "temperature": 1}},
        "DiffCL",
        DiffCLConfig,
        KNOWN,
    )
    assert (general.num_epochs, general.seed) == (2, 0)
    assert (
        method is not None
        and method.ddim_steps == 2
        and method.temperature == 1.0
        and isinstance(method.temperature, float)
    )


def test_sections_of_other_methods_are_left_alone() -> None:
    _, method = resolve({"DiffCL": {"no_such_key": 1}}, "Supervised", Example, KNOWN)
    assert method == Example()


def test_a_method_of_the_users_own_has_a_section_too() -> None:
    _, method = resolve({"Mine": {"ddim_steps": 3}}, "Mine", DiffCLConfig, KNOWN)
    assert method == DiffCLConfig(ddim_steps=3)


def test_unknown_keys_list_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r'unknown key "epochs".*num_epochs: int.*DiffCL, Supervised'):
        resolve({"epochs": 3}, "DiffCL", DiffCLConfig, KNOWN)
    with pytest.raises(ValueError, match=r'unknown key "ddim" in "nnssl.DiffCL".*ddim_steps: int'):
        resolve({"DiffCL": {"ddim": 3}}, "DiffCL", DiffCLConfig, KNOWN)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 1.5),
        ("steps", True),
        ("steps", "3"),
        ("rate", "x"),
        ("fractions", [1, "a"]),
        ("flag", 1),
        ("limit", 0.5),
        ("axes", 1),
    ],
)
def test_wrong_types_are_errors_that_say_what_was_found(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"where.{key}.*found.*valid keys are rate: float"):
        build(Example, {key: value}, "where")


def test_right_types_are_converted() -> None:
    example = build(Example, {"rate": 1, "fractions": [1, 2.5], "limit": None, "axes": [0, 2]}, "where")
    assert example == Example(rate=1.0, fractions=(1.0, 2.5), axes=(0, 2))
    assert isinstance(example.rate, float) and all(isinstance(f, float) for f in example.fractions)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_epochs", 0),
        ("initial_lr", 0.0),
        ("amp", "half"),
        ("deploy", "both"),
        ("mirror_axes", [3]),
        ("mirror_axes", [1, 1]),
        ("unlabeled_batch_size", 0),
        ("save_every", -1),
    ],
)
def test_impossible_values_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf'"nnssl" of the plans file: {key} must be'):
        resolve({key: value}, "DiffCL", DiffCLConfig, KNOWN)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ddim_steps", 2000),
        ("bank_per_step", 5000),
        ("temperature", 0.0),
        ("channel_dropout", 1.5),
        ("embedding", 0),
    ],
)
def test_impossible_values_of_the_method_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf'"nnssl.DiffCL" of the plans file: {key} must'):
        resolve({"DiffCL": {key: value}}, "DiffCL", DiffCLConfig, KNOWN)


def test_sections_must_be_objects() -> None:
    with pytest.raises(ValueError, match="JSON object, found list"):
        resolve([], "DiffCL", DiffCLConfig, KNOWN)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"nnssl.DiffCL.*JSON object, found int"):
        resolve({"DiffCL": 3}, "DiffCL", DiffCLConfig, KNOWN)


def test_general_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        GeneralConfig().seed = 3  # type: ignore[misc]
