"""What SIGTERM does to a process of torchrun."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time

from dmax.cli.last_words import last_words

SECONDS = 1.0


def start(*lines: str, seconds: float = SECONDS) -> subprocess.Popen[str]:
    """A process with time for last words, which ends with 3 at Ctrl-C, once it is ready."""
    script = [
        "import ctypes, signal, sys, time",
        "from multiprocessing import get_context",
        "from dmax.cli.last_words import last_words",
        "signal.signal(signal.SIGINT, lambda number, frame: sys.exit(3))",
        f"with last_words({seconds}):",
        *(textwrap.indent(line, "    ") for line in ("print('ready', flush=True)", *lines)),
    ]
    child = subprocess.Popen(
        [sys.executable, "-c", "\n".join(script)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_a_process_has_time_to_say_why_it_ends() -> None:
    child = start("time.sleep(0.3)", "print('lost')", "sys.exit(2)", seconds=60)
    child.send_signal(signal.SIGTERM)
    output, _ = child.communicate(timeout=60)
    assert (child.returncode, output) == (2, "lost\n")


def test_a_process_that_waits_without_python_is_ended() -> None:
    child = start(
        "lock = ctypes.create_string_buffer(64)  # a pthread_mutex_t, free",
        "take = ctypes.CDLL(None).pthread_mutex_lock",
        "take(lock)",
        "take(lock)",
    )
    began = time.monotonic()
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - began >= SECONDS


def test_other_signals_stay_what_they_are() -> None:
    child = start("time.sleep(600)")
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode == 3


def test_a_helper_ends_at_once_and_alone() -> None:
    child = start(
        "helper = get_context('fork').Process(target=time.sleep, args=(600,))",
        "helper.start()",
        "helper.terminate()",
        "helper.join(30)",
        f"time.sleep({2 * SECONDS})",
        "print(helper.exitcode)",
    )
    output, _ = child.communicate(timeout=120)
    assert (child.returncode, output) == (0, f"{-signal.SIGTERM}\n")


def handling() -> tuple[object, int]:
    """What SIGTERM does to this process, and the file that hears of its signals."""
    told = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(told)
    return signal.getsignal(signal.SIGTERM), told


def test_it_leaves_everything_as_it_was() -> None:
    before = handling()
    with last_words():
        assert handling() != before
    assert handling() == before


def test_a_signal_that_is_handled_stays_so() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with last_words():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
