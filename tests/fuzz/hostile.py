"""Values that nobody should pass and somebody will, as hypothesis draws them."""

from __future__ import annotations

import datetime
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

SMALL = (-1, 0, 1, 2, 3, 7, 8, 31, 64)
WHOLE = (*SMALL, 10**6, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400)
REAL = (math.nan, math.inf, -math.inf, -0.0, 0.5, 1.0, 1.5, -1e-9, 5e-324, 1e-7, 1e308, -1e308)
TEXTS = (
    "",
    " ",
    "1",
    "0.5",
    "nan",
    "true",
    "null",
    "auto",
    "spd",
    "no such thing",
    "a\nb",
    "\x00",
    "\x1b[2J",
    "\ud800",  # half of a surrogate pair, which no encoding writes
    "\u202egnp",
    "é" * 300,
    "x" * 100_000,
    "/dev/zero",
    "/dev/full",
    "/",
    "..",
    "~",
    "{{ 1 }}",
)


def nested(depth: int, leaf: Any = 0) -> list[Any]:
    """A list in a list in a list."""
    value: Any = leaf
    for _ in range(depth):
        value = [value]
    return value  # type: ignore[no-any-return]


def plain() -> st.SearchStrategy[Any]:
    """What JSON or YAML can hold in one place."""
    return st.one_of(
        st.sampled_from(SMALL),
        st.sampled_from(WHOLE),
        st.sampled_from(REAL),
        st.sampled_from(TEXTS),
        st.sampled_from((None, True, False)),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
    )


def json_values() -> st.SearchStrategy[Any]:
    """What JSON or YAML can hold, with lists and mappings."""
    return st.one_of(
        plain(),
        st.recursive(
            plain(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(TEXTS) | st.text(max_size=4), inner, max_size=3)
            ),
            max_leaves=4,
        ),
        st.sampled_from(((), [], {}, [[]], [{}], {"": {}}, [0] * 10_000, nested(50))),
    )


def objects() -> st.SearchStrategy[Any]:
    """What only Python can hold."""
    makers = (
        lambda: b"bytes",
        lambda: bytearray(b"12"),
        lambda: memoryview(b"12"),
        lambda: 1j,
        lambda: Decimal("0.5"),
        lambda: Decimal("NaN"),
        lambda: Fraction(1, 2),
        lambda: datetime.date(2026, 1, 1),
        lambda: Path("/"),
        lambda: np.float32(0.5),
        lambda: np.int64(3),
        lambda: np.bool_(True),
        lambda: np.float64("nan"),
        lambda: np.array([1, 2]),
        lambda: np.array(["a"]),
        lambda: np.zeros((2, 2)),
        lambda: torch.tensor(1),
        lambda: torch.tensor([0.5, math.nan]),
        lambda: torch.empty(0),
        lambda: torch.empty(2, device="meta"),
        lambda: range(3),
        lambda: range(10**12),
        lambda: {1, 2},
        lambda: frozenset(),
        lambda: (each for each in (1, 2)),
        lambda: iter(()),
        lambda: 10**5_000,  # more digits than Python writes
        lambda: object(),
        lambda: len,
        lambda: int,
        lambda: ValueError("a value"),
        lambda: nested(5_000),
        lambda: {"a": nested(5_000)},
        lambda: cycle(),
        lambda: {1: 2, None: 3, (): 4},
    )
    return st.sampled_from(makers).map(lambda make: make())


def cycle() -> list[Any]:
    """A list that holds itself."""
    value: list[Any] = []
    value.append(value)
    return value


def values() -> st.SearchStrategy[Any]:
    """Anything at all."""
    return st.one_of(json_values(), json_values(), objects())
