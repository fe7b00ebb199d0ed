"""The files of an evaluation: they grow while it runs, an interrupted run goes on, a finished one is not lost.

`a.json` is the summary, `a.samples.jsonl` a sample a line; both are written when the run is
complete, each whole or not at all. Until then `a.partial.jsonl` has the run's settings in its first
line and what is finished below it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmax.errors import InputError
from dmax.evaluation.run import Finished, Sample, Summary
from dmax.files import check_writable, write_atomically
from dmax.outputs import Cost, as_record

SHOWN = 3  # differences that an error names
ANEW = "choose another output, or start anew with --overwrite"


class ResultFiles:
    """The journal of one run (`run.evaluate`) and its results.

    Args:
        path: of the summary; the other files lie beside it.
        overwrite: replace a finished run once this one is complete, and an interrupted run of other
            settings when the first new samples are there.
        report: told how much an interrupted run had finished.

    Raises:
        InputError: a finished run is there, or the place cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        overwrite: bool = False,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        check_writable(path)
        stem = path.stem if path.suffix == ".json" else path.name
        self.summary = path
        self.samples = path.with_name(f"{stem}.samples.jsonl")
        self.partial = path.with_name(f"{stem}.partial.jsonl")
        self._overwrite = overwrite
        self._report = report
        self._settings: Mapping[str, Any] = {}
        self._is_begun = False
        # An interruption between the two results leaves the samples, and the journal that both are
        # written from.
        is_finished = self.summary.exists() or (self.samples.exists() and not self.partial.exists())
        if is_finished and not overwrite:
            raise InputError(
                f"{self.summary if self.summary.exists() else self.samples} holds the results of a finished run",
                hint="choose another output, or replace it with --overwrite",
            )

    def begin(self, settings: Mapping[str, Any]) -> list[Finished]:
        """What an interrupted run of these settings has finished; nothing is written yet.

        Raises:
            InputError: the interrupted run had other settings, or the file is not one of ours.
        """
        self._settings = json.loads(json.dumps(settings))  # as they come back from the file
        if not self.partial.exists():
            return []
        try:
            records = self._held()
        except InputError:
            if self._overwrite:
                return []  # the first samples take its place
            raise
        self._is_begun = True
        self._report(
            f"going on with an interrupted run: {len(records)} samples are finished already"
        )
        return records

    def _held(self) -> list[Finished]:
        previous, records = _read(self.partial)
        if others := list(differences(previous, self._settings)):
            more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
            raise InputError(
                f"{self.partial} is an interrupted run with other settings: {', '.join(others[:SHOWN])}{more}",
                hint=ANEW,
            )
        return records

    def append(self, records: Sequence[Finished]) -> None:
        """Write finished samples down; the first of a new run bring its settings along."""
        lines = _lines(
            {"index": r.index, **as_record(r.sample), "seconds": r.seconds} for r in records
        )
        if not self._is_begun:
            write_atomically(self.partial, _lines([{"settings": self._settings}]) + lines)
            self._is_begun = True
            return
        try:
            with self.partial.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise InputError(
                f"cannot write {self.partial}: {error.strerror}", hint="free some space"
            ) from None

    def finish(self, summary: Summary, samples: Sequence[Sample]) -> None:
        """Write the results of the complete run and remove what was kept for going on.

        Raises:
            InputError: the place cannot be written; running the command again then only writes.
        """
        write_atomically(self.samples, _lines(as_record(sample) for sample in samples))
        write_atomically(
            self.summary, json.dumps(as_record(summary), indent=2, ensure_ascii=False) + "\n"
        )
        self.partial.unlink(missing_ok=True)


def differences(
    previous: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """What differs between two settings, in words; when they were written down does not count."""
    for name in dict.fromkeys([*previous, *now]):
        old = previous.get(name)
        new = now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{prefix}{name}.")
        elif old != new and prefix + name != "environment.date":
            yield f"{prefix}{name} was {old!r} and is {new!r}"


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _read(file: Path) -> tuple[dict[str, Any], list[Finished]]:
    """Settings and samples of an interrupted run; a last line that was cut off is removed from the file."""
    data = file.read_bytes()
    end = data.rfind(b"\n") + 1
    try:
        first, *lines = data[:end].split(b"\n")[:-1]  # texts may hold other separators of lines
        settings: dict[str, Any] = json.loads(first)["settings"]
        records = [_record(json.loads(line)) for line in lines]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file} is not an interrupted run of dmax", hint=ANEW) from None
    if end != len(data):
        os.truncate(file, end)
    return settings, records


def _record(line: dict[str, Any]) -> Finished:
    index = line.pop("index")
    seconds = line.pop("seconds")
    cost = Cost(**{name: line.pop(name) for name in Cost.__slots__})
    return Finished(index, Sample(**line, cost=cost), seconds)
