"""Forty commands with bad input, run as a user runs them: one sentence, code 2, no new file."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import Ended, furnish, judge
from oracle import SEED, check_unchanged, contents

import dmax

SOURCE = Path(dmax.__file__).parents[1]
COUNT = 40
SECONDS = 120  # on the wall, where other work shares the cores
CPU_SECONDS = 40  # lm-eval reads the files of all its tasks first, 20 seconds on a slow machine
MEMORY = (
    1_500 * 2**20
)  # torch takes 500 MB with all that transformers loads, and 500 MB more are allowed
# The command under bounds that no exception handler of its own can lift or swallow.
PROGRAM = f"""
import resource, signal
resource.setrlimit(resource.RLIMIT_CPU, ({2 * CPU_SECONDS}, {2 * CPU_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({8 * 2**30}, {8 * 2**30}))
signal.alarm({SECONDS})
from dmax_command import main
main()
"""


@dataclass(frozen=True)
class Case:
    """A command line of which something is wrong.

    Attributes:
        words: what follows `dmax`.
        stdin: what is piped in.
    """

    words: tuple[str | bytes, ...]
    stdin: bytes = b""

    def __str__(self) -> str:
        shown = " ".join(each if isinstance(each, str) else repr(each) for each in self.words)
        return shown.encode("ascii", "replace").decode()[:60].replace("/", "|")


def cases(command: str, *lines: str | Case) -> list[Case]:
    """Cases of one command; a text is split at its spaces."""
    return [line if isinstance(line, Case) else Case((command, *line.split(" "))) for line in lines]


# From every group, as many cases as its number says are run; the seed chooses them.
GROUPS: tuple[tuple[int, list[Case]], ...] = (
    (
        5,
        cases(
            "generate",
            "-m tiny-dmx a",
            "-m nobody/nothing a",
            "-m other.json a",
            "-m empty a",
            "--threshold nan a",
            "--threshold 1.5 a",
            "--max-new-tokens -1 a",
            f"--max-new-tokens {10**400} a",
            "--temperature inf a",
            "--seed -1 a",
            "--strategy sdp a",
            "--option soft_inputs=7 a",
            "--option nonesuch=1 a",
            "--device cuda:77 a",
            "--device meta a",
            "--dtype float8 a",
            "--quantization int3 a",
            "--block-length 0 a",
            "--no-such-option a",
            f"--option a={'[' * 100_000} a",
            Case(("generate",)),
            Case(("generate", b"\xff\xfe")),
            Case(("generate",), b"\xff\xfe\x00"),
            Case(("generate",), b"a" * 20 * 2**20),
            Case(("generate", "word " * 20_000)),
            Case(("generate", "--stop", "", "a")),
        ),
    ),
    (
        2,
        cases(
            "trace",
            "-m nobody/nothing a",
            "--compare threshold a",
            "--compare strategy=sdp a",
            f"--compare a={'[' * 100_000} a",
            "--open missing.json",
            "--open other.json",
            "--open empty",
            "--open /dev/zero",
            "--open infinite.yaml a",
            "--output /dev/full a",
            "--output recipe.yaml a",
            Case(("trace",), b"\xff\xfe\x00"),
        ),
    ),
    (
        5,
        cases(
            "train",
            "missing.yaml",
            "empty",
            "other.json",
            "recipe.yaml",
            "/dev/zero",
            "/dev/null",
            "bomb.yaml",
            "infinite.yaml",
            "steps.yaml",
            "layers.yaml",
            "problems.yaml",
            "python.yaml",
            "deep.yaml",
            "recipe.yaml --max-steps 0",
            "good.yaml --max-steps nan",
            Case(("train", "a pipe")),
            Case(("train",)),
            Case(("train", b"\xff.yaml")),
        )
        + cases(
            "convert",
            "nobody/nothing -o new",
            "other.json -o new",
            "empty -o new",
            "/dev/zero -o new",
            "tiny-base -o new",
            "tiny-base -o empty/../other.json",
            "tiny-base -o /dev/full",
            "tiny-base -o /proc/nothing/a",
            "tiny-base -o new --block-length nan",
            "tiny-base",
            Case(("convert",)),
            Case(("convert", "", "-o", "new")),
            Case(("convert", "a pipe", "-o", "new")),
            Case(("convert", b"\xff", "-o", "new")),
        ),
    ),
    (
        7,
        cases(
            "distill",
            "-o empty",
            "-o other.json --num 1",
            "-o /dev/full",
            "-o /dev/null/a",
            "-o new/a.jsonl --num 0",
            "-o new/a.jsonl --num 1000000000",
            "-o new/a.jsonl --prompts missing.jsonl",
            "-o new/a.jsonl --prompts other.json",
            "-o new/a.jsonl --prompts /dev/zero",
            "-o new/a.jsonl --model tiny-bse",
            "-o new/a.jsonl --threshold nan",
            "-o new/a.jsonl --batch-size 0",
            "-o new/a.jsonl --batch-size 1000000000000",
            Case(("distill",)),
            Case(("distill", "-o", "new/a.jsonl", "--prompts", "a pipe")),
        ),
    ),
    (
        7,
        cases(
            "eval",
            "--task gsm9k",
            "--task gsm8k",
            "--task gsm8k --data missing.jsonl",
            "--task gsm8k --data other.json",
            "--task gsm8k --data empty",
            "--task gsm8k --data /dev/zero",
            "--task gsm8k --data deep.jsonl",
            "--task word_problems --data rows.jsonl",
            "--limit 0",
            "--limit 1000000000000",
            "--seed x",
            "--batch-size -1",
            "--threshold inf",
            "-m tiny-dmx -o new/a.json",
            "-o empty",
            "-o other.json",
            "-o /dev/full",
            "-o new/a.json --device cuda:77",
            Case(("eval", "--task", "gsm8k", "--data", "a pipe")),
        ),
    ),
    (
        6,
        cases(
            "sweep",
            "-m tiny-dmx -o new",
            "-m tiny-dmax -o other.json",
            "-m tiny-dmax -o new --thresholds 0:1:1e-9",
            "-m tiny-dmax -o new --thresholds nan",
            "-m tiny-dmax -o new --thresholds 2",
            "-m tiny-dmax -o new --strategies sdp",
            "-m tiny-dmax -o new --task gsm9k",
            "-m tiny-dmax -o new --limit 0",
            "-m tiny-dmax -o /proc/new",
            "-m tiny-dmax -m nobody/nothing -o new",
            "-o new",
        ),
    ),
    (
        3,
        cases(
            "bench",
            "--quick --device meta",
            "--quick --device cuda:77",
            "--quick -o empty",
            "--quick -o other.json",
            "--quick -o /dev/null/a",
            "--speed",
        ),
    ),
    (
        1,
        cases(
            "lm_eval",
            "--model dmax --model_args pretrained=tiny-dmx --tasks gsm8k",
            "--model dmax --model_args pretrained=tiny-dmax,threshold=nan --tasks gsm8k",
            "--model dmax --model_args pretrained=tiny-dmax,bogus=1 --tasks gsm8k",
            "--model dmaxx --tasks gsm8k",
            "--model dmax --model_args pretrained=tiny-dmax --tasks no_such_task",
        ),
    ),
    (
        4,
        [
            Case(words)
            for words in (
                ("generat", "a"),
                ("--versoin",),
                ("trian", "recipe.yaml"),
                ("eval", "--limit"),
                ("sweep", "--grid", "0.5"),
                ("demo", "now"),
                ("bench", "--qiuck"),
                ("\x1b[2J",),
                (b"\xff",),
                ("x" * 100_000,),
                ("eval", "--limit", "9" * 5_000),
                ("distill", "-o", "new/a.jsonl", "word " * 20_000),
            )
        ],
    ),
)


def chosen() -> list[Case]:
    """The cases of this seed."""
    generator = random.Random(f"{SEED} commands")
    return [case for count, group in GROUPS for case in generator.sample(group, count)]


def furnish_recipes(folder: Path) -> None:
    """Recipes of which one value is wrong."""
    good = (
        "output_dir: out\nmodel: {path: tiny-base}\ndata: {problems: 4}\n"
        "training: {objective: mdlm, max_steps: 1, learning_rate: 1.0e-3, use_cpu: true}\n"
    )
    bomb = "a0: &a0 {a: 1}\n" + "".join(
        f"a{depth}: &a{depth} {{{', '.join(f'k{each}: *a{depth - 1}' for each in range(9))}}}\n"
        for depth in range(1, 12)
    )
    recipes = {
        "good": good,
        "infinite": good.replace("1.0e-3", ".inf"),
        "steps": good.replace("max_steps: 1", "max_steps: 1, gradient_accumulation_steps: -1"),
        "layers": good.replace("path: tiny-base", "config: {num_hidden_layers: 1000000}"),
        "problems": good.replace("problems: 4", "problems: 1000000000"),
        "python": "output_dir: !!python/object/apply:os.system ['touch new']\n",
        "deep": "a: " + "[" * 200_000,
        "bomb": bomb,
    }
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "deep.jsonl").write_text('{"question": ' + "[" * 200_000 + "\n")


# A new process begins with the peak of the one it comes from, and that of a test process may be
# higher than a command's. So this small one comes between. Only `wait4` tells of one process.
MEASURE = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
code = os.waitstatus_to_exitcode(status)
with open("../usage", "w") as file:
    json.dump([code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss], file)
"""


def run(case: Case, folder: Path) -> tuple[Ended, float, int]:
    """Run a command in a folder; how it ended, its seconds of the processor and its peak memory."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(SOURCE),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
    }
    command = [sys.executable, "-c", MEASURE, sys.executable, "-c", PROGRAM, *case.words]
    (folder.parent / "in").write_bytes(case.stdin)
    streams = {
        "stdin": (folder.parent / "in").open("rb"),
        "stdout": (folder.parent / "out").open("wb"),
        "stderr": (folder.parent / "err").open("wb"),
    }
    try:
        subprocess.run(command, cwd=folder, env=environment, check=True, **streams)
    finally:
        for stream in streams.values():
            stream.close()
    code, seconds, kilobytes = json.loads((folder.parent / "usage").read_text())
    out, err = [(folder.parent / name).read_text("utf-8", "replace") for name in ("out", "err")]
    return Ended(code, out, err), seconds, kilobytes * 1024


@pytest.mark.parametrize("case", chosen(), ids=str)
def test_a_command_with_bad_input(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    furnish(folder)
    furnish_recipes(folder)
    before = contents(folder)
    ended, seconds, memory = run(case, folder)
    judge(ended)
    check_unchanged(before, contents(folder))
    assert seconds < CPU_SECONDS
    assert memory < MEMORY, f"took {memory / 2**20:.0f} MB"


def test_forty_commands_are_run() -> None:
    assert len(chosen()) == len(set(chosen())) == COUNT
