"""Messages name things on one printable line, however long or odd they are."""

from __future__ import annotations

import pytest

from dmax.errors import NAME_LIMIT, InputError, did_you_mean, shorten, show


def test_a_short_name_stays_as_it_is() -> None:
    assert shorten("tiny-dmax é 数") == "tiny-dmax é 数"


def test_a_long_name_is_cut() -> None:
    name = shorten("x" * 10**7)
    assert len(name) == NAME_LIMIT
    assert name.endswith("…")


def test_a_name_of_the_limit_is_whole() -> None:
    assert shorten("x" * NAME_LIMIT) == "x" * NAME_LIMIT


def test_a_name_stays_on_its_line() -> None:
    assert shorten("a\nb\x1b[2Jc\udc80\x00") == "a\\nb\\x1b[2Jc\\udc80\\x00"


def _nested(depth: int) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [10**400, -(10**5000), "x" * 10**7, b"x" * 10**7, list(range(10**6)), _nested(100_000)],
    ids=["400 digits", "5000 digits", "text", "bytes", "list", "nested"],
)
def test_a_value_of_any_size_is_shown_shortly(value: object) -> None:
    assert 0 < len(show(value)) <= NAME_LIMIT


def test_plain_values_are_shown_as_python_writes_them() -> None:
    for value in (3, 0, -1, 0.5, float("nan"), None, True, "a", [1, 2], {"a": 1}):
        assert show(value) == repr(value)


def test_a_huge_number_is_shown_by_its_digits() -> None:
    assert show(10**5000) == "a number of 5001 digits"


def test_what_an_error_says_is_printable_whatever_it_names() -> None:
    error = InputError("no `a\nb\x1b[2J`", hint="not \udcff")
    assert str(error) == "no `a\\nb\\x1b[2J`\n\nhint: not \\udcff"
    assert InputError("a").hint is None


@pytest.mark.parametrize("name", [3, None, [], "x" * 10**6])
def test_what_is_no_name_is_near_to_none(name: object) -> None:
    assert did_you_mean(name, ["int8"]) == ""
