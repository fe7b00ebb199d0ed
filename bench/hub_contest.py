"""The engine against the published loops, without and with a cache: same models and decisions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cached_loop
import hub_loop

from dmax.benchmark.cpu import SPD, TASK, Pass, TokenIds, encode, solve
from dmax.benchmark.measure import Spread, in_turns, spread
from dmax.benchmark.report import Row, Table, figure
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.tasks.word_problems import problems

LOOPS: dict[str, Callable[..., tuple[TokenIds, int]]] = {
    "hub": hub_loop.generate,
    "cached": cached_loop.generate,
}
TOGETHER = 16  # sequences in flight, beside one
NOTE = (
    "Tokens/s. Hub loop: one sequence, no cache; the whole prefix, and logits of all its "
    "positions, anew in every step (hub_loop.py). Cached loop: one sequence, with the keys and "
    "values of what is final (cached_loop.py). Engine: batch 1, as it is and compiled; "
    f"together: up to {TOGETHER} sequences. Last row: three solved problems before each."
)


@dataclass(frozen=True, slots=True)
class Contest:
    """What the engine and the hub loop both decode.

    Attributes:
        llm: the model.
        name: of the model.
        params: the strategy, `spd` or `threshold`, and its threshold.
        prompts: the problems.
        shots: solved problems before each.
    """

    llm: LLM
    name: str
    params: DecodingParams
    prompts: Sequence[TokenIds]
    shots: int = 0


def contests(
    llms: Mapping[str, LLM], limit: int, base_threshold: float, seed: int
) -> list[Contest]:
    """Threshold decoding and SPD, and SPD on a quarter of the problems with long prompts."""
    examples = TASK.examples(limit, seed)
    few = examples[: max(1, limit // 4)]
    base = llms["tiny-base"]
    dmax = llms["tiny-dmax"]
    threshold = DecodingParams("threshold", base_threshold)
    long_prompts = [with_shots(dmax, example.prompt, 3) for example in few]
    return [
        Contest(base, "tiny-base", threshold, encode(base, examples)),
        Contest(dmax, "tiny-dmax", SPD, encode(dmax, examples)),
        Contest(dmax, "tiny-dmax", SPD, long_prompts, shots=3),
    ]


def with_shots(llm: LLM, question: str, shots: int) -> TokenIds:
    """A problem as a chat, after `shots` solved problems of another seed."""
    messages = []
    for solved in problems(shots, seed=11, split="test"):
        messages.append({"role": "user", "content": solved.question})
        messages.append({"role": "assistant", "content": solved.response})
    messages.append({"role": "user", "content": question})
    return llm.encode(messages)


def hub_table(rounds: Sequence[Contest], dtype: str, repeats: int, compiles: bool) -> Table:
    """Speeds of the hub loop and of the engine in all contests, all in turns."""
    variants: dict[str, dict[str, Any]] = {"engine": {"max_batch_size": 1}}
    if len(rounds[0].prompts) >= TOGETHER:
        variants["together"] = {"max_batch_size": TOGETHER}
    if compiles:
        variants["compiled"] = {"max_batch_size": 1, "compile_model": True}

    runs: dict[tuple[int, str], Callable[[], Pass]] = {}
    for number, contest in enumerate(rounds):
        for name, options in variants.items():
            llm = LLM.from_checkpoint(contest.llm.checkpoint, **options)
            runs[number, name] = partial(solve, llm, contest.params, contest.prompts)
        for name, loop in LOOPS.items():
            runs[number, name] = partial(solve_by_loop, contest, loop)
    passes = in_turns(runs, repeats)

    rows = []
    for number, contest in enumerate(rounds):
        done = {name: passes[number, name] for name in (*variants, *LOOPS)}
        rows.append(contest_row(contest, done))
    return Table(
        "hub_loop", f"engine and hub loop, {dtype}", rows, [shown(row) for row in rows], NOTE
    )


def solve_by_loop(contest: Contest, loop: Callable[..., tuple[TokenIds, int]]) -> Pass:
    """Decode all prompts by one of the loops."""
    threshold = contest.params.threshold
    assert threshold is not None, "the loop has no default for it"
    decode = partial(
        loop,
        contest.llm.checkpoint,
        threshold=threshold,
        soft=contest.params.strategy == "spd",
        max_new_tokens=TASK.max_new_tokens,
    )
    began = time.perf_counter()
    done = [decode(prompt) for prompt in contest.prompts]
    seconds = time.perf_counter() - began
    completions = tuple(completion for completion, _ in done)
    return Pass(seconds, completions, forwards=sum(forwards for _, forwards in done))


def contest_row(contest: Contest, passes: Mapping[str, Sequence[Pass]]) -> Row:
    """What the passes of a contest amount to; `passes` by loops and variants of the engine."""
    engine = passes["engine"]
    total = len(contest.prompts)
    equal = {name: num_equal(engine[0], passes[name][0]) for name in LOOPS}
    row: Row = {
        "method": contest.params.strategy,
        "model": contest.name,
        "threshold": contest.params.threshold,
        "prompt_tokens": sum(map(len, contest.prompts)) / total,
        "shots": contest.shots,
        "equal": equal["hub"],
        "total": total,
        "equal_completions": f"{equal['hub']}/{total}",
        "cached_equal_completions": f"{equal['cached']}/{total}",
        "engine_forwards": engine[0].forwards,
        "hub_forwards": passes["hub"][0].forwards,
        "cached_forwards": passes["cached"][0].forwards,
    }
    for name, done in passes.items():
        row[name] = spread([each.tokens_per_second for each in done])
        if name not in LOOPS:
            row[f"{name}_ratio"] = faster(done, passes["hub"])
            row[f"{name}_cached_ratio"] = faster(done, passes["cached"])
    return row


def num_equal(one: Pass, other: Pass) -> int:
    """How many completions are the same."""
    pairs = zip(one.completions, other.completions, strict=True)
    return sum(ours == theirs for ours, theirs in pairs)


def faster(one: Sequence[Pass], other: Sequence[Pass]) -> Spread:
    """How many times as fast, round by round."""
    pairs = zip(one, other, strict=True)
    return spread([a.tokens_per_second / b.tokens_per_second for a, b in pairs])


def shown(row: Row) -> dict[str, str]:
    """A row's cells."""
    return {
        "method": row["method"],
        "model": row["model"],
        "prompt tokens": figure(row["prompt_tokens"], ".0f"),
        "equal completions": f"{row['equal_completions']}, {row['cached_equal_completions']}",
        "hub loop, tokens/s": figure(row["hub"], ".0f"),
        "cached loop": figure(row["cached"], ".0f"),
        "engine": figure(row["engine"], ".0f"),
        "ratio": figure(row["engine_ratio"], ".2f"),
        "to the cached": figure(row["engine_cached_ratio"], ".2f"),
        "compiled": figure(row.get("compiled"), ".0f"),
        "its ratio": figure(row.get("compiled_ratio"), ".2f"),
        "together": figure(row.get("together"), ".0f"),
        "their ratio": figure(row.get("together_ratio"), ".2f"),
    }
