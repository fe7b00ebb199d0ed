"""A copy of this checkout, for tests that run commands which write into it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git tells what is ours")


def files() -> list[Path]:
    """Everything that git tracks or would add, relative to the checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


def copy_to(folder: Path) -> Path:
    """Copy these files to a folder, which is made."""
    for name in files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder
