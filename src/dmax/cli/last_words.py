"""Time for a process of torchrun to say why it ends.

Torchrun sends SIGTERM to all processes as soon as one has failed, often before another one has seen
it or has said a word. A process that waits for others runs no Python, so a handler of its own could
not end it; a thread can.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SECONDS = 5.0  # torchrun kills after 30


def is_unhandled() -> bool:
    """Whether this thread may handle SIGTERM, and nobody else does."""
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@contextmanager
def last_words(seconds: float = SECONDS) -> Iterator[None]:
    """Let this process go on for some seconds after SIGTERM; then end it, whatever it waits for.

    Nothing changes outside of the main thread, or where somebody else handles SIGTERM.
    """
    if not is_unhandled():
        yield
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_forget)
    threading.Thread(target=_end_after, args=(heard, seconds), daemon=True).start()
    told_before = signal.set_wakeup_fd(told)
    signal.signal(signal.SIGTERM, _go_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(told_before)
        os.close(told)


def _go_on(number: int, frame: FrameType | None) -> None:
    """Do nothing; the thread has heard of the signal."""


def _end_after(heard: int, seconds: float) -> None:
    """Read numbers of signals until their pipe is closed; SIGTERM ends the process."""
    while numbers := os.read(heard, 64):
        if signal.SIGTERM in numbers:
            time.sleep(seconds)
            os._exit(128 + signal.SIGTERM)
    os.close(heard)


def _hold() -> None:
    """Let SIGTERM wait while this process forks: the child would tell this process of its own."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _forget() -> None:
    """Let SIGTERM end a child of this process at once."""
    if signal.getsignal(signal.SIGTERM) is _go_on:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
    _release()
