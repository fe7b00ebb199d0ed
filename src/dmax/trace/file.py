"""`Trace`: a recorded run, its form as JSON, and files of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from dmax.errors import InputError, shorten, show
from dmax.files import check_readable, write_atomically
from dmax.trace import schema
from dmax.trace.page import page

FORMAT = "dmax-trace"
VERSION = 1
LARGEST = 2**28  # bytes of a file; 1,000 positions over 200 forwards take a tenth of it
IFRAME_HEIGHT = 760  # px in a notebook
LISTS = ("token_ids", "texts", "masked", "confidence", "written", "candidates")
"""What a frame has for each of its positions."""


@dataclass(frozen=True, slots=True, repr=False)
class Trace:
    """A recorded run. A notebook shows it as its page.

    Attributes:
        record: all of it, as JSON has it (docs/trace.md).
    """

    record: Mapping[str, Any]

    @classmethod
    def from_record(cls, record: Any, source: str = "the trace") -> Trace:
        """A trace from JSON that anyone may have written.

        Args:
            record: what JSON gave.
            source: what an error calls it.

        Raises:
            InputError: it is no trace, or of a version that is not known here.
        """
        _check(record, source)
        return cls(record)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """The trace that a file holds.

        Raises:
            InputError: as `load_traces`, or it holds several.
        """
        traces = load_traces(path)
        if len(traces) != 1:
            raise InputError(
                f"{shorten(str(path))} holds {len(traces)} traces",
                hint="read them with dmax.trace.file.load_traces",
            )
        return traces[0]

    def __repr__(self) -> str:
        num_tokens, num_forwards = len(self.output["token_ids"]), self.output["num_forwards"]
        run = f"{self.record['model']}, {self.record['params']['strategy']}"
        return f"<Trace of {run}: {num_tokens} tokens in {num_forwards} forwards>"

    @property
    def header(self) -> dict[str, Any]:
        """The settings of the run: everything but its frames and its output."""
        return {
            name: value for name, value in self.record.items() if name not in ("frames", "output")
        }

    @property
    def frames(self) -> Sequence[Mapping[str, Any]]:
        """Each block after each forward, in order."""
        frames: Sequence[Mapping[str, Any]] = self.record["frames"]
        return frames

    @property
    def output(self) -> Mapping[str, Any]:
        """The result and what it cost."""
        output: Mapping[str, Any] = self.record["output"]
        return output

    def to_json(self) -> str:
        """One line of JSON, in ASCII."""
        return to_json(self.record)

    def save(self, path: str | Path) -> None:
        """Write it to a file, whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        write_atomically(Path(path), self.to_json() + "\n")

    def html(self) -> str:
        """A page that plays it, in one file that needs no network."""
        return page([self.record])

    def _repr_html_(self) -> str:
        # A frame of its own: several on one page of a notebook do not meet.
        return (
            f'<iframe srcdoc="{escape(self.html())}" sandbox="allow-scripts allow-downloads" '
            f'title="dmax trace" width="100%" height="{IFRAME_HEIGHT}" '
            'style="border: 0"></iframe>'
        )


def load_traces(path: str | Path) -> list[Trace]:
    """The traces of a file: one, or a list of them as `dmax trace --compare --json` prints it.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    path = Path(path)
    shown = shorten(str(path))
    check_readable(path)
    if path.stat().st_size > LARGEST:
        raise InputError(f"{shown} is no trace: it is larger than {LARGEST >> 20} MiB")
    try:
        content = json.loads(path.read_bytes(), parse_constant=_not_finite)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown} is no trace: it is not JSON ({shorten(str(error))})") from None
    records = content if isinstance(content, list) else [content]
    if not records:
        raise InputError(f"{shown} is no trace: the list in it is empty")
    return [Trace.from_record(record, shown) for record in records]


def to_json(record: Any) -> str:
    """A trace, or a list of them, as one line of JSON in ASCII."""
    return json.dumps(record, allow_nan=False)


@cache
def json_schema() -> dict[str, Any]:
    """The JSON Schema of a trace, as docs/trace.md explains it."""
    text = files("dmax.trace").joinpath("schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _check(record: Any, source: str) -> None:
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(
            f"{source} is no trace: there is no `format` {FORMAT!r} in it",
            hint="`dmax trace PROMPT --json` prints one",
        )
    version = record.get("version")
    if isinstance(version, int) and not isinstance(version, bool) and version > VERSION:
        raise InputError(
            f"{source} is a trace of version {show(version)}, and this dmax reads up to {VERSION}",
            hint="open it with the dmax that wrote it, or a newer one",
        )
    found = schema.complaint(record, json_schema()) or _contradiction(record["frames"])
    if found:
        raise InputError(f"{source} is a damaged trace: {found}")


def _contradiction(frames: Sequence[Mapping[str, Any]]) -> str | None:
    """What frames say that cannot be, beyond what a schema can tell; None if all is well."""
    lengths: dict[int, int] = {}
    before = 0
    for number, frame in enumerate(frames):
        where = f"`frames[{number}]`"
        length = len(frame["token_ids"])
        unlike = [name for name in LISTS if name in frame and len(frame[name]) != length]
        if unlike:
            return f"{where} has {length} `token_ids` and {len(frame[unlike[0]])} `{unlike[0]}`"
        if frame["num_forwards"] < before:
            return f"{where} goes back from forward {before} to {frame['num_forwards']}"
        before = frame["num_forwards"]
        if lengths.setdefault(frame["position"], length) != length:
            return f"{where} has a block of another length than before"
    end = 0
    for position in sorted(lengths):
        if position != end:
            return f"the block before position {position} ends at {end}"
        end += lengths[position]
    return None


def _not_finite(text: str) -> float:
    raise ValueError(f"{text} is no number")
