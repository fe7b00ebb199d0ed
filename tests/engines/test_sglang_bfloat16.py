"""SGLang in bfloat16, whose products round otherwise than ours: differences are counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from reference import load
from sglang_engine import answers, num_forwards, running, token_ids


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with running(dtype="bfloat16") as started:
        yield started


@pytest.mark.parametrize("group", ["bfloat16_spd", "bfloat16_threshold"])
def test_most_completions_are_the_same(
    engine: Any, group: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = load(group)
    pairs = list(zip(answers(engine, wanted), wanted, strict=True))
    num_other = sum(token_ids(ours) != theirs.token_ids for ours, theirs in pairs)
    num_longer = sum(num_forwards(ours) != theirs.num_forwards for ours, theirs in pairs)
    with capsys.disabled():
        print(  # noqa: T201  # the count is the result
            f"\n{group}: {num_other} of {len(pairs)} completions have other tokens, "
            f"{num_longer} another number of forwards"
        )
    assert num_other <= len(pairs) // 4
