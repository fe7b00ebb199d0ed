"""SIGKILL at 20 random points loses nothing that was written and answers nothing twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from fake_server import Server
from responder import lines

from dmax import cli

KILLS = 20
POLL = 0.005  # seconds between two looks at the files


def run_command(words: list[str], errors: Path) -> None:
    """`dmax WORDS` in a process of its own, in which torch is loaded already."""
    import torch

    torch.set_num_threads(1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.argv = ["dmax", *words]
    cli.main()


class Command:
    """A distillation that is killed and started again.

    Args:
        folder: where it writes.
        words: of the command line.
    """

    def __init__(self, folder: Path, *words: object) -> None:
        self.folder = folder
        self.errors = folder.with_name("errors")
        self.words = ["distill", *map(str, words)]
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["test_kill_9", "dmax.llm", "openai"])

    def start(self) -> ForkServerProcess:
        process = self.context.Process(target=run_command, args=(self.words, self.errors))
        process.start()
        return process

    def files(self) -> list[Path]:
        return [file for file in self.folder.rglob("*.jsonl") if not file.name.startswith(".")]

    def num_bytes(self) -> int:
        """How much is written."""
        try:
            return sum(file.stat().st_size for file in self.files())
        except FileNotFoundError:  # a file has become a shard meanwhile
            return self.num_bytes()

    def whole_lines(self) -> set[str]:
        """What is written to the end of its line."""
        return {line for file in self.files() for line in file.read_text().split("\n")[:-1]}

    def kill_after(self, num_bytes: int) -> bool:
        """Start it and kill it once so much more is written; False if it ended before."""
        limit = self.num_bytes() + num_bytes
        process = self.start()
        while process.is_alive() and self.num_bytes() < limit:
            process.join(POLL)
        process.kill()
        process.join()
        return process.exitcode == -9

    def finish_after_kills(self, most_bytes: int) -> None:
        """Kill it 20 times, each after a random number of bytes, and let it end."""
        generator = random.Random(self.folder.name)
        written: set[str] = set()
        for _ in range(KILLS):
            assert self.kill_after(generator.randint(0, most_bytes)), "too few prompts"
            now = self.whole_lines()
            assert written <= now, "a response is lost"
            written = now
        process = self.start()
        process.join()
        assert process.exitcode == 0, self.errors.read_text()
        assert written <= self.whole_lines(), "a response is lost"


def indices(files: list[Path]) -> list[Any]:
    return sorted(record["index"] for file in files for record in lines(file))


@pytest.mark.slow
def test_shards_from_a_server_survive_20_kills(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    folder = tmp_path / "shards"
    with Server(delay=0.01) as server:
        words = ("--endpoint", server.url, "--concurrency", 8, "--num", 600)
        command = Command(folder, *words, "--output", folder, "--shard-size", 50)
        command.finish_after_kills(most_bytes=10_000)
    shards = sorted(folder.glob("train-*.jsonl"))
    assert [len(lines(shard)) for shard in shards] == [50] * 12
    assert indices(shards) == list(range(600))
    num_again = sum(server.asked.values()) - 600
    assert num_again <= 8 * KILLS, "more is asked again than what was in flight"


@pytest.mark.slow
def test_a_file_from_a_model_survives_20_kills(tmp_path: Path) -> None:
    folder = tmp_path / "file"
    output = folder / "responses.jsonl"
    words = ("--model", "tiny-base", "--batch-size", 4, "--num", 150, "--output", output)
    command = Command(folder, *words, "--threshold", 0.3, "--max-new-tokens", 8)
    command.finish_after_kills(most_bytes=4_000)
    dropped = output.with_suffix(".dropped.jsonl")
    assert indices([output, dropped]) == list(range(150))
    assert len(lines(dropped)) > 100  # eight tokens are too few for most answers
