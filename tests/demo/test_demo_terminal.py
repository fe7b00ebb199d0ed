"""`dmax demo` in a real terminal: what its screen shows while it plays, and how it leaves it."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pty
import re
import struct
import sys
import termios
from multiprocessing.reduction import DupFd

import pytest

import dmax_command
from dmax.tiny.tokenizer import words

pyte = pytest.importorskip("pyte")

PLAYS = b"\x1b[?1049h"  # the screen of its own begins
PLAYED = b"\x1b[?1049l"
TOLD = {"forward", "forwards", "s", "no", "valid", "answer", "is", "right", "wrong"}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["dmax.llm"])  # torch is loaded once for all commands


def command(terminal: DupFd, replay: float) -> None:
    """`dmax demo` in a process that a terminal controls, so that control-C reaches it."""
    its = terminal.detach()
    os.setsid()
    fcntl.ioctl(its, termios.TIOCSCTTY, 0)
    for stream in (0, 1, 2):
        os.dup2(its, stream)
    os.close(its)
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)
    os.environ["TERM"] = "xterm-256color"
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", encoding="utf-8") for stream in (1, 2))
    sys.argv = ["dmax", "demo"]
    import dmax.demo  # its console looks at the terminal only once

    dmax.demo.NUM_PROBLEMS = 2
    dmax.demo.REPLAY_SECONDS = replay
    dmax_command.main()


def run(width: int, height: int, replay: float, interrupt: bool = False) -> bytes:
    """All that the command writes to a terminal of that size."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    process = PROCESSES.Process(target=command, args=(DupFd(its), replay))
    process.start()
    os.close(its)
    written = b""
    try:
        while part := os.read(ours, 1 << 16):
            written += part
            if interrupt and PLAYS in written:
                os.write(ours, b"\x03")
                interrupt = False
    except OSError:  # how Linux says that the other side is closed
        pass
    finally:
        os.close(ours)
        process.join(timeout=60)
    return written


def screen_after(written: bytes, width: int, height: int) -> pyte.Screen:
    screen = pyte.Screen(width, height)
    pyte.ByteStream(screen).feed(written)
    return screen


@pytest.mark.parametrize(("width", "height"), [(120, 32), (80, 24)])
def test_the_demo_in_a_terminal(width: int, height: int) -> None:
    written = run(width, height, replay=1.0)
    before, _, rest = written.partition(PLAYS)
    played, _, after = rest.partition(PLAYED)
    assert b"loading" in before

    vocabulary = {word.strip() for word in words()}
    parts = played.split(b"\x1b[H")  # each begins in the upper left corner
    pictures = [part for part in parts if b"base, careful" in part]
    for number in (0, len(pictures) // 2, -1):
        shown = screen_after(b"\x1b[H" + pictures[number], width, height).display
        assert any(re.search(" base, careful .* base, pushed .* DMax ", line) for line in shown)
        inside = " ".join(part for line in shown for part in line.split("│")[1:-1])
        seen = {word for word in re.findall(r"\w+", inside) if word.isalpha()}
        assert seen - TOLD <= vocabulary

    end = screen_after(after, width, 100)
    text = "\n".join(line.rstrip() for line in end.display)
    assert "DMax against the careful base: " in text and "95 % interval" in text and "Next:" in text
    assert not screen_after(written, width, height).cursor.hidden


def test_an_interrupted_demo_leaves_the_terminal_whole() -> None:
    written = run(80, 24, replay=60.0, interrupt=True)
    assert PLAYED in written.partition(PLAYS)[2]
    assert not screen_after(written, 80, 24).cursor.hidden
