"""Configuration: frozen dataclasses whose constraints stand at the fields, set by the key `nnssl` of a plans
file.

    {"nnssl": {"num_epochs": 100, "seed": 0, "DiffCL": {"ddim_steps": 2}}}

General keys stand at the top, those of a method under its name. Sections of other methods are left alone,
those of a user's own too: one plans file serves several trainers. A method declares its keys like this:

    @dataclass(frozen=True)
    class DiffCLConfig(Config):
        ema_decay: Share = 0.99  # alpha: meaning (source)
        phases: tuple[Share, Share] = (0.5, 0.5)  # ...

        def check(self) -> None:  # only rules across fields
            ...

The comment at a field is its line in docs/reference/configuration.md (docs/generate_reference.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Constraint on a number: between two bounds, which belong to the range unless they are open."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:  # false for NaN
        above = number > self.low if self.open_low else number >= self.low
        return above and (number < self.high if self.open_high else number <= self.high)

    def __str__(self) -> str:
        if not self.open_low and not self.open_high:
            return f"from {self.low:,} to {self.high:,}"
        low = "above" if self.open_low else "at least"
        return f"{low} {self.low:,} and {'below' if self.open_high else 'at most'} {self.high:,}"


@dataclass(frozen=True)
class Distinct:
    """Constraint on a list: no item twice."""

    def __contains__(self, items: tuple[Any, ...]) -> bool:
        return len(set(items)) == len(items)

    def __str__(self) -> str:
        return "without repetition"


Positive = Annotated[float, Range(0, 1_000_000, open_low=True)]
NonNegative = Annotated[float, Range(0, 1_000_000)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, open_low=True)]
OpenShare = Annotated[float, Range(0, 1, open_low=True, open_high=True)]
Temperature = Annotated[float, Range(0.001, 1_000)]
LearningRate = Annotated[float, Range(1e-8, 1)]
Count = Annotated[int, Range(1, 1_000_000)]
Width = Annotated[int, Range(1, 4096)]  # channels of a layer
Few = Annotated[int, Range(1, 64)]  # heads, windows, passes
Voxels = Annotated[int, Range(1, 1_000_000_000)]
Ratio = Annotated[float, Range(0.1, 16)]  # hidden width of an MLP over its input's
Seed = Annotated[int, Range(0, 2**32 - 1)]  # what NumPy takes
Axis = Annotated[int, Range(0, 2)]

# for numbers without a range of their own
WIDE: dict[Any, Range] = {int: Range(-(2**53), 2**53), float: Range(-(10**12), 10**12)}


@dataclass(frozen=True)
class Config:
    """Base of all configurations: every value must have the type and meet the constraints of its field."""

    def __post_init__(self) -> None:
        validate(self)
        self.check()

    def check(self) -> None:
        """Rules across fields; raises ValueError. Every field is valid by itself already."""


@dataclass(frozen=True)
class GeneralConfig(Config):
    """Settings of the trainer itself."""

    num_epochs: Count = 1000  # epochs (nnU-Net)
    num_iterations_per_epoch: Count = 250  # training steps per epoch (nnU-Net)
    num_val_iterations_per_epoch: Count = 50  # validation steps per epoch (nnU-Net)
    save_every: Count = 50  # epochs between two writes of checkpoint_latest.pth (nnU-Net)
    initial_lr: LearningRate = 1e-2  # learning rate at the start of the polynomial decay (nnU-Net)
    seed: Seed | None = None  # seed of Python, NumPy and PyTorch; null: unseeded (nnU-Net)
    # unlabeled patches per step, over all GPUs; null: as many as labeled ones
    unlabeled_batch_size: Annotated[int, Range(1, 4096)] | None = None
    # array axes that may be mirrored, in training and prediction; []: none; null: all (nnU-Net); auto: those
    # along which no class would take another's place in the labels
    mirror_axes: Literal["auto"] | Annotated[tuple[Axis, ...], Distinct()] | None = None
    # precision of the forward pass: float16 (on CUDA only; nnU-Net), bfloat16 (on a CPU, too) or float32
    amp: Literal["float16", "bfloat16", "float32"] = "float16"
    # networks whose stages compute their activations again in the backward pass instead of keeping them: less
    # memory, more time, the same losses; second: those that train beside the student
    gradient_checkpointing: Literal["none", "second", "all"] = "none"
    # networks and features in PyTorch's channels_last format; faster on a CPU with fewer than 16 features
    channels_last: bool = False
    # network that becomes the model; teacher: only with methods that average one
    deploy: Literal["student", "teacher"] = "student"
    # whether unlabeled terms count as far as their gradients agree with the labels'; null: the method's own
    agreement: bool | None = None
    max_nonfinite_steps: Count = 25  # steps in a row with a non-finite loss before the run stops (ours)
    # steps, spread evenly over the training, in which the gradient of every weighted term on the student is
    # measured, a backward pass each (`gradient/...` in losses.csv); 0: none
    term_gradients: Annotated[int, Range(0, 1_000_000)] = 0
    # how often, spread evenly over the training, pseudo-labels of a few unlabeled scans are saved for `nnssl
    # report`; less often where that would cost more than 0.3 % of the passes; 0: never (ours)
    pseudo_label_pictures: Annotated[int, Range(0, 1000)] = 10


def resolve(
    overrides: Mapping[str, Any],
    method: str | None,
    method_config: type[T] | None,
    known_methods: set[str],
    source: str = "the plans file",
) -> tuple[GeneralConfig, T | None]:
    """General and method configuration from the `nnssl` section of a plans file.

    Args:
        overrides: the section, possibly empty.
        method: name of the method's section (`DiffCL`), None for the general keys alone.
        method_config: its dataclass.
        known_methods: names of all methods, whose sections are allowed.
        source: where the section comes from, for errors.
    """
    if not isinstance(overrides, Mapping):
        raise ValueError(f'"nnssl" in {source} must be a JSON object, found {type(overrides).__name__}')
    known = known_methods | ({method} if method else set())  # a method of the user's own is in no list
    foreign = sections_of_others(overrides, known)
    sections = {k: v for k, v in overrides.items() if k in known or k in foreign}
    general = {k: v for k, v in overrides.items() if k not in sections}
    config = build(GeneralConfig, general, f'"nnssl" in {source}', also=sorted(known))
    if method is None or method_config is None:
        return config, None
    return config, build(method_config, sections.get(method, {}), f'"nnssl.{method}" in {source}')


def sections_of_others(overrides: Mapping[str, Any], known_methods: set[str]) -> list[str]:
    """Sections of an unknown name, which a method of the user's own may have. One close to a known name is a
    mistake, unless it contains that name (`MyFixMatch`)."""
    known = {name.lower(): name for name in (*known_methods, *constraints(GeneralConfig))}
    found = []
    for key, value in overrides.items():
        if isinstance(value, dict) and key not in known.values():
            small = key.lower()
            near = difflib.get_close_matches(small, known, 1, 0.75)
            if not near or (near[0] in small and near[0] != small):
                found.append(key)
    return found


def build(cls: type[T], values: Mapping[str, Any], where: str, also: list[str] | None = None) -> T:
    """`cls(**values)`; ValueError says where, names the key and what is valid.

    Args:
        cls: a subclass of `Config`, or any dataclass.
        values: from JSON or TOML: lists stand for tuples, whole numbers for floats.
        where: the section, for errors.
        also: names of sections that may stand beside the keys, for errors.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a JSON object, found {type(values).__name__}")
    valid = constraints(cls)
    for key in values:
        if key not in valid:
            names = {name.lower(): name for name in (*valid, *(also or ()))}
            near = difflib.get_close_matches(str(key).lower(), names, 1)
            raise ValueError(
                f'{where}: unknown key "{key}"{f"; did you mean {names[near[0]]}?" if near else "."} '
                f"Valid keys are {', '.join(valid) or 'none'}"
                + (f"; sections of methods: {', '.join(also)}" if also else "")
            )
    if missing := [name for name in _required(cls) if name not in values]:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    try:
        config = cls(**values)
        if not isinstance(config, Config):
            validate(config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return config


def validate(config: Any) -> None:
    """Check every field of a dataclass against its annotation, and convert it: lists to tuples, whole numbers
    to floats."""
    for name, hint in constraints(type(config)).items():
        value = getattr(config, name)
        try:
            object.__setattr__(config, name, _read(value, hint))
        except _UnfitError:
            found = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
            raise ValueError(f"{name} must be {describe(hint)}, found {found}") from None


def constraints(cls: type) -> dict[str, Any]:
    """Annotations of the fields of a dataclass, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _required(cls: type) -> list[str]:
    """Fields without a default."""
    absent = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is absent and f.default_factory is absent]


def describe(hint: Any) -> str:
    """What a field takes, as words: `a number from 0 to 1`."""
    kind, allowed = words(hint)
    return f"{kind} {allowed}".strip()


def words(hint: Any, many: bool = False) -> tuple[str, str]:
    """Kind of value and range that a field takes: (`a number`, `from 0 to 1`)."""
    hint, rules = _unwrap(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    allowed = " ".join(map(str, rules))
    if origin in (types.UnionType, typing.Union):
        options = [words(a) for a in args if a is not type(None)]
        null = ["null"] if type(None) in args else []
        return " or ".join([*null, *(kind for kind, _ in options)]), ", ".join(r for _, r in options if r)
    if origin is tuple:
        number = "" if args[-1] is Ellipsis else f"{len(args)} "
        kind, each = words(args[0], many=True)
        return f"a list of {number}{kind}", " ".join(filter(None, (each, allowed)))
    if origin is Literal:
        return " or ".join(filter(None, (", ".join(args[:-1]), args[-1]))), allowed
    singular = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    plural = {int: "whole numbers", float: "numbers", str: "texts"}
    return (plural if many else singular)[hint], allowed


class _UnfitError(Exception):
    """A value that its field does not take."""


def _read(value: Any, hint: Any) -> Any:
    """`value` in the type of its field."""
    hint, rules = _unwrap(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in args:
            try:
                return _read(value, option)
            except _UnfitError:
                continue
        raise _UnfitError
    if origin is tuple:
        items = args[:1] * len(value) if args[-1] is Ellipsis and isinstance(value, (list, tuple)) else args
        fits = isinstance(value, (list, tuple)) and len(items) == len(value)
        value = tuple(map(_read, value, items)) if fits else value
    elif origin is Literal:
        fits = isinstance(value, str) and value in args
    elif hint in WIDE:
        fits = isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, hint)
    if not fits or not all(value in rule for rule in rules):
        raise _UnfitError
    return float(value) if hint is float else value


def _unwrap(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Type and constraints of a field."""
    if typing.get_origin(hint) is Annotated:
        inner, *rules = typing.get_args(hint)
        return inner, tuple(rules)
    return hint, (WIDE[hint],) if hint in WIDE else ()
