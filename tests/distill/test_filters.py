"""Which responses are kept, and why the others are not."""

from __future__ import annotations

from typing import Any

import pytest

from dmax import InputError
from dmax.distill.filters import Filters, repetition
from dmax.distill.responses import Response

TEXT = "Half of 12 apples is 6, and 6 + 3 = 9, so Tom ends up with 9 apples.\n#### 9"


def response(text: str = TEXT, tokens: int | None = 30, is_finished: bool = True) -> Response:
    return Response(text, tokens, is_finished)


@pytest.mark.parametrize(
    ("filters", "given", "reason"),
    [
        ({}, {}, None),
        ({}, {"is_finished": False}, "unfinished"),
        ({}, {"text": " \n\t"}, "empty"),
        ({}, {"text": "", "is_finished": False}, "unfinished"),
        ({}, {"tokens": None}, None),
        ({"min_length": 30}, {}, None),
        ({"min_length": 31}, {}, "short"),
        ({"max_length": 30}, {}, None),
        ({"max_length": 29}, {}, "long"),
        ({"max_repetition": 0.5}, {}, None),
        ({"max_repetition": 0.5}, {"text": "So it is 4. " * 9}, "repetitive"),
        ({"max_repetition": 0.9}, {"text": "So it is 4. " * 9}, None),
        ({"score": lambda index, text: index == 7}, {}, None),
        ({"score": lambda index, text: index != 7}, {}, "wrong"),
        ({"min_length": 31, "score": lambda index, text: 1 / 0}, {}, "short"),
    ],
)
def test_the_reason(filters: dict[str, Any], given: dict[str, Any], reason: str | None) -> None:
    assert Filters(**filters).reason(7, response(**given)) == reason


@pytest.mark.parametrize("filters", [{"min_length": 1}, {"max_length": 9}])
def test_a_length_that_nobody_counted_cannot_be_filtered(filters: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="does not say how many tokens a response has"):
        Filters(**filters).reason(0, response(tokens=None))


@pytest.mark.parametrize(
    ("filters", "name"),
    [
        ({"min_length": -1}, "min_length"),
        ({"max_length": 0}, "max_length"),
        ({"min_length": 5, "max_length": 4}, "max_length"),
        ({"max_repetition": 1.1}, "max_repetition"),
        ({"max_repetition": float("nan")}, "max_repetition"),
    ],
)
def test_a_bound_out_of_range(filters: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=f"`{name}` must be"):
        Filters(**filters)


def test_repetition_is_the_share_of_windows_that_occurred_before() -> None:
    assert repetition("") == repetition("short") == 0
    assert repetition("abcdefghijklmnopqrstuvwxyz") == 0
    assert repetition("a" * 17) == 1 / 2  # two windows, one of them new
    assert repetition("0123456789abcdef" * 2) == 1 / 17  # the first window comes again
    # A loop of period 12: 12 windows are new.
    assert repetition("So it is 4. " * 9) == (93 - 12) / 93


@pytest.mark.parametrize("loop", ["a", "the ", "1 + 1 = 2\n", "好的。", "x = x + 1\n    "])
def test_a_loop_is_nearly_all_repetition(loop: str) -> None:
    assert repetition(loop * 100) > 0.85


def test_what_people_write_repeats_little() -> None:
    assert repetition(TEXT) < 0.1
