"""The scripts under bench/ import each other by their file names, and tests import them so too."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from dmax.tasks.word_problems import problems

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))


@pytest.fixture
def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What a script writes to stderr when it ends with exit code 2, having printed nothing else."""

    def told(script: str, *arguments: str) -> str:
        module = import_module(script)
        monkeypatch.setattr(sys, "argv", [f"bench/{script}.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 2
        said = capsys.readouterr()
        assert not said.out
        return said.err

    return told


@pytest.fixture
def noise_recipe(tmp_path: Path) -> Path:
    """The file of a recipe for bench/noise.py: that of its first study, with twelve records."""
    responses = tmp_path / "responses.jsonl"
    rows = [{"prompt": p.question, "response": p.response} for p in problems(12, seed=3)]
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (BENCH.parent / "recipes" / "tiny_ablation.yaml").read_text(encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("runs/tiny_responses.jsonl  ", f"{responses}  "), encoding="utf-8")
    return path
