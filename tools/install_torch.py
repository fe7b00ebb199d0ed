"""Install PyTorch into the running environment, as small as the machine allows.

An existing suitable torch stays. A machine without an NVIDIA GPU gets the CPU build and no CUDA
packages. A machine with one uses the torch of the Python that `--reuse` names, if that has a CUDA
build, else installs the default build.

usage: .venv/bin/python tools/install_torch.py [--reuse PYTHON]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# The local version label makes this the one requirement that no index can answer with a CUDA build.
CPU_BUILD = "torch==2.13.0+cpu"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE = """
import json, pathlib, sys, torch
home = str(pathlib.Path(torch.__file__).parents[1])
print(json.dumps([home, torch.__version__, torch.version.cuda, sys.version_info[:2]]))
"""


def torch_requirement() -> str:
    pyproject = tomllib.loads(
        (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    )
    return next(line for line in pyproject["project"]["dependencies"] if line.startswith("torch>"))


def satisfies(found: str, requirement: str) -> bool:
    """Whether a version lies in a requirement of the form `torch>=2.9,<3`."""
    lowest, highest = requirement.removeprefix("torch>=").split(",<")
    return release(lowest) <= release(found) < release(highest)


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without what stands behind them as in `2.13.0+cpu`."""
    [numbers] = re.findall(r"^[\d.]*\d", version)
    return tuple(map(int, numbers.split(".")))


def installed() -> str | None:
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def has_nvidia_gpu() -> bool:
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU" in listing.stdout


def reuse(python: str, requirement: str) -> bool:
    """Let this environment see another Python's packages, if that has a suitable CUDA torch.

    Both must be of the same version of the language.
    """
    probe = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=False)
    if probe.returncode:
        return False
    folder, found, cuda, language = json.loads(probe.stdout.splitlines()[-1])
    if cuda is None or language != list(sys.version_info[:2]) or not satisfies(found, requirement):
        return False
    Path(sysconfig.get_path("purelib"), "global_torch.pth").write_text(
        folder + "\n", encoding="utf-8"
    )
    print(f"torch {found} of {python} is used")
    return True


def pip_install(*arguments: str, quiet: bool = False) -> bool:
    command = [sys.executable, "-m", "pip", "install", "-qq", *arguments]
    return subprocess.run(command, capture_output=quiet, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reuse", metavar="PYTHON", help="a Python whose CUDA build of torch may be used"
    )
    arguments = parser.parse_args()

    requirement = torch_requirement()
    found = installed()
    if found is not None and satisfies(found, requirement):
        return 0
    if has_nvidia_gpu():
        done = (arguments.reuse and reuse(arguments.reuse, requirement)) or pip_install(requirement)
    elif sys.platform == "darwin":  # the default build for macOS has no CUDA in it
        done = pip_install(requirement)
    else:  # a mirror may hold the CPU build; asking it first costs a second
        index = ("--extra-index-url", CPU_INDEX, "--retries", "1", "--timeout", "15")
        done = pip_install(CPU_BUILD, quiet=True) or pip_install(CPU_BUILD, *index)
    if not done:
        print(
            f"error: no PyTorch for Python {sys.version.split()[0]} could be installed; "
            f"install one that fits {requirement!r} into {sys.prefix} by hand and run make again",
            file=sys.stderr,
        )
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
