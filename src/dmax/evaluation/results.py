"""The files of an evaluation: an interrupted run goes on, and a finished one is not lost.

`a.json` is the summary, `a.samples.jsonl` has one sample a line. Both are written when the run is
complete, each whole or not at all. Until then `a.partial.jsonl` holds the settings of the run in
its first line and the finished samples below it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from dmax.errors import InputError, shorten, show
from dmax.evaluation.run import FinishedSample, Sample, Summary
from dmax.files import (
    append,
    changes,
    check_ours,
    check_writable,
    drop_unfinished_line,
    read_lines,
    write_atomically,
)
from dmax.outputs import Cost, as_record

# Types of the fields of a sample's line; `cost` stands in it as its own fields.
TYPES: dict[str, Any] = {
    "index": int,
    "seconds": float,
    **get_type_hints(Sample),
    **get_type_hints(Cost),
}
OPENING = b'{"index": '  # of the line of a sample
SECONDS_ONLY = frozenset(
    f"environment.{name}" for name in "date threads ray replicas gpus_per_replica".split()
)
"""Settings that change how long a run takes, and no other figure."""
NUM_SHOWN = 3  # differences that an error names
ANEW = "choose another output, or start anew with --overwrite"


class ResultFiles:
    """The journal of one run (`run.evaluate`), and its results.

    Args:
        path: of the summary. The other files lie beside it.
        overwrite: replace what is there. A finished run is replaced once the new one is complete,
            an interrupted run of other settings when the first new samples are there.
        report: told how much an interrupted run had finished.

    Raises:
        InputError: a finished run is there, or a file of something else, or the files cannot be
            written.
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
        check_ours(self.summary, "accuracy", "interval", "tpf")
        check_ours(self.samples, "prompt", "output", "is_correct")
        # An interruption between the two results leaves the samples beside the partial file, from
        # which both are written again.
        only_samples = self.samples.exists() and not self.partial.exists()
        is_finished = self.summary.exists() or only_samples
        if is_finished and not overwrite:
            held = self.summary if self.summary.exists() else self.samples
            raise InputError(
                f"{held} holds the results of a finished run",
                hint="choose another output, or replace it with --overwrite",
            )

    def begin(self, settings: Mapping[str, Any]) -> list[FinishedSample]:
        """What an interrupted run of these settings has finished; nothing is written yet.

        Raises:
            InputError: the interrupted run had other settings, or the file is not one of ours.
        """
        self._settings = json.loads(json.dumps(settings))  # as they come back from the file
        if not self.partial.exists():
            return []
        previous, finished = _read_partial(self.partial)
        changed = list(differences(previous, self._settings))
        if changed and self._overwrite:
            return []  # `append` replaces the file
        if changed:
            shown = ", ".join(changed[:NUM_SHOWN])
            num_more = len(changed) - NUM_SHOWN
            more = f" and {num_more} more" if num_more > 0 else ""
            raise InputError(
                f"{self.partial} is an interrupted run with other settings: {shown}{more}",
                hint=ANEW,
            )
        drop_unfinished_line(self.partial)
        self._is_begun = True
        self._report(
            f"going on with an interrupted run: {len(finished)} samples are finished already"
        )
        return finished

    def append(self, finished: Sequence[FinishedSample]) -> None:
        """Write finished samples down; the first ones of a new run begin a new file.

        Raises:
            InputError: the file cannot be written, or the disk is full.
        """
        lines = _json_lines(
            {"index": each.index, **as_record(each.sample), "seconds": each.seconds}
            for each in finished
        )
        if not self._is_begun:
            first_line = _json_lines([{"settings": self._settings}])
            write_atomically(self.partial, first_line + lines)
            self._is_begun = True
            return
        append(self.partial, lines)

    def finish(self, summary: Summary, samples: Sequence[Sample]) -> None:
        """Write the results of the complete run, and remove the partial file.

        Raises:
            InputError: the files cannot be written. Running the command again then only writes.
        """
        write_atomically(self.samples, _json_lines(as_record(sample) for sample in samples))
        record = json.dumps(as_record(summary), indent=2, ensure_ascii=False)
        write_atomically(self.summary, f"{record}\n")
        self.partial.unlink(missing_ok=True)


def differences(previous: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two settings, in words, but for `SECONDS_ONLY`."""
    for name, old, new in changes(previous, now):
        if name not in SECONDS_ONLY:
            yield f"{shorten(name)} was {show(old)} and is {show(new)}"


def _json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _read_partial(file: Path) -> tuple[dict[str, Any], list[FinishedSample]]:
    """Settings and samples of an interrupted run; raises `InputError` if the file is not ours."""
    lines, rest = read_lines(file)
    try:
        first, *others = lines
        settings: dict[str, Any] = dict(json.loads(first)["settings"])
        finished = [_finished_sample(json.loads(line)) for line in others]
        is_ours = rest.startswith(OPENING) or OPENING.startswith(rest)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        is_ours = False
    if not is_ours:
        raise InputError(f"{file} is not an interrupted run of dmax", hint="choose another output")
    return settings, finished


def _finished_sample(line: dict[str, Any]) -> FinishedSample:
    """The sample of a line; raises `TypeError` or `KeyError` if the line is none of ours."""
    for name, value in line.items():
        if not isinstance(value, TYPES[name]):
            raise TypeError
    index = line.pop("index")
    seconds = line.pop("seconds")
    cost = Cost(**{name: line.pop(name) for name in Cost.__slots__})
    return FinishedSample(index, Sample(**line, cost=cost), seconds)
