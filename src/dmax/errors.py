"""The one error type for anything a user can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input, said in one sentence; `hint` says what to do about it. Commands print both and exit with code 2."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


def did_you_mean(name: str, choices: Iterable[str]) -> str | None:
    """A hint naming the choice nearest to a mistyped name, or None if nothing is near."""
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f"did you mean `{near[0]}`?" if near else None
