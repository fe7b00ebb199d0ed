"""The one error type for anything a user can put right, and how its messages name things."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from typing import Any

# Packages that read what a user has written, by the first part of their name: what they raise is
# about that.
READERS = frozenset("huggingface_hub httpx jinja2 json safetensors yaml".split())
NAME_LIMIT = 200  # characters of a name or a value in a message


class InputError(ValueError):
    """Bad input, said in one sentence.

    `str(error)` is the message, with the hint as a second paragraph. Commands print it and exit
    with code 2.

    Attributes:
        message: what is wrong, with the value that was given; one printable line.
        hint: how to mend it, printable too; None if that is not known.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = printable(message)
        self.hint = printable(hint) if hint else None

    def __str__(self) -> str:
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message


def one_line(error: InputError) -> str:
    """An error with its hint, for a response that has room for one line."""
    return f"{error.message}; {error.hint}" if error.hint else error.message


class TooLong(InputError):
    """Input that is longer than what there is room for."""


@contextmanager
def translated() -> Iterator[None]:
    """Raise as `InputError` what a dependency or the system says about a user's input.

    The boundary of what users call. Errors are better told where the input is read, since there it
    is known what was expected.
    """
    try:
        yield
    except Exception as error:
        known = translate(error)
        if known is None or known is error:
            raise
        raise known from error


def translate(error: Exception) -> InputError | None:
    """What an error says about a user's input or machine; None for one that is ours to mend."""
    if isinstance(error, InputError):
        return error
    reason = first_line(error)
    if isinstance(error, OSError) and error.strerror:
        where = "input or output" if error.filename is None else error.filename
        return InputError(f"{shorten(str(where))}: {error.strerror}")
    if isinstance(error, RecursionError):
        return InputError("the input is nested too deeply")
    if isinstance(error, UnicodeError):
        return InputError(f"the input is not valid Unicode: {reason}")
    if type(error).__module__.partition(".")[0] in READERS:
        return InputError(f"the input cannot be read: {reason}")
    return None


def load_plugin(name: str, entry: str) -> Any:
    """What an entry point names, of this package or of a plugin.

    Args:
        name: of the entry point.
        entry: where it is, as "module:name".

    Raises:
        InputError: it is a plugin's and cannot be loaded.
    """
    try:
        return EntryPoint(name, entry, "").load()
    except Exception as error:  # a plugin is anybody's code
        if entry.startswith("dmax."):
            raise
        raise InputError(
            f"the plugin `{name}` ({entry}) cannot be loaded: {first_line(error)}",
            "mend or uninstall the package that it belongs to",
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says in its first line; the name of its type if it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def did_you_mean(name: object, choices: Iterable[str]) -> str:
    """A hint that names the choice nearest to a mistyped name; empty if none is near."""
    near = difflib.get_close_matches(shorten(str(name)), list(choices), n=1)
    return f"did you mean `{near[0]}`?" if near else ""


def printable(text: str) -> str:
    """A text on one line that every terminal shows as it is.

    What would move a cursor or cannot be encoded (line breaks, escapes, lone surrogates) stands
    as Python writes it.
    """
    return "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in text)


def shorten(text: str, limit: int = NAME_LIMIT) -> str:
    """A name or a foreign text on one printable line of at most `limit` characters."""
    line = printable(text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"


def show(value: object, limit: int = NAME_LIMIT) -> str:
    """A value as Python writes it, shortened, whatever its size and depth.

    `repr` alone raises for integers of more than 4300 digits and writes lists out whole.
    """
    return shorten(_Bounded(limit).repr(value), limit)


class _Bounded(reprlib.Repr):
    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxstring = self.maxother = limit

    def repr_int(self, x: int, level: int) -> str:
        digits = math.ceil(x.bit_length() * math.log10(2))
        return repr(x) if digits <= self.maxlong else f"a number of {digits} digits"
