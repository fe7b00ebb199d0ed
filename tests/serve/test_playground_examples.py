"""The prompts that the playground offers show what it says they show."""

from __future__ import annotations

import json
import re

import pytest

from dmax import DecodingParams
from dmax.demo.settings import DMAX, PUSHED
from dmax.llm import LLM
from dmax.tasks.word_problems import score
from dmax.web.page import static_files

MODULE = static_files()["examples.js"].decode()
PROMPTS = [
    "".join(json.loads(part) for part in re.findall(r'"[^"]*"', found))
    for found in re.findall(r"prompt:\s*((?:\"[^\"]*\"[\s+]*)+),", MODULE)
]
ANSWERS = re.findall(r'answer: "(\d+)"', MODULE)


def test_all_examples_are_found() -> None:
    assert len(PROMPTS) == len(ANSWERS) == MODULE.count("    name: ") > 0


def test_the_opening_race_is_the_one_of_the_demo() -> None:
    models = static_files()["models.js"].decode()
    assert f"PUSHED = {PUSHED.threshold};" in models


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # what "auto" gives here and elsewhere
def test_the_pushed_base_is_wrong_and_dmax_right(dtype: str) -> None:
    for setting, is_right in ((PUSHED, False), (DMAX, True)):
        params = DecodingParams(setting.strategy, setting.threshold)
        outputs = LLM(setting.model, dtype=dtype).generate(PROMPTS, params)
        scores = [
            score(output.text, answer) for output, answer in zip(outputs, ANSWERS, strict=True)
        ]
        assert scores == [is_right] * len(PROMPTS)
