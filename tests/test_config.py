from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import typing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnssl.config import (
    WIDE,
    Axis,
    Config,
    Count,
    Distinct,
    GeneralConfig,
    OpenShare,
    Positive,
    Range,
    Share,
    build,
    constraints,
    resolve,
    words,
)
from nnssl.methods import known_methods, method_classes

METHODS: dict[str, type[Config]] = {name: cls.config_class for name, cls in method_classes().items()}
CONFIGS: dict[str, type[Config]] = {"general": GeneralConfig, **METHODS}
FIELDS = [
    pytest.param(cls, field, id=f"{section}.{field}")
    for section, cls in CONFIGS.items()
    for field in constraints(cls)
]
NOT_A_NUMBER_OF_OURS: tuple[Any, ...] = (
    math.nan,
    math.inf,
    -math.inf,
    2**70,
    -(2**70),
    10**400,
    "1",
    True,
    [],
    {},
)


@dataclass(frozen=True)
class Example(Config):
    rate: Share = 0.5
    cutoff: OpenShare = 0.5
    scale: Positive = 2.0
    steps: Count = 3
    free: float = 0.0
    whole: int = 0
    flag: bool = True
    title: str = "none"
    amp: Literal["float16", "float32"] = "float16"
    limit: Count | None = None
    fractions: tuple[Share, ...] = (0.25, 0.75)
    phases: tuple[Share, Share] = (0.5, 0.5)
    axes: Annotated[tuple[Axis, ...], Distinct()] | None = None

    def check(self) -> None:
        if self.steps > 10 and not self.flag:
            raise ValueError(f"steps must be at most 10 without flag, found {self.steps}")


@dataclass(frozen=True)
class Plain:
    """As a user may write it, without the base."""

    steps: Count
    fractions: tuple[float, ...] = ()


def test_the_schedule_is_nnunets_by_default() -> None:
    c = GeneralConfig()
    assert (c.num_epochs, c.num_iterations_per_epoch, c.num_val_iterations_per_epoch) == (1000, 250, 50)
    assert (c.save_every, c.initial_lr) == (50, 0.01)


def test_overrides_reach_trainer_and_method() -> None:
    section = {"num_epochs": 2, "seed": 0, "Example": {"steps": 2, "rate": 1}}
    general, method = resolve(section, "Example", Example, known_methods())
    assert (general.num_epochs, general.seed) == (2, 0)
    assert method == Example(steps=2, rate=1.0)


def test_sections_of_other_methods_are_left_alone() -> None:
    _, method = resolve({"DiffCL": {"no_such_key": 1}}, "Example", Example, known_methods())
    assert method == Example()


@pytest.mark.parametrize("name", ["MyMethod", "MyFixMatch", "FixMatchPlus"])
def test_sections_of_methods_of_ones_own_are_left_alone(name: str) -> None:
    _, method = resolve({name: {"a": 1}}, "Example", Example, known_methods())
    assert method == Example()
    with pytest.raises(ValueError, match=f'unknown key "{name}"'):
        resolve({name: 1}, "Example", Example, known_methods())


@pytest.mark.parametrize(
    ("name", "meant"), [("FixMach", "FixMatch"), ("fixmatch", "FixMatch"), ("Seed", "seed")]
)
def test_a_section_close_to_a_known_name_is_a_mistake(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf'unknown key "{name}"; did you mean {meant}\?'):
        resolve({name: {}}, "Example", Example, known_methods())


def test_without_a_method_there_are_only_general_keys() -> None:
    assert resolve({"seed": 3}, None, None, set()) == (GeneralConfig(seed=3), None)


def test_unknown_keys_list_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r'"nnssl" in the plans file: unknown key "epochs".*num_epochs.*DiffCL'
    ):
        resolve({"epochs": 3}, "Example", Example, known_methods())
    with pytest.raises(ValueError, match=r'unknown key "num_epoch"; did you mean num_epochs\?'):
        resolve({"num_epoch": 3}, "Example", Example, known_methods())
    with pytest.raises(ValueError, match=r'"nnssl.Example" in h: unknown key "step"; did you mean steps\?'):
        resolve({"Example": {"step": 3}}, "Example", Example, set(), "h")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rate", 1.5, "a number from 0 to 1, found 1.5"),
        ("rate", "x", "a number from 0 to 1, found 'x'"),
        ("rate", math.nan, "a number from 0 to 1, found nan"),
        ("cutoff", 0, "a number above 0 and below 1, found 0"),
        ("scale", 0.0, "a number above 0 and at most 1,000,000, found 0.0"),
        ("steps", 1.0, "a whole number from 1 to 1,000,000, found 1.0"),
        ("steps", True, "a whole number from 1 to 1,000,000, found True"),
        ("free", math.inf, "a number from -1,000,000,000,000 to 1,000,000,000,000, found inf"),
        ("whole", 2**53 + 1, f"a whole number from {-(2**53):,} to {2**53:,}, found {2**53 + 1}"),
        ("flag", 1, "true or false, found 1"),
        ("title", 1, "text, found 1"),
        ("amp", "half", "float16 or float32, found 'half'"),
        ("amp", ["float16"], "float16 or float32, found ['float16']"),
        ("limit", 0, "null or a whole number from 1 to 1,000,000, found 0"),
        ("fractions", [1, "a"], "a list of numbers from 0 to 1, found [1, 'a']"),
        ("fractions", 1, "a list of numbers from 0 to 1, found 1"),
        ("phases", [1], "a list of 2 numbers from 0 to 1, found [1]"),
        ("axes", [0, 0], "null or a list of whole numbers from 0 to 2 without repetition, found [0, 0]"),
        ("axes", [3], "null or a list of whole numbers from 0 to 2 without repetition, found [3]"),
        ("title", ["x" * 200], f"text, found ['{'x' * 75}..."),
    ],
)
def test_errors_say_where_which_key_what_is_allowed_and_what_was_found(
    key: str, value: Any, expected: str
) -> None:
    with pytest.raises(ValueError) as caught:
        build(Example, {key: value}, "[here]")
    assert str(caught.value) == f"[here]: {key} must be {expected}"
    with pytest.raises(ValueError) as caught:
        Example(**{key: value})
    assert str(caught.value) == f"{key} must be {expected}"


def test_rules_across_fields_name_their_section_too() -> None:
    with pytest.raises(ValueError, match=r"^\[here\]: steps must be at most 10 without flag, found 11$"):
        build(Example, {"steps": 11, "flag": False}, "[here]")


def test_lists_and_whole_numbers_are_converted() -> None:
    for example in (
        build(Example, {"rate": 1, "phases": [0, 1], "limit": None, "axes": [0, 2]}, "here"),
        Example(rate=1, phases=[0, 1], axes=[0, 2]),  # type: ignore[arg-type]  # lists, as JSON gives them
    ):
        assert (example.rate, example.phases, example.axes) == (1.0, (0.0, 1.0), (0, 2))
        assert isinstance(example.rate, float) and all(isinstance(p, float) for p in example.phases)


@pytest.mark.parametrize("bounds", [(low, high) for low in (False, True) for high in (False, True)])
def test_open_bounds_are_excluded_and_closed_ones_are_not(bounds: tuple[bool, bool]) -> None:
    allowed = Range(0, 1, *bounds)
    expected = {-1e-9: False, 0: not bounds[0], 0.5: True, 1: not bounds[1], 1 + 1e-9: False}
    assert {x: x in allowed for x in expected} == expected


def test_a_plain_dataclass_of_the_users_own_is_checked_as_well() -> None:
    assert build(Plain, {"steps": 1, "fractions": [1]}, "here") == Plain(steps=1, fractions=(1.0,))
    with pytest.raises(ValueError, match=r"here: steps must be a whole number from 1 .*, found 0"):
        build(Plain, {"steps": 0}, "here")


def test_keys_without_a_default_must_be_there() -> None:
    with pytest.raises(ValueError, match="here: steps missing"):
        build(Plain, {"fractions": [1]}, "here")


def test_sections_must_be_objects() -> None:
    with pytest.raises(ValueError, match="JSON object, found list"):
        resolve([], "Example", Example, set())  # type: ignore[arg-type]  # refused
    with pytest.raises(ValueError, match=r'"nnssl.Example" in .*JSON object, found int'):
        resolve({"Example": 3}, "Example", Example, set())


# all fields of all configurations


@pytest.mark.parametrize("cls", CONFIGS.values(), ids=CONFIGS)
def test_configurations_are_frozen_and_survive_a_plans_file(cls: type[Config]) -> None:
    config = cls()
    assert build(cls, json.loads(json.dumps(dataclasses.asdict(config))), "here") == config
    for field in dataclasses.fields(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, None)


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_every_number_has_a_range_of_its_own_and_refuses_all_else(cls: type[Config], field: str) -> None:
    kind, allowed = words(constraints(cls)[field])
    if "number" not in kind:
        assert kind == "true or false" or " or " in kind, "texts are a choice"
        assert not allowed
        return
    assert allowed not in map(str, WIDE.values())
    for value in NOT_A_NUMBER_OF_OURS:
        items = [value] * 3 if "list" in kind else value
        with pytest.raises(ValueError) as caught:
            build(cls, {field: items}, "[here]")
        assert str(caught.value).startswith(f"[here]: {field} must be {kind} {allowed}, found ")


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_bounds_are_kept_to_the_last_digit(cls: type[Config], field: str) -> None:
    hint = constraints(cls)[field]
    for bounds, whole in ranges(hint):
        low = bounds.low if bounds.open_low else nearest(bounds.low, whole, -1)
        high = bounds.high if bounds.open_high else nearest(bounds.high, whole, 1)
        for value in (low, high):
            with pytest.raises(ValueError, match=f"^{field} must be"):
                cls(**{field: [value] * 3 if "list" in words(hint)[0] else value})


def nearest(bound: float, whole: bool, sign: int) -> float:
    """The next number beyond a bound, above it (sign 1) or below (-1)."""
    return bound + sign if whole else math.nextafter(bound, sign * math.inf)


def ranges(hint: Any) -> Iterator[tuple[Range, bool]]:
    """Ranges of the numbers of a field, and whether they are whole; those of a list stand for its items."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated and isinstance(args[1], Range):
        yield args[1], args[0] is int
    else:
        for arg in args:
            yield from ranges(arg)


# sections at random

SHARES = re.compile("ema_decay|threshold|probability|fraction|dropout|share|sampling_start|box_edge")
WRONG = (math.nan, math.inf, -math.inf, 2**70, -(2**70), 10**400, -1, -0.5, True, False, None, "")
JUNK = st.one_of(
    st.floats(),
    st.integers(),
    st.sampled_from(WRONG),
    st.text(max_size=5),
    st.lists(st.one_of(st.floats(), st.integers(-1, 3), st.booleans()), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@st.composite
def drawn_section(draw: st.DrawFn, cls: type) -> dict[str, Any]:
    """Up to five keys with values near the default; in half of the sections also from anywhere."""
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    if not defaults:
        return draw(st.dictionaries(st.text(max_size=5), JUNK, max_size=1))
    names = st.sampled_from(sorted(defaults))
    section, wild = {}, draw(st.booleans())
    for _ in range(draw(st.integers(0, 5))):
        key = draw(st.text(max_size=8) if wild and draw(st.integers(0, 9)) == 0 else names)
        near = defaults.get(key)
        values = [JUNK if wild else st.just(near), st.just(near)]
        if isinstance(near, bool):
            values.append(st.booleans())
        elif isinstance(near, int):
            values.append(st.integers(-1, 70))
        elif isinstance(near, float):
            values += [st.floats(-0.1, 1.1), st.integers(0, 2), st.floats(near / 2, 2 * near)]
        elif isinstance(near, str):
            values.append(st.sampled_from(["float16", "bfloat16", "student", "teacher", "half"]))
        else:
            values += [st.integers(-1, 70), st.lists(st.integers(-1, 3), max_size=3)]
        section[key] = draw(st.one_of(values))
    return section


def assert_sensible(config: Config, section: dict[str, Any]) -> None:
    """What holds for every accepted configuration, without a look at the constraints."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in section:
            given_value = section[field.name]
            assert value == (tuple(given_value) if isinstance(given_value, list) else given_value), field.name
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(field.default, bool):
                assert isinstance(number, bool), field.name
            elif number is None:
                assert field.default is None, field.name
            elif isinstance(number, str):
                assert isinstance(field.default, str) or number == "auto", field.name
            elif isinstance(number, bool):
                assert field.name == "agreement"
            else:
                assert type(number) in (int, float), field.name
                assert math.isfinite(number) and 0 <= number < 2**32, field.name
                assert isinstance(number, float) == isinstance(field.default, (float, tuple)), field.name
                assert number <= 1 or not SHARES.search(field.name), field.name
                assert number > 0 or "temperature" not in field.name, field.name


def fuzz(examples: int) -> Counter[str]:
    """How many drawn sections were accepted and how many refused."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def draw_and_check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(METHODS)))
        own = data.draw(drawn_section(METHODS[name]) if data.draw(st.integers(0, 9)) else JUNK)
        top = data.draw(drawn_section(GeneralConfig))
        section = {**top, name: own} if data.draw(st.booleans()) else top
        try:
            general, method = resolve(section, name, METHODS[name], known_methods())
        except ValueError as error:
            assert str(error).startswith(('"nnssl" in the plans file', f'"nnssl.{name}" in the plans file'))
            seen["refused"] += 1
            return
        seen["accepted"] += 1
        assert method is not None
        assert_sensible(general, section)
        assert_sensible(method, section.get(name, {}))
        again = json.loads(json.dumps({**dataclasses.asdict(general), name: dataclasses.asdict(method)}))
        assert resolve(again, name, METHODS[name], known_methods()) == (general, method)

    draw_and_check()
    return seen


def test_drawn_sections_are_refused_with_our_error_or_make_sense() -> None:
    seen = fuzz(500)
    assert min(seen["accepted"], seen["refused"]) >= 50


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_many_drawn_sections_are_refused_with_our_error_or_make_sense() -> None:
    seen = fuzz(20_000)
    print(f"\nsections drawn: {seen}", file=sys.stderr)
    assert seen.total() >= 20_000 and min(seen["accepted"], seen["refused"]) >= 2_000
