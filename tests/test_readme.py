"""What the README says works: its commands in their order, and the problem that it begins with."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import threading
import tomllib
import venv
from collections.abc import Iterable, Iterator
from functools import reduce
from pathlib import Path

import checkout
import pytest
from typer.main import get_command

from dmax.cli import app
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.tasks.word_problem_patterns import ITEMS, NAMES, OPENERS, STEPS
from dmax.tasks.word_problems import apply_step, score, split_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").is_file() else ""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PROGRAMS = r"(?:dmax|git|make|pip|python|\.) "
INSTALL = "pip install -e '.[train,eval]'"
EXTRAS = ("train", "eval")
TOOL = runpy.run_path(str(ROOT / "tools" / "try_wheel.py"))
DONE = "exit-code:"
SECONDS = 600.0  # for all commands, however busy the machine is
MAX_LINES = 120

# A command of the README -> what is run for it. `dmax generate` runs as it stands.
SMALL = {
    "git clone <this repository> dmax && cd dmax": "cd dmax",  # it is copied, changes included
    "make demo": "make .venv/.core-stamp",  # CI runs the demo itself
    ". .venv/bin/activate": ". .venv/bin/activate",
    INSTALL: INSTALL,
    "make test": "make --dry-run test",  # this is a part of it
    "dmax demo": "dmax demo --help",
    "dmax serve": "dmax serve --help",  # tests/serve run it
    "python bench/tiny.py --limit 500 --dtype bfloat16 --output runs/new.json": (
        "python bench/tiny.py --limit 2 --dtype bfloat16 --only 'DMax, SPD' --output runs/new.json"
    ),
    "dmax distill --model tiny-base --num 5000 --output runs/tiny_responses.jsonl": (
        "dmax distill --model tiny-base --num 24 --output runs/tiny_responses.jsonl"
    ),
    "dmax train recipes/tiny_oput_sample.yaml": (
        "dmax train recipes/tiny_oput_sample.yaml --max-steps 2"
    ),
    "dmax eval --model runs/tiny-oput-sample --limit 200 --seed 7": (
        "dmax eval --model runs/tiny-oput-sample --limit 2 --seed 7"
    ),
    "dmax sweep --model tiny-base --model tiny-dmax --output runs/sweep": (
        "dmax sweep --model tiny-base --model tiny-dmax --output runs/sweep "
        "--limit 2 --thresholds 0.3,0.9"
    ),
}


def commands(text: str) -> Iterator[str]:
    """Every command of a page, in its order: lines of `sh` blocks, and code within sentences."""
    parts = r"^```(?P<language>\w*)\n(?P<block>.*?)^```$|`(?P<inline>[^`\n]+)`"
    for found in re.finditer(parts, text, flags=re.MULTILINE | re.DOTALL):
        if found["language"] == "sh":
            joined = found["block"].replace("\\\n", "")
            yield from (re.sub(r"\s+#.*", "", line) for line in joined.splitlines() if line)
        elif found["inline"] and re.match(PROGRAMS, found["inline"]):
            yield found["inline"]


class Shell:
    """A shell that stays open between commands, as a reader's does."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            ["bash"],
            cwd=folder,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, command: str) -> tuple[int, str]:
        """Exit code and output of a command."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{{ {command}\n}} </dev/null; printf '\\n%s\\n' {DONE}$?\n")
        self._process.stdin.flush()
        lines: list[str] = []
        for line in self._process.stdout:
            if line.startswith(DONE):
                return int(line.removeprefix(DONE)), "".join(lines)
            lines.append(line)
        return self._process.wait(), "".join(lines)

    def __enter__(self) -> Shell:
        """A guard ends it if a command hangs."""
        self._guard = threading.Timer(SECONDS, self._process.kill)
        self._guard.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._guard.cancel()
        self._process.kill()
        self._process.communicate()


def empty_environment(folder: Path) -> None:
    """What `python -m venv` makes; its pip comes from the Python of the tests."""
    venv.create(folder, symlinks=True)
    link(["pip", "setuptools"], folder)
    pip = folder / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec "{folder}/bin/python" -m pip "$@"\n')
    pip.chmod(0o755)


def link(names: Iterable[str], environment: Path) -> None:
    """Put packages into an environment that pip would have to download."""
    TOOL["link"](names, environment / "bin" / "python")


def offline() -> dict[str, str]:
    """Variables with which pip installs and builds from what is there."""
    left_out = ("PYTHON", "VIRTUAL_ENV", "TRITON", "MAKE", "MFLAGS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    pip = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # 0: there is none
    return kept | pip | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def test_the_readme_stays_short() -> None:
    assert README and len(README.splitlines()) <= MAX_LINES


def test_commands_are_found_in_their_order() -> None:
    text = (
        '`make a` and `makers`\n```sh\ndmax x "b \\\nc"  # why\n\npip y\n```\n'
        "```text\nmake z\n```\n(`dmax d`)\n"
    )
    assert list(commands(text)) == ["make a", 'dmax x "b c"', "pip y", "dmax d"]


@checkout.needs_git
@pytest.mark.slow
def test_every_command_works_in_the_order_it_stands(tmp_path: Path) -> None:
    found = list(commands(README))
    generate = [command for command in found if command.startswith("dmax generate ")]
    assert set(found) - set(generate) == SMALL.keys(), "SMALL says how each is tried"
    steps = SMALL | dict(zip(generate, generate, strict=True))

    folder = checkout.copy_to(tmp_path / "dmax")
    empty_environment(folder / ".venv")
    extra = PROJECT["optional-dependencies"]["serve"]
    link(TOOL["needed"](PROJECT["dependencies"] + extra), folder / ".venv")
    with Shell(tmp_path, offline()) as shell:
        for command in found:
            if command == INSTALL:
                lines = [
                    line for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra]
                ]
                link(TOOL["needed"](lines), folder / ".venv")
            code, output = shell.run(steps[command])
            assert code == 0, f"{command}\n{output}"
    assert (folder / "runs" / "sweep" / "report.html").is_file()


def first_example() -> str:
    """The problem in the help of `dmax generate`, as it is copied from a terminal."""
    command = get_command(app).commands["generate"]  # type: ignore[attr-defined]
    (example,) = re.findall(r'Example: dmax generate "(.*?)"', command.help, flags=re.DOTALL)
    return example.replace("\n", "\n ")


def chain(question: str) -> tuple[int, tuple[tuple[str, int], ...]]:
    """The start of a problem and its steps, read from its sentences."""
    *sentences, _ = re.findall(r"[^.?]+[.?]", question)
    patterns = {"": OPENERS, **STEPS}
    said = []
    for sentence in sentences:
        ((operation, number),) = {
            (operation, int(found["number"]))
            for operation, wordings in patterns.items()
            for wording in wordings
            if (found := re.fullmatch(readable(wording), sentence.strip(), flags=re.IGNORECASE))
        }
        said.append((operation, number))
    (_, start), *steps = said
    return start, tuple(steps)


def readable(wording: str) -> str:
    """A regular expression for a sentence of the generator."""
    names = "|".join(name for group in NAMES.values() for name in group)
    words = {"a": r"(?P<number>\d+)", "b": r"(?P<number>\d+)"}
    words |= {"name": f"(?:{names})", "items": f"(?:{'|'.join(ITEMS)})"}
    return re.escape(wording).replace(r"\{", "{").replace(r"\}", "}").format(**words)


def thresholds() -> set[float]:
    """Every threshold that the README names: in its table and in the rows of the demo."""
    rows = re.findall(r"^\|.*\| (0\.\d+) \|.*/500", README, flags=re.MULTILINE)
    rows += re.findall(r"^(?:base|DMax).* (0\.\d+) +\d+/32 ", README, flags=re.MULTILINE)
    return {float(row) for row in rows}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_example_is_solved_at_every_threshold_that_the_readme_names(dtype: str) -> None:
    copied = first_example()
    question = " ".join(copied.split())
    assert question in README.replace("\\\n", "")  # in the shell
    assert question in README.replace('"\nquestion += "', "")  # and in Python
    start, steps = chain(question)
    assert split_of(start, steps) == "test", "the model may have seen it"
    answer = reduce(lambda value, step: apply_step(value, *step), steps, start)

    llm = LLM("tiny-dmax", dtype=dtype, device="cpu")
    assert thresholds() >= {0.3, 0.5, 0.95}
    for prompt in (question, copied):
        for threshold in sorted(thresholds()):
            (output,) = llm.generate(prompt, DecodingParams("spd", threshold))
            assert score(output.text, answer), f"{threshold}: {output.text}"
    (usual,) = llm.generate(question)
    (headline,) = re.findall(r"\*\*(\d+\.\d+)\*\* \|$", README, flags=re.MULTILINE)
    assert usual.tokens_per_forward == pytest.approx(float(headline), rel=0.1)
