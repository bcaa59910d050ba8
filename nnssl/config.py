"""Configuration: frozen dataclasses, overridden by the key `nnssl` of a plans file.

    {"nnssl": {"num_epochs": 100, "seed": 0, "DiffCL": {"ddim_steps": 2}}}

General keys stand at the top, those of a method under its name. Sections of other methods are accepted and
left alone (one plans file serves several trainers); any other unknown key, and any wrong type, is an error
that lists what is valid.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class GeneralConfig:
    """Settings of the trainer itself; None leaves nnU-Net's own value."""

    num_epochs: int = 1000  # nnU-Net
    num_iterations_per_epoch: int = 250  # nnU-Net
    num_val_iterations_per_epoch: int = 50  # nnU-Net
    save_every: int = 50  # epochs between checkpoint_latest.pth, nnU-Net
    initial_lr: float = 1e-2  # nnU-Net
    seed: int | None = None  # seeds python, numpy and torch; None: unseeded like nnU-Net
    unlabeled_batch_size: int | None = None  # over all GPUs; None: the labeled batch size of the plan
    mirror_axes: tuple[int, ...] | None = (
        None  # array axes that may be mirrored, in training and prediction; []: none; None: nnU-Net, all
    )
    amp: str = "float16"  # float16 (nnU-Net; on CUDA only), bfloat16 (on CPU too) or float32
    channels_last: bool = (
        False  # networks and features in PyTorch's channels_last formats; faster on CPU below 16 features
    )
    deploy: str = (
        "student"  # which network becomes the model: student, or teacher (methods with an averaged one)
    )
    max_nonfinite_steps: int = 25  # so many steps in a row with a non-finite loss stop the run

    def __post_init__(self) -> None:
        for name in (
            "num_epochs",
            "num_iterations_per_epoch",
            "num_val_iterations_per_epoch",
            "save_every",
            "max_nonfinite_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.unlabeled_batch_size is not None and self.unlabeled_batch_size < 1:
            raise ValueError(
                f"unlabeled_batch_size must be at least 1 or null, found {self.unlabeled_batch_size}"
            )
        if self.mirror_axes is not None and (
            len(set(self.mirror_axes)) < len(self.mirror_axes) or not set(self.mirror_axes) <= {0, 1, 2}
        ):
            raise ValueError(
                f"mirror_axes must be different axes out of 0, 1, 2 (in the order of the patch), found "
                f"{self.mirror_axes}"
            )
        if self.initial_lr <= 0:
            raise ValueError(f"initial_lr must be positive, found {self.initial_lr}")
        if self.amp not in ("float16", "bfloat16", "float32"):
            raise ValueError(f"amp must be float16, bfloat16 or float32, found {self.amp!r}")
        if self.deploy not in ("student", "teacher"):
            raise ValueError(f"deploy must be student or teacher, found {self.deploy!r}")


def resolve(
    overrides: Mapping[str, Any], method: str | None, method_config: type[T] | None, known_methods: set[str]
) -> tuple[GeneralConfig, T | None]:
    """General and method configuration from the `nnssl` section of a plans file.

    Args:
        overrides: the section, possibly empty.
        method: name of the method's section (`DiffCL`), None for the supervised trainer.
        method_config: its dataclass.
        known_methods: names of all methods, whose sections are allowed.
    """
    if not isinstance(overrides, Mapping):
        raise ValueError(f'"nnssl" in the plans file must be a JSON object, found {type(overrides).__name__}')
    known = known_methods | ({method} if method else set())  # a method of the user's own is in no list
    sections = {k: v for k, v in overrides.items() if k in known}
    general = build(
        GeneralConfig, {k: v for k, v in overrides.items() if k not in sections}, "nnssl", also=sorted(known)
    )
    if method is None or method_config is None:
        return general, None
    return general, build(method_config, sections.get(method, {}), f"nnssl.{method}")


def build(cls: type[T], values: Mapping[str, Any], where: str, also: list[str] | None = None) -> T:
    """`cls(**values)` with every key and type checked; ValueError names the key and lists the valid ones."""
    if not isinstance(values, Mapping):
        raise ValueError(f'"{where}" in the plans file must be a JSON object, found {type(values).__name__}')
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    valid = ", ".join(f"{n}: {_type_name(hints[n])}" for n in fields)
    checked = {}
    for key, value in values.items():
        if key not in fields:
            sections = f"; sections of methods: {', '.join(also)}" if also else ""
            raise ValueError(
                f'unknown key "{key}" in "{where}" of the plans file; valid keys are {valid}{sections}'
            )
        checked[key] = _convert(value, hints[key], f"{where}.{key}", valid)
    try:
        return cls(**checked)
    except ValueError as error:
        raise ValueError(f'"{where}" of the plans file: {error}') from error


def _convert(value: Any, hint: Any, where: str, valid: str) -> Any:
    if _matches(value, hint):
        if hint is float:
            return float(value)
        if isinstance(value, list):  # a tuple, or one that may be null
            options = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
            item = next(typing.get_args(o)[0] for o in options if typing.get_origin(o) is tuple)
            return tuple(float(v) if item is float else v for v in value)
        return value
    raise ValueError(
        f'"{where}" of the plans file must be {_type_name(hint)}, found {value!r} ({type(value).__name__}); '
        f"valid keys are {valid}"
    )


def _matches(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, a) for a in args)
    if origin is tuple:  # tuple[x, ...] from a JSON list
        return isinstance(value, (list, tuple)) and all(_matches(v, args[0]) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is None and isinstance(hint, type):
        return hint.__name__
    return str(hint).replace("NoneType", "null").replace("None", "null")
