"""Command lines, run in this process up to where a model would be loaded."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from commands import Ended, furnish, judge
from hypothesis import strategies as st
from mutations import STAND_INS
from oracle import Fault, attempt, check_unchanged, contents, fuzz
from typer.main import get_command

import dmax.benchmark.cpu
import dmax.llm
import dmax.recipe.run
from dmax import cli
from dmax.errors import InputError

COMMANDS: dict[str, Any] = get_command(cli.app).commands  # type: ignore[attr-defined]
TRIED = (
    "bench",
    "chat",
    "distill",
    "eval",
    "generate",
    "sweep",
    "trace",
    "train",
)  # demo has no input, lm_eval its own
VALID: dict[str, tuple[str, ...]] = {
    "bench": (),
    "chat": (),
    "distill": ("--output", "new.jsonl", "--num", "2"),
    "eval": ("--limit", "2"),
    "generate": ("a question",),
    "sweep": ("--model", "tiny-dmax", "--output", "swept", "--limit", "2"),
    "trace": ("a question",),
    "train": ("recipe.yaml",),
}
FILES = ("recipe.yaml", "rows.jsonl", "other.json", "empty", *STAND_INS)
NUMBERS = (
    "-1",
    "0",
    "1",
    "2",
    "0.5",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "1e-999",
    "0x10",
    "१",
    "1_0",
)
LARGE = ("1000000000", str(2**63), str(10**400), "9" * 5_000)
WORDS = (
    "",
    " ",
    "-",
    "--",
    "auto",
    "tiny-dmx",
    "tiny-dmax",
    "spd",
    "sdp",
    "spd,,threshold",
    "gsm8k",
    "gsm9k",
    "float8",
    "cuda:99",
    "meta",
    "int8",
    "int7",
    "alpha=0.7",
    "alpha",
    "=1",
    "a=" + "[" * 5_000,
    "alpha=NaN",
    "0:1:0",
    "0:1e9:1e-9",
    "nan",
    "1,x",
    "a\nb",
    "\x1b[31m",
    "\udcff",
    "é" * 300,
    "x" * 10_000,
    "/dev/full",
    "/dev/zero",
    "/dev/null/a",
    "/",
    ".",
    "..",
    "missing/deeper/still",
    "name/without/such/owner",
)
values = (
    st.sampled_from(NUMBERS)
    | st.sampled_from(LARGE)
    | st.sampled_from(WORDS)
    | st.sampled_from(FILES)
)


class Reached(BaseException):
    """All is checked, and the work would begin."""


@pytest.fixture
def no_work() -> Iterator[None]:
    """Commands raise `Reached` in place of hours of work."""

    def reach(*_: Any, **__: Any) -> Any:
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmax.llm, "LLM", reach)
        patch.setattr(dmax.recipe.run, "build_checkpoint", reach)
        patch.setattr(dmax.benchmark.cpu, "tables", lambda _: map(reach, [0]))
        yield


def run(words: Sequence[str], stdin: str = "a question") -> Ended:
    """Run `dmax WORDS` in an empty folder with a few files, and judge how it ends."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        furnish(folder)
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", ["dmax", *words])
        before = contents(folder)
        ended = attempt(lambda: _run(patch, stdin))
        after = contents(folder)
    assert not isinstance(ended, InputError), "the command let an error through"
    if ended.code:
        judge(ended)
        check_unchanged(before, after)
    return ended


def _run(patch: pytest.MonkeyPatch, stdin: str) -> Ended:
    out = io.StringIO()
    err = io.StringIO()
    code: Any = 0
    patch.setattr(sys, "stdin", io.StringIO(stdin))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        except Reached:
            code = None
    return Ended(code, out.getvalue(), err.getvalue())


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A valid command line with one or two options more, their values drawn from anything."""
    command = draw(st.sampled_from(TRIED))
    options = [each.opts[0] for each in COMMANDS[command].params if each.opts[0].startswith("-")]
    words = [command, *VALID[command]]
    for _ in range(draw(st.integers(1, 2))):
        words += [draw(st.sampled_from(options)), draw(values)]
    if draw(st.integers(0, 9)) == 0:
        words[draw(st.integers(0, len(words) - 1))] = draw(values)
    return words


@fuzz(110, words=command_lines(), stdin=st.sampled_from(("a question", "", "\ud800", "\x00")))
def test_any_value_of_any_option(no_work: None, words: list[str], stdin: str) -> None:
    run(words, stdin)


WRONG: dict[str, tuple[str, ...]] = {
    "--max-new-tokens": ("-1", "0", "0.5", "nan", "many", "1e3", ""),
    "--threshold": ("-0.1", "1.1", "nan", "inf", "-inf", "high", ""),
    "--limit": ("-1", "0", "0.5", "nan", "all", ""),
    "--seed": ("0.5", "nan", "x", ""),
    "--batch-size": ("-1", "0", "0.5", "nan", str(10**12), str(10**400)),
    "--top-k": ("-1", "0", "0.5", "nan"),
    "--temperature": ("-1", "nan", "inf", "hot"),
    "--block-length": ("-1", "0", "0.5", "nan"),
    "--strategy": ("", "sdp", "spd,threshold", "../spd", "os:system"),
    "--option": ("alpha", "=1", "", "a=" + "[" * 5_000),
    "--task": ("", "gsm9k", "../gsm8k", "os:system"),
    "--data": ("missing.jsonl", "empty", "other.json", "a pipe", "a link to zeros", "/dev/zero"),
    "--output": ("/dev/full", "/dev/null/a", "/proc/nothing/a.json"),
    "--num": ("0", "-1", "0.5", "nan", str(10**9)),
    "--prompts": ("missing.jsonl", "empty", "other.json", "a pipe", "/dev/zero"),
    "--thresholds": ("", "0:1", "0:1:0", "1:0:0.1", "nan", "0:inf:1", "2", "-1", "0:1:1e-9", "a,b"),
    "--pace": ("-1", "11", "nan", "slow", ""),
    "--url": ("", "nowhere", "ftp://host/v1", "http://", "http://host:port"),
    "--strategies": ("", "sdp", ",", "spd,,threshold"),
    "--max-steps": ("0", "-1", "0.5", "nan"),
    "--no-such-option": ("1",),
}
wrong = st.sampled_from(
    [
        (command, option, value)
        for option, wrongs in WRONG.items()
        for value in wrongs
        for command in TRIED
        if option.startswith("--no-")
        or any(option in each.opts for each in COMMANDS[command].params)
    ]
)


@fuzz(60, wrong=wrong, others=st.sampled_from(((), ("--json",), ("--device", "cpu"))))
def test_a_wrong_value_of_an_option_is_refused(
    no_work: None, wrong: tuple[str, str, str], others: tuple[str, ...]
) -> None:
    command, option, value = wrong
    kept = [] if command == "train" and others[:1] == ("--device",) else others
    ended = run([command, *VALID[command], *kept, option, value])
    if ended.code != 2:
        raise Fault(f"dmax {command} accepted {option} {value!r:.40}")


@fuzz(
    20,
    words=st.lists(
        st.sampled_from((*TRIED, *WORDS, *NUMBERS, "--help", "--json", "-m")),
        min_size=1,
        max_size=4,
    ),
)
def test_words_in_any_order(no_work: None, words: list[str]) -> None:
    run(words)
