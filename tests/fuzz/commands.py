"""How a command that fails must end, and the folder that commands are tried in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mutations import STAND_INS, in_place_of
from oracle import Fault, check_sentence

COLOUR = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
NOISE = re.compile(r"Traceback|Error\b|Warning\b|warn\(", flags=re.ASCII)


@dataclass(frozen=True)
class Ended:
    """How a command ended; no code means that its work would have begun."""

    code: int | None
    out: str
    err: str


def furnish(folder: Path) -> None:
    """A few files to try, valid ones and others."""
    (folder / "recipe.yaml").write_text("output_dir: out\nmodel: {path: tiny-base}\n")
    (folder / "rows.jsonl").write_text('{"question": "a", "answer": "#### 3"}\n')
    (folder / "other.json").write_text('{"of": "another program"}\n')
    (folder / "empty").mkdir()
    for what in STAND_INS:
        in_place_of(folder / what, what)


def judge(ended: Ended) -> None:
    """A command that fails says why in one sentence, prints no result, and exits with code 2.

    Lines that say what it is doing may stand before.
    """
    text = COLOUR.sub("", ended.err)
    if ended.code != 2:
        raise Fault(f"exit code {ended.code}: {text[-300:]!r}")
    if ended.out:
        raise Fault(f"refused, and printed {ended.out[:200]!r}")
    before, *said = re.split(r"(?:^|\n)error: ", text)
    if len(said) != 1 or NOISE.search(before):
        raise Fault(f"is no sentence: {text[-300:]!r}")
    check_sentence(said[0].strip("\n"))
