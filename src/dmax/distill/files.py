"""The files of a distillation: an interrupted run goes on, and nothing is answered twice.

**One file.** `a.jsonl` grows line by line. Beside it, `a.dropped.jsonl` holds what the filters
dropped, each line with its reason, and `a.manifest.json` what the responses depend on.

**A folder of shards.** `train-00000.jsonl`, `train-00001.jsonl`, … appear when they are whole. The
lines of the next one stand in `partial.jsonl`, beside `dropped.jsonl` and `manifest.json`.
`datasets.load_dataset(folder)` reads the shards and passes over the others.

Lines are on their way to the disk before the next responses are waited for, so that a killed
process loses what it was decoding, and nothing else. Responses that are finished together are
appended to a file at once.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dmax.distill.prompts import WHOLE, Part
from dmax.distill.responses import Answer, Prompt, Refusal
from dmax.errors import InputError, shorten, show
from dmax.files import (
    append,
    changes,
    check_ours,
    check_writable,
    drop_unfinished_line,
    read_lines,
    read_record,
    write_atomically,
    writing,
)

OPENING = b'{"index": '
"""How every line begins."""
NUMBERED = re.compile(rb'\{"index": (\d{1,18}), ')
KEY = "dmax"
"""What every manifest has, also one of an earlier version: who wrote it."""
ANEW = "choose a new output, or move the earlier one away"


@dataclass(frozen=True, slots=True)
class Entry:
    """What is written down of a prompt.

    Attributes:
        index: its number.
        prompt: what was asked.
        answer: what came back.
        reason: why that is dropped, in a word; None if it is kept.
    """

    index: int
    prompt: Prompt
    answer: Answer
    reason: str | None


@dataclass(slots=True)
class Tally:
    """What has been answered, before a run was interrupted and since then.

    Attributes:
        done: numbers of the prompts.
        kept: how many responses are kept.
        dropped: how many are not, by the reason.
        tokens: generated in all of them, as far as they were counted.
        forwards: denoising forwards that took, as far as they were counted.
    """

    done: set[int] = field(default_factory=set)
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    forwards: int = 0

    def add(self, entry: Entry) -> None:
        """Count a prompt that has just been settled."""
        answer = entry.answer
        counts = (None, None) if isinstance(answer, Refusal) else (answer.tokens, answer.forwards)
        self.count(entry.index, *counts, entry.reason)

    def count(
        self, index: int, tokens: int | None, forwards: int | None, reason: str | None
    ) -> None:
        """Count the response to prompt `index`; a `reason` is why it is dropped."""
        self.done.add(index)
        self.tokens += tokens or 0
        self.forwards += forwards or 0
        if reason is None:
            self.kept += 1
        else:
            self.dropped[reason] += 1


class ResponseFiles:
    """Where the responses of one run go.

    Args:
        output: a JSONL file, or a folder if there is a `shard_size`.
        shard_size: responses of a shard; None: all in one file.
        part: which of the prompts this process answers. Parts share a folder, and their files have
            names of their own. Each needs an output file of its own.

    Raises:
        InputError: there is a folder in the place of the file, or the other way round.
    """

    def __init__(self, output: Path, shard_size: int | None = None, part: Part = WHOLE) -> None:
        is_folder = shard_size is not None
        if output.is_dir() and not is_folder:
            raise InputError(
                f"cannot write {shorten(str(output))}: it is a folder",
                hint="name a file, or give --shard-size for a folder of shards",
            )
        if output.is_file() and is_folder:
            raise InputError(
                f"cannot write shards to {shorten(str(output))}: it is a file",
                hint="name a folder, or leave out --shard-size",
            )
        name = "" if part == WHOLE else f"-{part.index}-of-{part.count}"
        self.output = output
        self.part = part
        self.journal = output / f"partial{name}.jsonl" if is_folder else output
        self.dropped = _beside(output, "dropped.jsonl", name if is_folder else None)
        self.manifest = _beside(output, "manifest.json", name if is_folder else None)
        self._lock = self.journal.with_name(f".{self.journal.name}.lock")
        self._shard = f"train{name}-"
        self._shard_size = shard_size
        self._num_lines = 0  # of the journal
        self._settings: dict[str, Any] | None = None  # those to begin with

    def check(self) -> None:
        """Make sure that a run can write here, or go on; asked before there are any prompts.

        Raises:
            InputError: a file cannot be written, is not of a distillation, or nothing says what its
                responses depend on. A manifest of something else stays as it is.
        """
        if self._shard_size is not None:
            self._check_folder()
        check_writable(self.journal)
        check_writable(self.dropped)
        for file in self._all():
            if beginning := _beginning(file):
                if beginning != OPENING:
                    raise InputError(
                        f"{shorten(str(file))}:1 is no response to a prompt",
                        hint="choose a new output",
                    )
                _read_manifest(self.manifest)
        check_ours(self.manifest, KEY)  # without responses it is replaced

    def read(self, prompts: Sequence[Prompt]) -> Tally:
        """What earlier runs have answered; changes nothing.

        Raises:
            InputError: as `check`, or a file holds something that is not of these prompts.
        """
        self.check()
        tally = Tally()
        for file in self._all():
            self._num_lines = self._read(file, prompts, tally)
        return tally

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing here.

        Raises:
            InputError: another one is at it.
        """
        lock = FileLock(self._lock)
        with writing(self.output):
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise InputError(
                    f"another process is writing {shorten(str(self.output))}",
                    hint="wait for it, or choose another output; --part divides the prompts",
                ) from None
        try:
            yield
        finally:
            self._lock.unlink(missing_ok=True)
            lock.release()

    def go_on(self, settings: Mapping[str, Any]) -> None:
        """Make sure that what is there, if anything, was made with the same settings.

        Nothing is written before the first response.

        Raises:
            InputError: it was not; names what differs.
        """
        self._settings = dict(settings)
        manifests = {self.manifest}
        if self._shard_size is not None:  # other parts stand in the same folder
            manifests |= set(self.output.glob("manifest*.json"))
        if not any(map(_beginning, self._all())):
            manifests.remove(self.manifest)
        for manifest in sorted(manifests):
            _check_same(manifest, settings)

    def write(self, entries: Sequence[Entry]) -> None:
        """Write responses down, each among the kept ones or among the dropped ones.

        A file grows by all of them at once, unless a shard is full.

        Raises:
            InputError: the disk is full.
        """
        self._begin()
        if dropped := [_line(entry) for entry in entries if entry.reason is not None]:
            append(self.dropped, "".join(dropped))
        kept = [_line(entry) for entry in entries if entry.reason is None]
        while kept:
            room = len(kept) if self._shard_size is None else self._shard_size - self._num_lines
            lines, kept = kept[:room], kept[room:]
            append(self.journal, "".join(lines))
            self._num_lines += len(lines)
            self._close_shard(self._shard_size)

    def finish(self) -> None:
        """Close the last shard, however many responses it has."""
        if self._num_lines:
            self._begin()
            self._close_shard(1)

    def _begin(self) -> None:
        """Before the first line: say what it depends on, and put right what a kill left behind.

        That may be a line that was cut off, and a full shard that was not closed.
        """
        if self._settings is None:
            return
        settings = json.dumps(self._settings, indent=1, ensure_ascii=False)
        write_atomically(self.manifest, settings + "\n")
        for file in (self.journal, self.dropped):
            append(file, "")
            drop_unfinished_line(file)
        self._settings = None
        self._close_shard(self._shard_size)

    def _close_shard(self, size: int | None) -> None:
        """Give the lines of the journal the name of a shard, in one step, if there are enough."""
        if self._shard_size is None or size is None or self._num_lines < size:
            return
        numbers = [int(shard.stem.removeprefix(self._shard)) for shard in self._shards()]
        shard = self.output / f"{self._shard}{max(numbers, default=-1) + 1:05d}.jsonl"
        with writing(shard):
            with self.journal.open("rb") as file:
                os.fsync(file.fileno())
            self.journal.rename(shard)
        self._num_lines = 0

    def _all(self) -> list[Path]:
        """Every file that may hold answers, the journal last."""
        return [*self._shards(), self.dropped, self.journal]

    def _shards(self) -> list[Path]:
        if self._shard_size is None:
            return []
        return sorted(self.output.glob(f"{self._shard}{'[0-9]' * 5}.jsonl"))

    def _check_folder(self) -> None:
        """Make sure that the folder holds nothing else, and no other division of the prompts."""
        if not self.output.is_dir():
            return
        shown = shorten(str(self.output))
        found = {file.name for file in self.output.iterdir() if not file.name.startswith(".")}
        manifests = {name for name in found if re.fullmatch(r"manifest.*\.json", name)}
        if found and not any(_is_ours(self.output / name) for name in manifests):
            raise InputError(f"{shown} holds something else", hint="choose a new folder")
        count = self.part.count
        of_parts = {f"manifest-{index}-of-{count}.json" for index in range(count)}
        strange = manifests - (of_parts if count > 1 else {self.manifest.name})
        if strange:
            raise InputError(
                f"the prompts of {shown} are divided otherwise, as {min(strange)} says", hint=ANEW
            )

    def _read(self, file: Path, prompts: Sequence[Prompt], tally: Tally) -> int:
        """Count what a file answers; the number of its lines."""
        lines, rest = read_lines(file)
        for number, line in enumerate(lines, 1):
            record = _parsed(line)
            try:
                index = record["index"]
                tokens, forwards = record.get("tokens"), record.get("forwards")
                reason = record["reason"] if file == self.dropped else None
                is_ours = (
                    type(index) is int
                    and index in self.part
                    and _prompt(record) == prompts[index]
                    and all(each is None or type(each) is int for each in (tokens, forwards))
                    and (reason is None or isinstance(reason, str))
                )
            except (LookupError, TypeError, AttributeError):
                is_ours = False
            if record is None:
                raise _foreign(file, number, "is no response to a prompt")
            if not is_ours:
                raise _foreign(file, number, "answers another prompt")
            if index in tally.done:
                raise _foreign(file, number, f"answers prompt {index} again")
            tally.count(index, tokens, forwards, reason)
        can_grow = file in (self.journal, self.dropped)
        if rest and not (can_grow and self._is_beginning(rest, prompts)):
            raise _foreign(file, len(lines) + 1, "is no response to a prompt")
        return len(lines)

    def _is_beginning(self, rest: bytes, prompts: Sequence[Prompt]) -> bool:
        """Whether the rest of a file is the beginning of a line of ours that was cut off."""
        numbered = NUMBERED.match(rest)
        if numbered is None:
            return OPENING.startswith(rest) or re.fullmatch(OPENING + rb"\d*,?", rest) is not None
        index = int(numbered[1])
        if index >= len(prompts) or index not in self.part:
            return False
        head = _head(index, prompts[index])
        return head.startswith(rest) or rest.startswith(head)


def _beside(output: Path, name: str, part: str | None) -> Path:
    """A file beside the responses: in their folder if `part` is a text, else next to their file."""
    stem, _, suffix = name.partition(".")
    return output.with_suffix(f".{name}") if part is None else output / f"{stem}{part}.{suffix}"


def _line(entry: Entry) -> str:
    prompt, answer = entry.prompt, entry.answer
    text = "" if isinstance(answer, Refusal) else answer.text
    record: dict[str, Any] = {"index": entry.index}
    if isinstance(prompt, str):
        record |= {"prompt": prompt, "response": text}
    else:
        record["messages"] = [*prompt, {"role": "assistant", "content": text}]
    if isinstance(answer, Refusal):
        record["error"] = answer.error.message
    else:
        counts = {"tokens": answer.tokens, "forwards": answer.forwards}
        record |= {name: count for name, count in counts.items() if count is not None}
    if entry.reason is not None:
        record["reason"] = entry.reason
    elif not isinstance(answer, Refusal) and answer.trajectory is not None:
        record["trajectory"] = answer.trajectory
    return json.dumps(record, ensure_ascii=False) + "\n"


def _head(index: int, prompt: Prompt) -> bytes:
    """The beginning of the line that answers a prompt, up to the response."""
    name = "prompt" if isinstance(prompt, str) else "messages"
    record = json.dumps({"index": index, name: prompt}, ensure_ascii=False)
    return record.removesuffix("}").removesuffix("]").encode()


def _parsed(line: bytes) -> Any:
    """What a line says; None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _foreign(file: Path, number: int, what: str) -> InputError:
    """The error to raise for a line that is not of these prompts."""
    return InputError(f"{file}:{number} {what}", hint="choose a new output")


def _prompt(record: Mapping[str, Any]) -> Any:
    """What a line answers."""
    return record["prompt"] if "prompt" in record else record["messages"][:-1]


def _beginning(file: Path) -> bytes:
    """The first bytes of a file, as many as `OPENING` has; none if it does not exist."""
    with writing(file):
        if not file.exists():
            return b""
        with file.open("rb") as opened:
            return opened.read(len(OPENING))


def _is_ours(manifest: Path) -> bool:
    """Whether a file is the manifest of a distillation; others have files of that name, too."""
    record = read_record(manifest)
    return isinstance(record, dict) and KEY in record


def _read_manifest(manifest: Path) -> dict[str, Any]:
    try:
        settings = json.loads(manifest.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{manifest} is missing, which says what wrote the responses beside it", hint=ANEW
        ) from None
    except (OSError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"{manifest} is not the manifest of a distillation", hint=ANEW)
    return settings


def _check_same(manifest: Path, settings: Mapping[str, Any]) -> None:
    differing = [
        f"`{shorten(name)}` was {show(old)} and is {show(new)}"
        for name, old, new in changes(_read_manifest(manifest), settings)
    ]
    if differing:
        raise InputError(
            f"the responses beside {manifest} are of another run: {', '.join(differing)}", hint=ANEW
        )
