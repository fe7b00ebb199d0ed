"""One thread owns the engines of a model; callers in any number of threads submit and wait.

    with thread.submit(requests) as call:  # leaving it cancels what has not finished
        for event in call:
            ...

Requests that are submitted together are queued together. Those of different callers share the
batch, and each is decoded as it would be alone. Why nobody waits for ever, or gets what belongs to
another:

- **Only their thread touches the engines.** Callers leave messages in its queue, and it reads them
  between two steps. Every call has a queue of its own for events, and every request a number that
  no other ever had.
- **Every request gets a last event, or its call an error.** What a strategy raises ends its own
  request. What an engine raises besides goes to all calls in progress, and all engines are dropped:
  later calls get new ones. What goes wrong while requests are queued concerns their own call. An
  engine that has nothing left to do while somebody waits for it is an error, and so is closing.
- **Queues are `SimpleQueue`s.** `put` waits for nothing, so a finalizer may call it wherever the
  garbage collector happens to run: a call that is dropped cancels itself. What it puts names
  nothing of this module, for the interpreter's exit may have taken that apart. `get` wakes up for
  signals, so Ctrl-C ends a wait.
- **An idle thread refers to its queue and nothing else.** The engines and their memory go with the
  last reference to the `EngineThread`. That ends the thread, and so does the interpreter's exit.
- **A fork has no such thread.** A child begins with new engines and a thread of its own; calls of
  its parent are errors there.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dmax.engine.request import Request
from dmax.outputs import Load, StreamEvent

if TYPE_CHECKING:
    from dmax.engine.engine import Engine

Event = StreamEvent | BaseException


class Events(Protocol):
    """Where the events of a call go, as the engine's thread gives them; `SimpleQueue` is one."""

    def put(self, event: Event) -> None:
        """Take an event, or the exception that ends the call, without waiting or raising."""


class Call:
    """The events of requests that were submitted together, until the last of them has finished.

    They come as `Engine.step` gives them, with the caller's own numbers of the requests. One thread
    at a time may read them. A call that is left or dropped is closed.

    Attributes:
        events: what has come and is not read yet; an exception ends the call.
    """

    def __init__(self, numbers: dict[int, int], inbox: SimpleQueue[Message]) -> None:
        self.events: SimpleQueue[Event] = SimpleQueue()
        self._unfinished = numbers  # those of the thread, by those of the caller
        self._inbox = inbox
        self._process = os.getpid()

    def __iter__(self) -> Call:
        return self

    def __next__(self) -> StreamEvent:
        """The next event; waits for it.

        Raises:
            InputError: a request can never fit; none of the call is decoded.
            RuntimeError: the thread was closed, or this is a fork of the process that submitted.
            BaseException: whatever an engine raised, such as a lack of memory.
        """
        if not self._unfinished:
            raise StopIteration
        if self._process != os.getpid():
            raise RuntimeError("the requests of a process cannot go on in its fork")
        event = self.events.get()
        if isinstance(event, BaseException):
            self._unfinished = {}
            raise event
        if event.kind == "finished":
            del self._unfinished[event.index]
        return event

    def cancel(self) -> None:
        """End what has not finished before the next step; its last events say "cancelled"."""
        if self._unfinished:
            numbers = list(self._unfinished.values())
            self._inbox.put(lambda thread: thread._cancel(numbers))

    def close(self) -> None:
        """Cancel what has not finished, and give no more events."""
        self.cancel()
        self._unfinished = {}

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class ThreadSettings:
    """What torch keeps for each thread, as a caller has it.

    Attributes:
        num_threads: of operations on the CPU.
        autocast: dtype that operations are cast to; None: they are not.
        queued: the end of what the caller's stream has to do; None: there are no streams.
    """

    num_threads: int
    autocast: torch.dtype | None
    queued: torch.cuda.Event | None

    @classmethod
    def of_this_thread(cls, device: torch.device) -> ThreadSettings:
        """Those of the thread that calls."""
        kind = device.type
        return cls(
            num_threads=torch.get_num_threads(),
            autocast=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            queued=torch.cuda.current_stream(device).record_event() if kind == "cuda" else None,
        )

    def adopt(self, device: torch.device) -> None:
        """Make them those of the thread that calls, but for autocast, which belongs to a step."""
        if self.num_threads != torch.get_num_threads():
            torch.set_num_threads(self.num_threads)
        if self.queued is not None:
            torch.cuda.set_device(device)
            torch.cuda.current_stream().wait_event(self.queued)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request is decoded, and who waits for it.

    Attributes:
        engine: decodes it.
        events: those of its call.
        index: the caller's number for it.
    """

    engine: Engine
    events: Events
    index: int


class EngineThread:
    """Decodes the requests of all callers in one thread, with an engine for each block length.

    The thread starts with the first request. A copy has a thread and engines of its own.

    Args:
        new_engine: makes an engine for a block length.
        block_length: of requests that name none.
        device: of the model.
    """

    def __init__(
        self, new_engine: Callable[[int], Engine], block_length: int, device: torch.device
    ) -> None:
        self._new_engine = new_engine
        self._block_length = block_length
        self._device = device
        self._begin()
        _threads.add(self)

    def _begin(self) -> None:
        """Start from nothing, at first and in a fork."""
        self._lock = threading.Lock()  # of the three below: nothing is submitted after closing
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._numbers = count()
        # What only the thread itself reads and writes.
        self._engines: dict[tuple[int, torch.dtype | None], Engine] = {}
        self._places: dict[int, Place] = {}  # by number of the request
        self._has_ended = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._new_engine, self._block_length, self._device)

    def __del__(self) -> None:
        self._inbox.put(lambda thread: thread._end())  # wakes it: it finds that nobody is left

    def adopt(self, engine: Engine) -> None:
        """Decode with an idle engine what is asked for as its maker would; before anything is."""
        autocast = ThreadSettings.of_this_thread(self._device).autocast
        self._engines[engine.block_length, autocast] = engine

    # --- what callers use ---

    def submit(self, requests: Sequence[Request], events: Events | None = None) -> Call:
        """Queue requests together; returns at once.

        Args:
            requests: of any settings. Their `index` is the caller's own; within a call no two are
                alike.
            events: takes the events in place of the call, which then gives none and only cancels.

        Raises:
            RuntimeError: the thread was closed.
        """
        numbered = [
            replace(request, index=next(self._numbers), shown=request.number)
            for request in requests
        ]
        call = Call({each.number: each.index for each in numbered}, self._inbox)
        settings = ThreadSettings.of_this_thread(self._device)
        with self._lock:
            if self._is_closed:
                raise RuntimeError("this model takes no more requests: its thread was closed")
            if self._thread is None:
                serve = partial(_serve, weakref.ref(self), self._inbox)
                thread = threading.Thread(target=serve, name="dmax engine", daemon=True)
                thread.start()
                self._thread = thread
            self._inbox.put(
                partial(
                    EngineThread._queue,
                    requests=numbered,
                    events=call.events if events is None else events,
                    settings=settings,
                )
            )
        return call

    def load(self) -> Load:
        """How busy the engines are."""
        return sum((engine.load() for engine in list(self._engines.values())), Load())

    def close(self) -> None:
        """End the thread after its current step; calls in progress raise `RuntimeError`."""
        with self._lock:
            self._is_closed = True
            self._inbox.put(EngineThread._end)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # --- what the thread does ---

    def _work(self, message: Message) -> None:
        """Heed a message, then step until nothing is left to do."""
        message(self)
        while any(engine.is_busy() for engine in self._engines.values()):
            try:
                for (_, autocast), engine in self._engines.items():
                    if engine.is_busy():
                        self._step(engine, autocast)
            except BaseException as error:  # none of it is lost: every caller raises it
                self._fail(error)
            while not self._inbox.empty():
                self._inbox.get()(self)

    def _step(self, engine: Engine, autocast: torch.dtype | None) -> None:
        """Take a step, and tell those who wait what came of it."""
        with torch.autocast(self._device.type, autocast) if autocast else nullcontext():
            events = engine.step()
        for event in events:
            place = self._places[event.index]
            if event.kind == "finished":
                del self._places[event.index]
            place.events.put(replace(event, index=place.index))
        if not engine.is_busy() and any(each.engine is engine for each in self._places.values()):
            raise RuntimeError("the engine ended without a result for every request")

    def _queue(self, requests: Sequence[Request], events: Events, settings: ThreadSettings) -> None:
        """Queue the requests of a call, all or none."""
        groups: defaultdict[Engine, list[Request]] = defaultdict(list)
        try:
            settings.adopt(self._device)
            for request in requests:
                groups[self._engine(request, settings.autocast)].append(request)
            for engine, group in groups.items():
                engine.check(group)  # of all groups, before the first is queued
            for engine, group in groups.items():
                engine.add_all(group)
                for each in group:
                    self._places[each.index] = Place(engine, events, each.number)
        except BaseException as error:  # of this call only: it raises it
            events.put(error)
            self._cancel([request.index for request in requests])

    def _engine(self, request: Request, autocast: torch.dtype | None) -> Engine:
        """The engine that decodes a request, with the memory and the graphs of earlier ones."""
        key = (request.params.block_length or self._block_length, autocast)
        if key not in self._engines:
            self._engines[key] = self._new_engine(key[0])
        return self._engines[key]

    def _cancel(self, numbers: Iterable[int]) -> None:
        """End requests at the next step, those that are still here."""
        for number in numbers:
            if number in self._places:
                self._places[number].engine.cancel(number)

    def _fail(self, error: BaseException) -> None:
        """End all calls with an error, and drop what it may have left half done."""
        for events in {place.events for place in self._places.values()}:
            events.put(_twin(error))
        self._places.clear()
        self._engines.clear()

    def _end(self) -> None:
        """Do nothing any more."""
        self._fail(RuntimeError("the thread of this model was closed"))
        self._has_ended = True


Message = Callable[[EngineThread], None]


def _twin(error: BaseException) -> BaseException:
    """A copy of the error for each caller, since raising one adds to its traceback."""
    twin = type(error).__new__(type(error), *error.args)
    twin.__dict__.update(error.__dict__)
    twin.__cause__ = error.__cause__
    twin.__context__ = error.__context__
    twin.__suppress_context__ = error.__suppress_context__
    return twin.with_traceback(error.__traceback__)


def _serve(owner: weakref.ref[EngineThread], inbox: SimpleQueue[Message]) -> None:
    """What the thread runs; while it waits it keeps nothing alive."""
    while True:
        message = inbox.get()
        thread = owner()
        if thread is None:
            return
        thread._work(message)
        if thread._has_ended:
            return
        del thread, message


_threads: weakref.WeakSet[EngineThread] = weakref.WeakSet()


def _close_all() -> None:
    """End every thread before the interpreter takes torch apart."""
    for thread in list(_threads):
        thread.close()


def _begin_all() -> None:
    """Have every model start from nothing."""
    for thread in list(_threads):
        thread._begin()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_all)
