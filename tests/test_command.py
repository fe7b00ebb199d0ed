"""The `dmax` command sets its own process up; who imports the package keeps the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dmax_command

ROOT = Path(__file__).parents[1]
COMMAND = "import sys, dmax_command; sys.argv = ['dmax', '--help']; dmax_command.main()"
SERVE = COMMAND.replace("'--help'", "'serve', '--help'")


def changes(code: str, **environment: str) -> dict[str, str]:
    """What a new process has changed in its environment by its end, torch's own variables apart."""
    start = {name: value for name, value in os.environ.items() if "OMP" not in name} | environment
    script = (
        "import atexit, json, os\n"
        "before = dict(os.environ)\n"
        "def tell():\n"
        "    changed = {k: v for k, v in os.environ.items() if before.get(k) != v}\n"
        "    print('\\n' + json.dumps(changed))\n"
        f"atexit.register(tell)\n{code}"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=start, capture_output=True, text=True, check=True
    )
    changed = json.loads(done.stdout.splitlines()[-1])
    return {name: value for name, value in changed.items() if not name.startswith("TORCH")}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from dmax import LLM", {}),
        (COMMAND, {"GOMP_SPINCOUNT": "2000", "MPLBACKEND": "agg"}),
        (SERVE, {"GOMP_SPINCOUNT": "100", "MPLBACKEND": "agg"}),
    ],
)
def test_only_the_command_changes_its_environment(code: str, expected: dict[str, str]) -> None:
    assert changes(code, MPLBACKEND="nonsense") == expected


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_has_set_is_kept(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "7")
    before = dict(os.environ)
    dmax_command.spin_briefly(dmax_command.SPINS)
    assert dict(os.environ) == before


def test_the_command_begins_before_torch_is_loaded() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert scripts["scripts"] == {"dmax": "dmax_command:main"}
    code = "import dmax_command, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
