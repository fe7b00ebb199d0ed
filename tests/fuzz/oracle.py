"""What every case is judged by: it works, or it is refused in one sentence; nothing else.

A case is one call with hostile input. `attempt` makes it under limits of time and memory, and looks
at the files around it before and after.
"""

from __future__ import annotations

import faulthandler
import hashlib
import inspect
import json
import os
import re
import resource
import signal
import stat
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import hypothesis
import pytest
from hypothesis import strategies as st

from dmax.errors import InputError

Result = TypeVar("Result")
Drawn = TypeVar("Drawn")

SECONDS = 5  # of the processor
WAITING = 60  # seconds on the wall, where other work may share the cores
MEMORY = 500 * 2**20  # bytes beyond what was in use, and four times as many that can be asked for
LONGEST = 900  # characters of a refusal with its hint
PYTHON = re.compile(  # words of the interpreter, which tell a user nothing
    r"NoneType|has no attribute|not subscriptable|unhashable|Traceback|invalid combination"
    r"|positional argument|unexpected keyword|unsupported operand"
)

CASES = int(os.environ.get("DMAX_FUZZ_CASES", 2_000))
SEED = os.environ.get("DMAX_FUZZ_SEED", "0")
LOG = os.environ.get("DMAX_FUZZ_LOG")  # faults are written there, and do not fail
ran: Counter[str] = Counter()
"""How many cases of every test were run."""
notes: list[str] = []
"""What the current case drew besides its arguments."""


class Fault(AssertionError):
    """What no input may bring about, other than an exception."""


class Hang(BaseException):
    """Out of time; no boundary for user input may swallow it."""


def attempt(action: Callable[[], Result], folder: Path | None = None) -> Result | InputError:
    """Make one call; what it returns, or the refusal that it raises.

    Args:
        action: the call.
        folder: where the call reads and writes. A refused call changes nothing there, another one
            nothing that was there before.

    Raises:
        Fault: a hang, too much memory, a changed file, or a refusal that is no sentence.
        Exception: whatever else the call raises, which is a fault too.
    """
    before = _contents(folder)
    peak = _peak_memory()
    outcome: Result | InputError
    try:
        with warnings.catch_warnings(), _limits():
            warnings.simplefilter("ignore")
            outcome = action()
    except InputError as error:
        outcome = error
        check_sentence(str(error))
        _check_no_bomb(error)
    except Hang as hang:
        raise Fault(f"took {hang}") from hang.__cause__
    grown = _peak_memory() - peak
    if grown > MEMORY:
        raise Fault(f"took {grown / 2**20:.0f} MB")
    check_unchanged(before, _contents(folder), isinstance(outcome, InputError))
    return outcome


def refused(outcome: object, reason: str) -> None:
    """Raise `Fault` unless the outcome is a refusal; `reason` says why it has to be one."""
    if not isinstance(outcome, InputError):
        raise Fault(f"accepted, although {reason}")


def draw(data: st.DataObject, strategy: st.SearchStrategy[Drawn]) -> Drawn:
    """Draw what depends on what was drawn before, and note it beside a fault."""
    drawn = data.draw(strategy)
    notes.append(repr(drawn)[:300])
    return drawn


def fuzz(cases: int, **strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test that runs so many cases of 2,000, drawn by hypothesis, and fails if it ran fewer.

    They are the same in every run, unless DMAX_FUZZ_SEED names other ones.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        wanted = max(1, round(cases * CASES / 2_000))
        name = test.__name__
        parameters = inspect.signature(test).parameters.values()
        fixtures = [each for each in parameters if each.name not in strategies]

        def run(**arguments: Any) -> None:
            @hypothesis.seed(f"{SEED} {name}")
            @hypothesis.given(**strategies)
            @hypothesis.settings(
                max_examples=wanted,
                derandomize=False,
                database=None,
                phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
                suppress_health_check=list(hypothesis.HealthCheck),
                print_blob=False,
            )
            def case(**drawn: Any) -> None:
                ran[name] += 1
                with _logged(name, drawn):
                    test(**arguments, **drawn)

            ran[name] = 0
            case()
            enough = min(wanted, cases)  # there are not ten times as many of everything
            assert ran[name] >= enough, f"ran only {ran[name]} of {enough} cases"

        made: Any = run
        made.__name__ = name
        made.__signature__ = inspect.Signature(fixtures)  # pytest reads which fixtures it needs
        made.cases = cases
        return run

    return decorate


@contextmanager
def _limits() -> Iterator[None]:
    """Stop a hang, of the processor or of waiting, and an allocation that is far too large."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    timers = {signal.SIGALRM: signal.ITIMER_REAL, signal.SIGVTALRM: signal.ITIMER_VIRTUAL}
    seconds = {signal.SIGALRM: WAITING, signal.SIGVTALRM: SECONDS}

    def stop(number: int, _: FrameType | None) -> None:
        raise Hang(f"{seconds[signal.Signals(number)]} seconds")

    handlers = {number: signal.signal(number, stop) for number in timers}
    try:
        faulthandler.dump_traceback_later(2 * WAITING, exit=True)  # of a library that holds the GIL
        resource.setrlimit(resource.RLIMIT_AS, (size + 4 * MEMORY, before[1]))
        for number, timer in timers.items():
            signal.setitimer(timer, seconds[number])
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        for number, timer in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, handlers[number])
        resource.setrlimit(resource.RLIMIT_AS, before)


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_sentence(text: str) -> None:
    """A refusal is printable, short, free of Python's own words, and at most two paragraphs."""
    paragraphs = text.split("\n\nhint: ")
    if not all(each.strip() and each.isprintable() for each in paragraphs):
        raise Fault(f"is no plain line: {text[:200]!r}")
    if len(paragraphs) > 2:
        raise Fault(f"has more than one hint: {text[:200]!r}")
    if len(text) > LONGEST:
        raise Fault(f"has {len(text)} characters: {text[:200]!r}")
    if found := PYTHON.search(text):
        raise Fault(f"speaks of `{found[0]}`: {text[:300]!r}")


def _check_no_bomb(error: BaseException) -> None:
    """A refusal must not come of an allocation that failed: it would not fail on each machine."""
    cause = error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
            raise Fault(f"asked for too much memory: {str(error)[:200]!r}")
        cause = cause.__cause__ or cause.__context__


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Kind, mode and digest of all that is in a folder, by its path there."""
    found: dict[str, tuple[int, str]] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        data = os.fsencode(os.readlink(path)) if path.is_symlink() else b""
        if stat.S_ISREG(mode):
            data = path.read_bytes()
        found[os.fspath(path.relative_to(folder))] = (mode, hashlib.sha256(data).hexdigest())
    return found


def _contents(folder: Path | None) -> dict[str, tuple[int, str]]:
    return {} if folder is None else contents(folder)


def check_unchanged(
    before: dict[str, tuple[int, str]], after: dict[str, tuple[int, str]], is_refused: bool = True
) -> None:
    """Raise `Fault` for a file that a call changed, and for a new one if it was refused."""
    changed = [name for name, entry in before.items() if after.get(name) != entry]
    new = [name for name in after if name not in before]
    if changed:
        raise Fault(f"changed {', '.join(changed)}")
    if new and is_refused:
        raise Fault(f"refused, and left {', '.join(new)} behind")


@contextmanager
def _logged(test: str, drawn: dict[str, Any]) -> Iterator[None]:
    """Write a fault to the log of an exploration in place of failing; without a log, do nothing."""
    notes.clear()
    try:
        yield
    except Exception as error:
        if LOG is None or isinstance(error, hypothesis.errors.HypothesisException):
            raise
        *_, last = traceback.extract_tb(error.__traceback__)
        record = {
            "test": test,
            "error": f"{type(error).__name__}: {error}"[:400],
            "at": f"{last.filename}:{last.lineno}",
            "case": f"{drawn} {notes}"[:2_000],
            "trace": "".join(traceback.format_exception(error))[-3_000:],
        }
        with open(LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def skip_without_limits() -> None:
    """Leave out tests where the kernel cannot limit a process as they need it."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("limits of memory are taken from /proc")
