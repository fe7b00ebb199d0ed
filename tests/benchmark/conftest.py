"""The scripts under bench/ import each other by their file names, and tests import them so too."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

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
