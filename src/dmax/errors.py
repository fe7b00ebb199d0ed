"""The one error type for anything a user can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input, said in one sentence.

    Commands print it and exit with code 2; `str(error)` is the message and, as a second paragraph,
    the hint.

    Attributes:
        message: what is wrong, with the value that was given.
        hint: what to do about it, if that is known.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or None

    def __str__(self) -> str:
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A hint that names the choice nearest to a mistyped name; empty if none is near."""
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f"did you mean `{near[0]}`?" if near else ""
