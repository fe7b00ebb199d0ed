"""Requests of all kinds, what each is answered alone, and what is wrong with a streamed answer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dmax.llm import LLM
from dmax.outputs import GenerationOutput
from dmax.params import DecodingParams
from dmax.tasks.word_problems import problems
from serving.client import DONE

CHAT = "/v1/chat/completions"
STRATEGIES = (
    *("spd",) * 4,
    *("threshold",) * 2,
    *"credit d2f entropy_bound fast_dllm hierarchy iter_smooth joint_threshold llada lopa".split(),
)
WITHOUT_THRESHOLD = ("entropy_bound", "llada")
Stream = Literal["settled", "provisional"]


@dataclass(frozen=True, slots=True)
class Case:
    """A request.

    Attributes:
        prompt: of its user.
        params: how it is decoded.
        stream: which events it asks for.
    """

    prompt: str
    params: DecodingParams
    stream: Stream = "settled"

    def body(self, model: str, *, stream: bool = True) -> bytes:
        """The request as JSON."""
        params = self.params
        extras = {
            "strategy": params.strategy,
            "threshold": params.threshold,
            "ignore_eos": params.ignore_eos or None,
            "stream": "provisional" if stream and self.stream == "provisional" else None,
        }
        fields = {
            "model": model,
            "messages": [{"role": "user", "content": self.prompt}],
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "seed": params.seed,
            "stop": list(params.stop) or None,
            "stream": stream or None,
            "stream_options": {"include_usage": True} if stream else None,
            "dmax": {name: value for name, value in extras.items() if value is not None},
        }
        given = {name: value for name, value in fields.items() if value is not None}
        return json.dumps(given).encode()


def mixed_cases(num: int, seed: int) -> list[Case]:
    """Requests of mixed lengths, thresholds, strategies, temperatures and seeds, no two alike."""
    draw = random.Random(seed)
    found: dict[Case, None] = {}
    source = problems(2 * num, seed=seed)
    while len(found) < num:
        found[_mixed_case(next(source).question, draw)] = None
    return list(found)


def _mixed_case(question: str, draw: random.Random) -> Case:
    sentences = question.split(". ")
    prompt = ". ".join(sentences[: draw.randint(1, len(sentences))])
    strategy = draw.choice(STRATEGIES)
    threshold = None
    if strategy not in WITHOUT_THRESHOLD:
        threshold = draw.choice((None, 0.3, 0.5, 0.7, 0.9))
    temperature = draw.choice((0.0, 0.0, 0.3, 1.0))
    params = DecodingParams(
        strategy=strategy,
        threshold=threshold,
        max_new_tokens=draw.choice((8, 16, 32, 48, 64, 96)),
        temperature=temperature,
        seed=draw.randrange(2**31) if temperature else None,
        stop=draw.choice(((), (), (), (" is",))),
    )
    return Case(prompt, params, draw.choice(("settled", "settled", "settled", "provisional")))


def plain_cases(num: int, seed: int, max_new_tokens: int = 96) -> list[Case]:
    """The word problems as a user asks them, with the settings of the model."""
    params = DecodingParams(max_new_tokens=max_new_tokens)
    return [Case(problem.question, params) for problem in problems(num, seed=seed)]


def alone(llm: LLM, cases: Iterable[Case]) -> list[GenerationOutput]:
    """What each request is answered when nothing else is decoded."""
    return [llm.generate(case.prompt, case.params)[0] for case in cases]


def faults_of_stream(events: Sequence[Any], expected: GenerationOutput) -> list[str]:
    """What is wrong with the events of an answer; empty if it is the expected one.

    Every token must come once, in its order, and nothing of another answer.
    """
    if not events or events[-1] != DONE or events.count(DONE) != 1:
        return [f"the stream does not end with one [DONE] but with {events[-1:]}"]
    chunks = events[:-1]
    if errors := [chunk["error"] for chunk in chunks if "error" in chunk]:
        return [f"an error came instead: {errors[0]}"]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    extras = [chunk["dmax"] for chunk in chunks if chunk.get("dmax")]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    finished = [extra for extra in extras if extra.get("kind") == "finished"]
    compared = {
        "ids": (len({chunk["id"] for chunk in chunks}), 1),
        "indices": ({choice["index"] for choice in choices}, {0}),
        "text": (text, expected.text),
        "finish reasons": (reasons, [expected.finish_reason]),
        "tokens": ([use["completion_tokens"] for use in usages], [len(expected.token_ids)]),
        "forwards": ([extra["num_forwards"] for extra in finished], [expected.num_forwards]),
    }
    faults = [
        f"{name}: {found!r} instead of {right!r}"
        for name, (found, right) in compared.items()
        if found != right
    ]
    return faults + _faults_of_frames(extras, expected)


def _faults_of_frames(extras: Sequence[Any], expected: GenerationOutput) -> list[str]:
    """What is wrong with the settled blocks among provisional events; nothing if there are none."""
    settled = [extra for extra in extras if extra.get("kind") == "committed"]
    if not settled:
        return []
    token_ids: list[int] = []
    for frame in settled:
        if frame["position"] != len(token_ids):
            return [f"a block begins at {frame['position']} after {len(token_ids)} tokens"]
        token_ids += frame["token_ids"]
    right = list(expected.token_ids)
    return [] if token_ids[: len(right)] == right else ["the settled blocks hold other tokens"]
