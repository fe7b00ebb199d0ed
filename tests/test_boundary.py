"""How commands end: in one sentence, at a signal, with a closed pipe or a full disk; never wild."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from safetensors import SafetensorError, safe_open
from test_cli import Dmax, assert_refused, dmax_fixture  # noqa: F401  (fixture)
from test_llm import folder_fixture  # noqa: F401  (fixture)

import dmax_command
from dmax import LLM, InputError
from dmax.cli import options
from dmax.errors import translate, translated
from dmax.params import MOST_PROBLEMS

# Commands run in other folders, with the sources that are tested.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(dmax_command.__file__).parent), "TERM": "xterm"}
MAIN = "from dmax_command import main; main()"


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", MAIN, *words]


def caught(call: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as info:  # noqa: PT011  # of any type
        call()
    return info.value


# --- what is whose ----------------------------------------------------------------------------


def test_what_dependencies_say_about_input_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 16)
    (tmp_path / "a.json").write_text("[" * 200_000)
    errors = {
        "a.txt: No such file or directory": caught((tmp_path / "a.txt").read_text),
        "Is a directory": caught(tmp_path.read_bytes),
        "input or output: No space left on device": OSError(
            errno.ENOSPC, "No space left on device"
        ),
        "nested too deeply": caught(lambda: json.loads((tmp_path / "a.json").read_text())),
        "not valid Unicode": caught("\udcff".encode),
        "cannot be read: Expecting value": caught(lambda: json.loads("x")),
        "cannot be read: while parsing": caught(lambda: yaml.safe_load("[")),
        "cannot be read: unexpected '}'": caught(lambda: jinja2.Template("{{ } }}")),
        "cannot be read: Error while deserializing header": caught(
            lambda: safe_open(tmp_path / "a.safetensors", "np")
        ),
    }
    assert any(isinstance(error, SafetensorError) for error in errors.values())
    for said, error in errors.items():
        known = translate(error)
        assert known is not None and said in known.message
        assert "\n" not in known.message


@pytest.mark.parametrize("error", [KeyError(0), TypeError("x"), ValueError("x"), RuntimeError()])
def test_everything_else_is_a_bug(error: Exception) -> None:
    @translated()
    def fails() -> None:
        raise error

    assert translate(error) is None
    assert caught(fails) is error


def test_callers_of_the_library_get_the_sentence_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "x.bin")

    def fails(*_: Any, **__: Any) -> None:
        raise full

    llm = LLM(folder)
    monkeypatch.setattr("dmax.llm.load_checkpoint", fails)
    with pytest.raises(InputError, match="x.bin: No space left on device") as info:
        LLM(folder)
    assert info.value.__cause__ is full
    monkeypatch.setattr(LLM, "request", fails)
    with pytest.raises(InputError, match="x.bin: No space left on device"):
        llm.generate("Hi")
    with pytest.raises(InputError, match="x.bin: No space left on device"):
        next(llm.stream("Hi"))


# --- in one sentence --------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["generate", "Hi"], ["eval", "-o", "a.json"]])
def test_a_command_in_a_folder_that_is_gone(tmp_path: Path, words: list[str]) -> None:
    place = tmp_path / "gone"
    place.mkdir()
    done = subprocess.run(
        ["sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh", *command(*words)],
        cwd=place,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the current folder is gone\n\nhint: change to another one\n"


@pytest.mark.parametrize("words", [("-o", "other.json"), ("-o", "a.jsonl", "-m", "tiny-bse")])
def test_a_million_problems_are_not_drawn_in_vain(
    dmax: Dmax,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text('{"of": "another program"}\n')

    def draw(*_: Any, **__: Any) -> None:
        raise AssertionError("problems were drawn")

    monkeypatch.setattr("dmax.distill.prompts.problems", draw)
    assert_refused(dmax("distill", "--num", MOST_PROBLEMS, *words))


def test_a_bug_is_called_one_and_keeps_its_traceback(
    dmax: Dmax,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise KeyError("a\nname")

    monkeypatch.setattr(LLM, "__init__", fails)
    result = dmax("generate", "Hi")
    assert (result.code, result.out) == (1, "")
    said = result.err.splitlines()
    assert said[1] == "error: dmax failed with a bug of its own: KeyError: 'a\\nname'"
    assert "Traceback" not in result.err and "--debug" in result.err
    for words in (("--debug", "generate", "Hi"), ("generate", "Hi", "--debug")):
        shown = dmax(*words)
        assert shown.code == 1
        assert "Traceback" in shown.err and "in fails" in shown.err
    refused = dmax("generate", "Hi", "--threshold", "2", "--debug")
    assert refused.code == 2 and "Traceback" in refused.err
    assert "bug" in dmax("generate", "--", "--debug").err  # a prompt
    for words in (("--debug",), ("--debug", "generate", "--threshold", "high")):
        assert "Traceback" not in dmax(*words).err


def test_too_little_memory_is_no_bug(
    dmax: Dmax,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torchs = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    library = "_x.so: failed to map segment from shared object"
    for error in (MemoryError(), RuntimeError(torchs), ImportError(library)):

        def fails(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(LLM, "__init__", fails)
        assert_refused(dmax("generate", "Hi"), "there is not enough memory", "smaller batch")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("eval --limit 1e99", "--limit"),
        ("eval --limit 99999999999999999999", "--limit"),
        ("eval --batch-size 1000000000", "--batch-size"),
        ("eval --seed 99999999999999999999999", "--seed"),
        ("eval --top-k 1000000000", "`top_k` must be a whole number between 1 and 1024"),
        ("distill -o a.jsonl --num 1000000000", "--num"),
        ("generate Hi --temperature 1e308", "`temperature` must be a number between 0 and 1000"),
        ("generate Hi --option x=" + "[" * 200_000, "nested too deeply"),
        ("generate Hi --option " + "x" * 10**7, "`--option` must be NAME=VALUE"),
        ("generate Hi --option x=" + "9" * 10_000, "has no option `x`"),
        ("generate Hi --model " + "x" * 10**6, "error: `xxx"),
        ("generate Hi --device \udcff", "unknown device"),
        ("generate Hi --device cpu:3", "unknown device 'cpu:3'"),
        ("generate Hi --device cuda:99", "not available"),
        ("generate Hi --device meta", "not available"),
        ("generate Hi --dtype " + "x" * 10**6, "unknown dtype"),
        ("eval --task \udcff", "unknown task"),
        ("eval --output /dev/full", "it is a device or a pipe"),
        ("bench --output /dev/full", "it is a device or a pipe"),
        ("sweep -m tiny-dmax -o s --thresholds 0:1:1e-9", "at most 1001 values"),
        ("sweep -m tiny-dmax -o s --thresholds " + "0," * 10**6, "at most 1001 values"),
        ("sweep -m tiny-dmax -o s --thresholds nan", "`threshold` must be a number"),
        ("sweep -m tiny-dmax -o s --strategies ,", "unknown strategy ''"),
        ("--nope", "--nope"),
        ("x" * 10**7, "No such command"),
        ("eval --limit " + "9" * 10**7, "--limit"),
    ],
    ids=lambda value: value[:40].encode("ascii", "replace").decode(),
)
def test_options_of_the_wrong_shape(
    dmax: Dmax,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = dmax(*words.split(" "))
    assert_refused(result, said)
    assert len(result.err) < 3000
    assert list(tmp_path.iterdir()) == []


def test_prompts_from_stdin_are_bounded(
    dmax: Dmax,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(options, "LONGEST_PROMPT", 100)
    assert_refused(dmax("generate", stdin="a" * 101), "longer than 100 characters")
    with Path("/dev/zero").open(encoding="utf-8") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        with pytest.raises(InputError, match="longer than 100 characters"):
            options.read_prompts(None)
    monkeypatch.setattr(sys, "stdin", None)  # closed
    with pytest.raises(InputError, match="no prompt given"):
        options.read_prompts(None)


def test_names_are_shown_as_they_are(
    dmax: Dmax,
    folder: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "[red]a[/]:smile:"
    words = ("distill", "-m", folder, "--num", "1", "-o", output, "--max-new-tokens", "4")
    assert str(output) in dmax(*words).out
    assert_refused(dmax("generate", "Hi", "-m", "[/nothing]"), "[/nothing]")


# --- extras and startup -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "module"),
    [
        (("sweep", "-m", "tiny-dmax", "-o", "s"), "matplotlib"),
        (("lm_eval", "--tasks", "gsm8k"), "lm_eval"),
        (("train", "recipe.yaml"), "accelerate"),
        (("eval", "--task", "gsm8k"), "math_verify"),
    ],
)
def test_a_missing_extra_is_named_before_anything_is_loaded(
    dmax: Dmax,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    module: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(LLM, "__init__", None)
    result = dmax(*words)
    assert_refused(result, f"needs the package `{module.replace('_', '-')}`", "pip install ")
    assert "loading" not in result.err or words[0] == "eval"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["sweep", "--help"]])
def test_help_waits_for_nothing(words: list[str]) -> None:
    program = (
        "import atexit, sys, time\n"
        "def tell():\n"
        "    heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "    sys.stderr.write(f'{time.process_time():.2f} {sorted(heavy)}')\n"
        "atexit.register(tell)\n"
        f"{MAIN}"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=True
    )
    seconds, heavy = done.stderr.split(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < 1  # 0.2 on a machine with time
    assert done.stdout.startswith("dmax 0.") or "Usage: dmax" in done.stdout


@pytest.mark.parametrize("words", [["generate", "Hi"], ["eval"], ["distill", "-o", "a"], ["demo"]])
def test_a_command_says_what_it_does_before_it_loads_torch(words: list[str]) -> None:
    program = (
        "import os, sys\n"
        "class End:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': os._exit(7)\n"
        "sys.meta_path.insert(0, End())\n"
        f"{MAIN}"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 7
    assert re.fullmatch(r"loading [\w -]+ …\n", done.stderr)


# --- pipes and signals ------------------------------------------------------------------------


def test_outputs_that_cannot_be_written() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command("--version"), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == "error: input or output: No space left on device\n"
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command("--version")],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert closed.returncode == 2
    assert closed.stderr.startswith("error: stdout is closed\n")
    for words in (["nonsense"], ["generate", "--max-new-tokens", "2", "Hi"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(command(*words), stdout=subprocess.PIPE, stderr=full, check=False)
        assert (done.returncode, done.stdout) == (2, b"")


def test_nobody_reads_the_output() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    for word in ("--version", "--help"):
        done = subprocess.run(
            command(word), stdout=writing, stderr=subprocess.PIPE, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    done = subprocess.run(command("nonsense"), stderr=writing, check=False)
    assert done.returncode == 2
    os.close(writing)


def written(terminal: int) -> Iterator[str]:
    """What a command writes on its terminal, until it ends."""
    text = b""
    ends = time.monotonic() + 300
    while time.monotonic() < ends:
        ready, _, _ = select.select([terminal], [], [], 1)
        try:
            text += os.read(terminal, 4096) if ready else b""
        except OSError:  # the other side is closed
            yield text.decode(errors="replace")
            return
        yield text.decode(errors="replace")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    words = "eval -m tiny-dmax --limit 2000 --batch-size 1 --max-new-tokens 32 -o a.json"
    terminal, side = pty.openpty()
    child = subprocess.Popen(
        command(*words.split()), stdin=side, stdout=side, stderr=side, cwd=tmp_path, env=ENVIRONMENT
    )
    os.close(side)
    text = ""
    is_told = False
    for text in written(terminal):
        if not is_told and re.search(r" ([89]|\d\d+)/2000", text):  # of the bar
            child.send_signal(number)
            is_told = True
    os.close(terminal)
    child.kill()  # if it goes on
    assert child.wait() == 128 + number, text
    assert "loading tiny-dmax …" in text
    assert "Traceback" not in text
    closing = text[text.rindex("interrupted; finished samples are kept in a.partial.jsonl") :]
    assert "the same command goes on" in re.sub(r"\s+", " ", closing)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    assert (tmp_path / "a.partial.jsonl").read_text().count("\n") >= 5
