"""SIGKILL at 20 random moments, of replicas and of the command: no row is lost or doubled.

What is finished in the end is what one process writes, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

KILLS = 20
POLL = 0.002  # seconds between two looks
START = 300.0  # seconds that a command may take to its first replica, on a busy machine
CALM = 90.0  # seconds in which everything that a killed command leaves has to end
DISTILL = (
    "distill --model tiny-dmax --num 120 --strategy spd --threshold 0.5 --max-new-tokens 96 "
    "--max-length 70 --batch-size 2 --dtype float32"
)
EVAL = "eval --model tiny-dmax --limit 120 --max-new-tokens 96 --batch-size 2 --dtype float32"
RAY = "--ray --replicas 2"
MEASURED = ("seconds", "tokens_per_second", "environment")


def processes() -> dict[int, tuple[int, str]]:
    """By id, the parent and the command line of every process that has not ended."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if state != "Z":
                found[int(folder.name)] = int(parent), line
    return found


def family(root: int) -> dict[int, str]:
    """The command lines of the processes below one."""
    everyone = processes()
    below: dict[int, str] = {}
    added = {root}
    while added:
        added = {pid for pid, (parent, _) in everyone.items() if parent in added}
        below |= {pid: everyone[pid][1] for pid in added}
    return below


class Command:
    """A command that is killed and started again.

    Args:
        words: of its command line.
        folder: for what it writes.
        generator: of the moments.
    """

    def __init__(self, words: str, folder: Path, generator: random.Random) -> None:
        self.words = words.split()
        self.folder = folder
        self.errors = folder.with_name(f"{folder.name}.errors")
        self.generator = generator
        self.kills = 0
        self.left: set[int] = set()  # of commands that were killed

    def start(self) -> subprocess.Popen[bytes]:
        with self.errors.open("ab") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", "dmax", *self.words], stdout=errors, stderr=errors
            )

    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files())

    def files(self) -> list[Path]:
        return [file for file in self.folder.glob("*.jsonl") if not file.name.startswith(".")]

    def lines(self) -> set[str]:
        """What is written to the end of its line."""
        return {line for file in self.files() for line in file.read_text().split("\n")[:-1]}

    def kill(self, pid: int) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGKILL)
            self.kills += 1

    def live(self) -> bool:
        """Start it, kill replicas, then the command itself; False if it ended before."""
        process = self.start()
        try:
            if not self._replicas(process):
                return False
            for _ in range(self.generator.randint(0, 2)):
                time.sleep(self.generator.uniform(0, 3))
                if running := self._replicas(process):
                    self.kill(self.generator.choice(running))
            self._wait_for_a_write(process)
            if process.poll() is not None:
                return False
            self.left |= family(process.pid).keys()
            self.kill(process.pid)
            process.wait()
            return True
        finally:
            process.kill()
            process.wait()

    def _replicas(self, process: subprocess.Popen[bytes]) -> list[int]:
        """The processes of its actors, which it may take a while to start."""
        end = time.monotonic() + START
        while process.poll() is None:
            assert time.monotonic() < end, self.errors.read_text()
            workers = [pid for pid, line in family(process.pid).items() if "ray::Map" in line]
            if workers:
                return workers
            time.sleep(POLL)
        return []

    def _wait_for_a_write(self, process: subprocess.Popen[bytes]) -> None:
        """Half of the time until something is written, half of the time a random moment."""
        if self.generator.random() < 0.5:
            time.sleep(self.generator.uniform(0, 5))
            return
        before = self.num_bytes()
        end = time.monotonic() + START
        while process.poll() is None and self.num_bytes() == before and time.monotonic() < end:
            time.sleep(POLL)
        time.sleep(self.generator.uniform(0, 0.005))

    def finish_after_kills(self) -> None:
        written: set[str] = set()
        while self.kills < KILLS:
            assert self.live(), f"too few rows: it ended after {self.kills} kills"
            now = self.lines()
            assert written <= now, "a row is lost"
            written = now
        process = self.start()
        assert process.wait() == 0, self.errors.read_text()

    def leftovers(self) -> dict[int, str]:
        """What is left of commands that were killed, after a while."""
        end = time.monotonic() + CALM
        while True:
            everyone = processes()
            left = {pid: everyone[pid][1] for pid in self.left & everyone.keys()}
            if not left or time.monotonic() > end:
                return left
            time.sleep(1)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


def test_a_distillation_survives_20_kills(tmp_path: Path, generator: random.Random) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    one = Command(f"{DISTILL} --output {whole}/a.jsonl", whole, generator)
    assert one.start().wait() == 0, one.errors.read_text()
    command = Command(f"{DISTILL} {RAY} --output {killed}/a.jsonl", killed, generator)
    command.finish_after_kills()
    for name in ("a.jsonl", "a.dropped.jsonl"):
        lines = (killed / name).read_text().splitlines()
        assert sorted(lines) == sorted((whole / name).read_text().splitlines())
    rows = [row for name in ("a.jsonl", "a.dropped.jsonl") for row in records(killed / name)]
    assert sorted(row["index"] for row in rows) == list(range(120))
    assert (killed / "a.manifest.json").read_text() == (whole / "a.manifest.json").read_text()
    assert not command.leftovers()


def test_an_evaluation_survives_20_kills(tmp_path: Path, generator: random.Random) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    one = Command(f"{EVAL} --output {whole}/a.json", whole, generator)
    assert one.start().wait() == 0, one.errors.read_text()
    command = Command(f"{EVAL} {RAY} --output {killed}/a.json", killed, generator)
    command.finish_after_kills()
    assert (killed / "a.samples.jsonl").read_text() == (whole / "a.samples.jsonl").read_text()
    found, expected = (json.loads((each / "a.json").read_text()) for each in (killed, whole))
    for name in MEASURED:
        del found[name], expected[name]
    assert found == expected
    assert not command.leftovers()
