"""How a command ends: one sentence on stderr and an exit code, whatever happens.

Codes: 0 done, 1 a bug of dmax, 2 bad input, 130 Ctrl-C, 141 nobody reads the output, 143 SIGTERM.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, TextIO

import typer
from typer.core import TyperGroup

from dmax.cli.last_words import is_unhandled, last_words
from dmax.cli.terminal import console, prepare_streams, print_error
from dmax.errors import InputError, shorten, show, translate

DEBUG = "--debug"
NUM_RANKS = re.compile(r"0*[1-9][0-9]{0,8}")
USAGE_ERROR: Any = typer.BadParameter.__base__  # typer has a copy of click, or uses one installed


class Stopped(BaseException):
    """The command was told to stop.

    Attributes:
        code: what it exits with: 128 and the number of the signal.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self.code = 128 + number


class Commands(TyperGroup):
    """The commands; what typer would end in a way of its own reaches `run`."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _noted(Stopped(signal.SIGINT), error) from error
        except BrokenPipeError as error:
            raise Stopped(signal.SIGPIPE) from error


@contextmanager
def keeping(what: str) -> Iterator[None]:
    """Say what is kept and how to go on, if the command is stopped in here."""
    try:
        yield
    except (KeyboardInterrupt, Stopped) as error:
        error.add_note(what)
        raise


def run(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run a command; the code that its process exits with."""
    with last_words() if _num_ranks() > 1 else nullcontext():
        return _run(app, arguments)


def _run(app: typer.Typer, arguments: Sequence[str]) -> int:
    arguments, is_debug = _without_debug(arguments)
    logging.getLogger("dmax").setLevel(logging.DEBUG if is_debug else logging.NOTSET)
    console.quiet = _num_ranks() > 1 and os.environ.get("RANK", "0") != "0"
    try:
        prepare_streams()
        _check_num_ranks()
        _check_current_folder()
        with _terminating():
            code = app(arguments, prog_name="dmax", standalone_mode=False)
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except Stopped as stop:
        return _end_stopped(stop)
    except BrokenPipeError:
        return _end_stopped(Stopped(signal.SIGPIPE))
    except SystemExit as end:  # rich's own way to end at a closed pipe
        if isinstance(end.__context__, BrokenPipeError):
            return _end_stopped(Stopped(signal.SIGPIPE))
        raise
    # The boundary: whatever a command raises becomes a sentence.
    except Exception as error:
        if not _speaks():
            return 1
        if is_debug and not isinstance(error, USAGE_ERROR):  # whose place is the command line
            traceback.print_exception(error)
        try:
            return _end_failed(error)
        except (OSError, SystemExit):  # stderr takes nothing either
            _drop(sys.stderr)
            return 2


def _without_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without `--debug`, which may stand anywhere before `--`; whether it did."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [each for each in arguments[:end] if each != DEBUG]
    return [*options, *arguments[end:]], len(options) < end


def _check_num_ranks() -> None:
    """Raise `InputError` if `WORLD_SIZE` is no number of processes; an empty one is as none."""
    text = os.environ.get("WORLD_SIZE", "")
    if text and not NUM_RANKS.fullmatch(text):
        raise InputError(
            f"the environment variable WORLD_SIZE must be a whole number of at least 1, "
            f"got {show(text)}",
            hint="unset it; torchrun gives it to the processes that it starts",
        )
    if not text:
        os.environ.pop("WORLD_SIZE", None)  # libraries take the empty text for a number


def _check_current_folder() -> None:
    """Raise `InputError` if the current folder was deleted; libraries end the process over it."""
    try:
        os.getcwd()
    except OSError:
        raise InputError("the current folder is gone", hint="change to another one") from None


def _end_stopped(stop: Stopped) -> int:
    if stop.code == 128 + signal.SIGPIPE:
        _drop(sys.stdout)
        return stop.code
    if not _speaks():
        return stop.code
    notes = getattr(stop, "__notes__", [])
    console.print("; ".join(["interrupted", *notes]), style="bold", soft_wrap=True)
    return stop.code


def _end_failed(error: Exception) -> int:
    if isinstance(error, OSError):
        _drop(sys.stdout)
    if isinstance(error, USAGE_ERROR):
        return _end_misused(error)
    known = translate(error) or _out_of_memory(error) or _left_alone(error)
    if known is not None:
        print_error(known.message, known.hint)
        return 2
    print_error(
        f"dmax failed with a bug of its own: {type(error).__name__}: {error}",
        hint=f"{DEBUG} shows where; please report it with the command",
    )
    return 1


def _end_misused(error: Any) -> int:
    """Say what is wrong with the options, and where they are listed; without any, list them."""
    path = error.ctx.command_path if error.ctx is not None else "dmax"
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(error.ctx.get_help() + "\n")
    else:
        print_error(shorten(error.format_message()), hint=f"{path} --help lists what it takes")
    return 2


def _out_of_memory(error: Exception) -> InputError | None:
    """The error of a machine without enough memory; torch has several kinds of its own."""
    reason = str(error)
    is_torch = isinstance(error, RuntimeError) and "alloc" in reason and "memory" in reason
    is_library = isinstance(error, ImportError) and "failed to map segment" in reason
    if not (isinstance(error, MemoryError) or is_torch or is_library):
        return None
    return InputError("there is not enough memory", hint="try a smaller batch or a smaller model")


def _num_ranks() -> int:
    """How many processes torchrun has started; 1 if `WORLD_SIZE` is no such number."""
    text = os.environ.get("WORLD_SIZE", "")
    return int(text) if NUM_RANKS.fullmatch(text) else 1


def _speaks() -> bool:
    """Whether this process says how the command ends; of several ranks, only the first does."""
    if _num_ranks() == 1:
        return True
    from dmax.training.ranks import speaks_first

    console.quiet = not speaks_first()
    return not console.quiet


def _left_alone(error: Exception) -> InputError | None:
    """The error of a rank that has lost another one; gloo and NCCL have words of their own."""
    is_lost = (
        isinstance(error, RuntimeError)
        and _num_ranks() > 1
        and any(word in str(error) for word in ("Connection", "Broken pipe", "NCCL", "gloo"))
    )
    if not is_lost:
        return None
    reason = str(error).partition("\n")[0]
    return InputError(
        f"another process of this training cannot be reached: {shorten(reason)}",
        hint="if it ended, torchrun says below how; the same command goes on from the last "
        "checkpoint",
    )


def _drop(stream: TextIO) -> None:
    """Forget what a stream still holds if nobody takes it; the exit would try once more."""
    try:
        stream.flush()
    except (OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())


def _noted(stop: Stopped, error: BaseException) -> Stopped:
    for note in getattr(error, "__notes__", []):
        stop.add_note(note)
    return stop


@contextmanager
def _terminating() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, so that bars give the cursor back."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number))

    if not is_unhandled():  # as where torchrun ends its processes
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
