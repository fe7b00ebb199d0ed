"""Many threads, one model: is every answer that of the same request alone?

    python bench/threads.py --requests 20000 --threads 16

200 distinct requests (the beginnings of 40 problems, five settings each) are decoded one at a time
in the main thread. Then threads submit them at random, one or several at once or as a stream, and
close some streams early. Prints one JSON object, and exits with 1 if an answer differs. Weights are
in float64: a forward over more rows rounds differently, and in float32 that alone may turn an
answer.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from command_line import count, seed, telling

from dmax.checkpoint import load_checkpoint
from dmax.environment import environment
from dmax.llm import LLM
from dmax.outputs import GenerationOutput
from dmax.params import DecodingParams
from dmax.tasks.word_problems import problems

Case = tuple[str, DecodingParams]
NUM_PROBLEMS = 40
SHORT = DecodingParams("spd", 0.5, max_new_tokens=8, block_length=8, max_steps_per_block=4)
SETTINGS = (
    SHORT,
    replace(SHORT, threshold=0.3, block_length=16, max_new_tokens=12),
    replace(SHORT, temperature=0.7, seed=3),
    replace(SHORT, strategy="threshold", threshold=0.3),
    replace(SHORT, strategy="threshold", stop=("s",), max_new_tokens=16),
)


class Caller:
    """Submits requests at random and counts what comes of them."""

    def __init__(
        self, llm: LLM, cases: list[Case], alone: list[GenerationOutput], seed: int
    ) -> None:
        self.llm = llm
        self.cases = cases
        self.alone = alone
        self.draw = random.Random(seed)
        self.counts = Counter[str]()

    def run(self, num: int) -> Counter[str]:
        """Have at least this many requests answered."""
        while self.counts["equal"] + self.counts["different"] < num:
            self.draw.choice((self.generate, self.stream, self.close_stream))()
        return self.counts

    def generate(self) -> None:
        """Several requests at once."""
        chosen = self.draw.choices(range(len(self.cases)), k=self.draw.randint(1, 16))
        prompts, params = zip(*(self.cases[index] for index in chosen), strict=True)
        for index, output in zip(chosen, self.llm.generate(prompts, params), strict=True):
            self.compare(index, output)

    def stream(self) -> None:
        """One request, event by event."""
        index = self.draw.randrange(len(self.cases))
        *_, last = self.llm.stream(*self.cases[index])
        self.compare(index, last.output)

    def close_stream(self) -> None:
        """One request, given up after a few events."""
        stream = self.llm.stream(*self.draw.choice(self.cases))
        for _ in zip(range(self.draw.randint(1, 3)), stream, strict=False):
            pass
        self.counts["closed"] += 1

    def compare(self, index: int, output: GenerationOutput | None) -> None:
        """Count an answer."""
        self.counts["equal" if output == self.alone[index] else "different"] += 1


@telling()
def main() -> None:
    """Decode alone, then together, and print how many answers are equal."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny-dmax")
    parser.add_argument("--requests", type=count, default=20_000, help="answers to compare")
    parser.add_argument("--threads", type=count, default=16, help="threads that submit")
    parser.add_argument("--seed", type=seed, default=7)
    options = parser.parse_args()

    checkpoint = load_checkpoint(options.model, dtype=torch.float64, device="cpu")
    llm = LLM.from_checkpoint(checkpoint, max_batch_size=64)
    questions = [
        problem.question.partition(". ")[0] for problem in problems(NUM_PROBLEMS, seed=options.seed)
    ]
    cases = [(question, params) for question in questions for params in SETTINGS]
    began = time.perf_counter()
    alone = [llm.generate(*case)[0] for case in cases]
    together = time.perf_counter()

    each = -(-options.requests // options.threads)
    with ThreadPoolExecutor(options.threads) as pool:
        callers = [Caller(llm, cases, alone, seed) for seed in range(options.threads)]
        counts = sum(pool.map(lambda caller: caller.run(each), callers), Counter[str]())
    record = {
        "distinct": len(cases),
        "distinct_answers": len({(each.prompt_token_ids, each.token_ids) for each in alone}),
        "equal": counts["equal"],
        "different": counts["different"],
        "closed_streams": counts["closed"],
        "callers": options.threads,
        "seconds_alone": round(together - began, 1),
        "seconds": round(time.perf_counter() - together, 1),
        "environment": environment(),
    }
    print(json.dumps(record, indent=2))
    sys.exit(1 if counts["different"] else 0)


if __name__ == "__main__":
    main()
