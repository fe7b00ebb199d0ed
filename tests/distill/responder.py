"""A model that answers without computing, and what its distillation writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dmax import DecodingParams, GenerationOutput, InputError
from dmax.distill.files import ResponseFiles
from dmax.distill.filters import Filters
from dmax.distill.model import ModelAnswerer
from dmax.distill.responses import Prompt
from dmax.distill.run import Report, distill
from dmax.engine.request import Request
from dmax.outputs import Cost
from dmax.special_ids import SpecialIds

PARAMS = DecodingParams(strategy="threshold", threshold=0.3, max_new_tokens=16)
PROMPTS = ["one", "two", "endless three", "four", "silent five", "six für ☃", "seven"]


class Weight(torch.nn.Module):
    """What a model is known by."""

    dtype = torch.float32

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([weight]))


class Responder:
    """Answers in place of a model and its engine; dies before step number `dies_at`.

    A response takes as many steps as its prompt has bytes. A prompt with "refused" in it is.
    """

    tokenizer = None
    checkpoint = SimpleNamespace(special_ids=SpecialIds(1, (2,), 2, 8))

    def __init__(
        self, dies_at: int | None = None, max_batch_size: int = 64, weight: float = 1.0
    ) -> None:
        self.options = SimpleNamespace(max_batch_size=max_batch_size)
        self.model = Weight(weight)
        self.dies_at = dies_at
        self.asked: list[str] = []
        self.batches: list[int] = []  # how many prompts each step had
        self.left: dict[int, int] = {}

    def encode(self, messages: Any) -> tuple[int, ...]:
        *_, last = messages
        assert last["role"] == "user"
        return tuple(" ".join(message["content"] for message in messages).encode())

    def resolve(self, params: DecodingParams) -> DecodingParams:
        return params

    def request(self, index: int, messages: Any, params: DecodingParams) -> Request:
        request = Request(index, self.encode(messages), params)
        if b"refused" in bytes(request.prompt_ids):
            raise InputError(f"prompt {index} does not fit")
        return request

    def engine(self, block_length: int | None, max_batch_size: int) -> Responder:
        assert block_length is None
        return self

    def add(self, request: Request) -> None:
        self.asked.append(bytes(request.prompt_ids).decode())
        self.left[request.index] = len(request.prompt_ids)

    def step(self) -> list[Any]:
        assert self.left
        if len(self.batches) == self.dies_at:
            raise KeyboardInterrupt
        self.batches.append(len(self.left))
        self.left = {index: left - 1 for index, left in self.left.items()}
        finished = [index for index, left in self.left.items() if not left]
        for index in finished:
            del self.left[index]
        return [SimpleNamespace(kind="finished", index=index) for index in finished]

    def output(self, request: Request, event: Any) -> GenerationOutput:
        text = bytes(request.prompt_ids).decode()
        reason: Any = "length" if "endless" in text else "stop"
        response = " \n" if "silent" in text else f"answer to {text}"
        length = len(response.split())
        return GenerationOutput(response, (1,) * length, (1,), reason, Cost(num_forwards=1))


def run(
    output: Path,
    responder: Responder,
    prompts: Sequence[Prompt] = PROMPTS,
    params: DecodingParams = PARAMS,
    filters: Filters = Filters(),  # noqa: B008
    **options: Any,
) -> Report:
    """Distil into one file, or into a folder if there is a `shard_size`."""
    progress = options.pop("progress", lambda done, total, speed: None)
    files = ResponseFiles(output, **options)
    answerer = ModelAnswerer(responder, params)  # type: ignore[arg-type]
    return distill(answerer, prompts, files, filters, progress=progress)


def counts(report: Report) -> tuple[int, int, dict[str, int]]:
    """What does not depend on the clock."""
    return report.prompts, report.kept, report.dropped


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def by_index(path: Path) -> list[dict[str, Any]]:
    return sorted(lines(path), key=lambda record: record["index"])
