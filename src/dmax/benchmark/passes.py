"""One pass of the engine over word problems: the unit that the CPU benchmark times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.tasks import Example, get_task
from dmax.tasks.word_problems import problems


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over the problems."""

    seconds: float
    completions: tuple[tuple[int, ...], ...]
    forwards: int

    @property
    def tokens(self) -> int:
        """Generated, EOS left out."""
        return sum(map(len, self.completions))

    @property
    def tokens_per_second(self) -> float:
        """Prefill included."""
        return self.tokens / self.seconds


def solve(llm: LLM, params: DecodingParams, examples: Sequence[Example], shots: int = 0) -> Pass:
    """Decode all problems, each behind so many solved ones."""
    params = replace(params, max_new_tokens=get_task("word_problems").max_new_tokens)
    prompts = [encode(llm, example, shots) for example in examples]
    began = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - began
    return Pass(
        seconds,
        tuple(output.token_ids for output in outputs),
        sum(output.num_forwards for output in outputs),
    )


def encode(llm: LLM, example: Example, shots: int) -> tuple[int, ...]:
    """A problem as a chat, behind `shots` solved problems of another seed."""
    before = [(p.question, p.response) for p in problems(shots, seed=11, split="test")]
    turns = [*(text for pair in before for text in pair), example.prompt]
    return llm.encode(
        [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    )
