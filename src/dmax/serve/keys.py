"""The keys of a server: where they come from, and whether a request carries one of them."""

from __future__ import annotations

import hmac
import logging
import os
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from dmax.errors import InputError, shorten, translated
from dmax.files import check_readable

logger = logging.getLogger(__name__)

VARIABLE = "DMAX_API_KEY"
KEY = re.compile(r"[!-~]+")  # what a header carries as it is: ASCII without spaces


class Keys:
    """The keys that open a server; without any it is open.

    Only digests are kept, so no key can reach a log, a traceback or a client from here.

    Args:
        keys: as clients send them.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def admit(self, key: bytes) -> bool:
        """Whether a key is one of these, in a time that tells nothing about them.

        Digests have one length, each is compared in constant time, and all are compared.
        """
        given = sha256(key).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


def read_keys(file: Path | None, environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The keys of a file, one a line, and those of the variable `DMAX_API_KEY`, between commas.

    Blank lines mean nothing, nor do lines that begin with `#`. Without an `environment` it is that
    of the process, as it is now: `datasets` puts another object in the place of `os.environ`.

    Raises:
        InputError: the file cannot be read, something is no key, or file or variable are given and
            hold none: a server that somebody meant to close must not stay open.
    """
    keys: list[str] = []
    if file is not None:
        keys += _checked(shorten(str(file)), _lines(file))
    given = (os.environ if environment is None else environment).get(VARIABLE)
    if given is not None:
        keys += _checked(VARIABLE, [(VARIABLE, text) for text in given.split(",")])
    return tuple(dict.fromkeys(keys))


def _lines(file: Path) -> list[tuple[str, str]]:
    """The lines of a file that are no comments, each after its place."""
    shown = shorten(str(file))
    with translated():
        check_readable(file)
        text = file.read_bytes().decode("utf-8-sig", errors="replace")
        mode = file.stat().st_mode
    if os.name == "posix" and mode & 0o077:
        logger.warning("other users may read the keys in %s: chmod 600 %s", shown, shown)
    lines = enumerate(text.splitlines(), 1)
    return [(f"{shown}:{number}", line) for number, line in lines if not line.startswith("#")]


def _checked(source: str, texts: Sequence[tuple[str, str]]) -> list[str]:
    """The keys among texts, each of which comes after its place; no error shows one."""
    found = [(where, text.strip()) for where, text in texts if text.strip()]
    for where, key in found:
        if not KEY.fullmatch(key):
            raise InputError(
                f"{where}: a key must be ASCII without spaces", hint="write one key a line"
            )
    if not found:
        raise InputError(f"{source} holds no key", hint="give it one, or leave it out")
    return [key for _, key in found]
