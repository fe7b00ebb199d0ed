"""What is typed or piped in, a question or a command at a time."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dmax.cli.options import LONGEST_PROMPT
from dmax.errors import InputError

PROMPT = "> "
MORE = ". "
QUOTES = '"""'
CONTINUED = "\\"


class Lines:
    """Input of the chat: lines of a terminal or of a pipe.

    A line that ends with a backslash goes on in the next one. A line that begins with three quotes
    goes on until a line ends with three.

    Args:
        is_live: whether the terminal may be told to mark what is pasted into it; several lines of
            that are one question then.

    Attributes:
        is_terminal: whether somebody types.
    """

    def __init__(self, *, is_live: bool = False) -> None:
        self.is_terminal = _is_terminal(sys.stdin)
        self._readline: Any = None
        if self.is_terminal and _is_terminal(sys.stdout):
            with suppress(ImportError):  # it is not everywhere
                import readline

                self._readline = readline
                if is_live:
                    readline.parse_and_bind("set enable-bracketed-paste on")
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # one bad line does not end the others

    def read(self) -> str:
        """The next question or command.

        Raises:
            EOFError: there is none any more.
            InputError: it is too long, or not text.
            KeyboardInterrupt: Ctrl-C.
        """
        return read_text(self._line)

    def has_typed(self) -> bool:
        """Whether something stood behind the prompt when Ctrl-C was pressed."""
        return self._readline is not None and bool(self._readline.get_line_buffer())

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Do not show what is typed in here: it would stand within an answer."""
        if not self.is_terminal:
            yield
            return
        try:
            import termios
        except ImportError:  # not on Windows
            yield
            return
        stream = sys.stdin.fileno()
        before = termios.tcgetattr(stream)
        quiet = list(before)
        quiet[3] &= ~termios.ECHO
        termios.tcsetattr(stream, termios.TCSANOW, quiet)
        try:
            yield
        finally:
            termios.tcsetattr(stream, termios.TCSANOW, before)

    def _line(self, prompt: str) -> str:
        """A line without its end, asked for if somebody types it."""
        if self.is_terminal and _is_terminal(sys.stdout):
            return input(prompt)
        if self.is_terminal:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        return _bounded_line(sys.stdin)


def read_text(line: Callable[[str], str]) -> str:
    """A text of one line or of several that belong together.

    Args:
        line: gives the next line; called with what to show before it.

    Raises:
        EOFError: there is no line any more.
        InputError: the text is too long, or not text.
    """
    text = line(PROMPT)
    with suppress(EOFError):  # the input ends within a text, which then is all of it
        if text.startswith(QUOTES):
            text = text.removeprefix(QUOTES)
            while not text.endswith(QUOTES):
                text = _joined(text, line(MORE))
            text = text.removesuffix(QUOTES)
        else:
            while text.endswith(CONTINUED):
                text = text.removesuffix(CONTINUED)
                text = _joined(text, line(MORE))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("this line is not UTF-8 text") from None
    return text.strip("\r\n")


def _joined(text: str, more: str) -> str:
    if len(text) + len(more) > LONGEST_PROMPT:
        raise _too_long()
    return f"{text}\n{more}"


def _bounded_line(stream: Any) -> str:
    """A line of a stream, which may be longer than memory; of one that is closed there is none."""
    if stream is None:
        raise EOFError
    line = stream.readline(LONGEST_PROMPT + 1)
    if not line:
        raise EOFError
    if len(line) > LONGEST_PROMPT and not line.endswith("\n"):
        while line and not line.endswith("\n"):  # the next question begins behind it
            line = stream.readline(LONGEST_PROMPT)
        raise _too_long()
    return str(line).removesuffix("\n")


def _too_long() -> InputError:
    return InputError(f"a question has at most {LONGEST_PROMPT:,} characters")


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()
