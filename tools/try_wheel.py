"""Install a wheel into a fresh environment and run its demo there, away from the checkout.

    python tools/try_wheel.py dist/dmax_lm-0.1.0-py3-none-any.whl

The environment holds what the wheel asks for and nothing else. Its packages are those of the Python
that runs this script, linked instead of downloaded; pip decides whether they are enough.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterable, Iterator
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NOT_LINKED = ("..", "__pycache__")  # scripts, and what Python writes again by itself
WHERE = "import dmax; print(dmax.__version__, dmax.__file__)"


def requirements_of(wheel: Path) -> list[str]:
    """What a wheel asks for, extras included."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    return metadata.get_all("Requires-Dist", [])


def chosen(lines: Iterable[str], extras: Iterable[str]) -> Iterator[Requirement]:
    """The requirements that hold on this machine, with these extras."""
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def needed(lines: Iterable[str], extras: Iterable[str] = ()) -> set[str]:
    """Names of the packages that requirements ask for, and of those that these ask for in turn."""
    found: set[tuple[str, frozenset[str]]] = set()
    open_ones = list(chosen(lines, extras))
    while open_ones:
        requirement = open_ones.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key not in found:
            found.add(key)
            below = distribution(requirement.name).requires or []
            open_ones += chosen(below, requirement.extras)
    return {name for name, _ in found}


def link(names: Iterable[str], python: Path) -> None:
    """Let another environment see packages of this one."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", code], text=True).strip())
    for package in map(distribution, names):
        tops = {file.parts[0] for file in package.files or ()}
        for top in tops.difference(NOT_LINKED):
            if not (site / top).is_symlink():
                (site / top).symlink_to(Path(str(package.locate_file(top))).resolve())


def run(command: Iterable[str | Path], folder: Path) -> None:
    """Run a command in a folder, where nothing leads back to the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(list(command), cwd=folder, env=environment, check=True)


def main() -> int:
    """Try a wheel; the exit code is that of the first command that fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel.resolve()

    with tempfile.TemporaryDirectory() as folder:
        elsewhere = Path(folder)
        venv.create(elsewhere / "fresh", symlinks=True)
        binaries = elsewhere / "fresh" / "bin"
        python = binaries / "python"
        link(needed(requirements_of(wheel)), python)
        pip = [sys.executable, "-m", "pip", "--python", str(python)]
        try:
            run([*pip, "install", "--no-index", "-qq", wheel], elsewhere)
            run([python, "-c", WHERE], elsewhere)
            run([binaries / "dmax", "demo"], elsewhere)
        except subprocess.CalledProcessError as error:
            print(f"error: {wheel.name}: {error}", file=sys.stderr)
            return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
