"""docs/serving.md is true: its Python runs, its figures are right, its tables are complete."""

from __future__ import annotations

import re
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
from running import Running

from dmax.serve.bodies import ChatRequest, CompletionRequest, DmaxOptions
from dmax.serve.replies import AnswerDetails, ChoiceDetails

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def test_its_python_runs_and_its_figures_are_right(
    server: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    namespace: dict[str, object] = {}
    found = re.findall(r"^( *)```python\n(.*?)^\1```", PAGE, flags=re.MULTILINE | re.DOTALL)
    for _, content in found:
        code = textwrap.dedent(content)
        exec(code.replace(ADDRESS, server.url), namespace)
    printed = capsys.readouterr().out
    assert len(found) == 2
    whole, _, rest = printed.partition("\n62 tokens in 7 forwards\n")
    assert whole.startswith("First we see that 8 - 2 is 6 mugs.") and whole.endswith("#### 17")
    assert rest.startswith(whole) and "░" in rest
    assert '"completion_tokens": 62' in PAGE and '"num_forwards": 7' in PAGE
    usage = namespace["answer"].usage  # type: ignore[attr-defined]
    assert f'"prompt_tokens": {usage.prompt_tokens},' in PAGE
    assert f'"total_tokens": {usage.total_tokens}}}' in PAGE
    assert '"tokens_per_forward": 8.86' in PAGE and round(62 / 7, 2) == 8.86


def test_its_tables_have_every_field() -> None:
    rows = re.findall(r"^\|.*\|$", PAGE, flags=re.MULTILINE)
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]+`", " ".join(rows)))))
    asked = {*ChatRequest.model_fields, *CompletionRequest.model_fields, *DmaxOptions.model_fields}
    told = {*ChoiceDetails.model_fields, *AnswerDetails.model_fields}
    assert asked | told <= named


def test_its_table_of_limits_has_every_limit() -> None:
    from dmax.serve.settings import ServerOptions

    elsewhere = {"api_keys", "cors_origins", "allowed_hosts", "shutdown_seconds"}
    for each in fields(ServerOptions):
        if each.name not in elsewhere:
            assert f"`--{each.name.replace('_', '-')}`" in PAGE, each.name
