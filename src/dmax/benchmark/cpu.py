"""`dmax bench` on a CPU: what parallel decoding and batching gain on the bundled models.

All contenders of a table decode the same problems in one process, in turns; figures are medians
over the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from dmax.benchmark.measure import in_turns, spread
from dmax.benchmark.report import Row, Table, figure
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.tasks import Example
from dmax.tasks.word_problems import WordProblems

TASK = WordProblems()
SPD = DecodingParams("spd", 0.5)
TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CpuOptions:
    """What to measure.

    Attributes:
        limit: problems at batch 1.
        batch_limit: problems at every batch size.
        repeats: rounds, after one that warms up.
        batch_sizes: of the table of batch sizes; 1 is among them.
        dtypes: of the table of batch sizes; methods are compared in the first.
        base_threshold: of `tiny-base`, the lowest that keeps its accuracy.
        best_threshold: of `tiny-dmax`, the fastest that keeps its accuracy; 0.5 is measured too.
        seed: of the problems.
    """

    limit: int = 48
    batch_limit: int = 128
    repeats: int = 3
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    base_threshold: float = 0.95
    best_threshold: float = 0.2
    seed: int = 7


FULL = CpuOptions()
QUICK = CpuOptions(limit=3, batch_limit=16, repeats=1, batch_sizes=(1, 16), dtypes=("float32",))


def tables(options: CpuOptions) -> Iterator[Table]:
    """The tables, each measured when it is asked for."""
    yield decoding(bundled_models(options.dtypes[0]), options)
    yield batching(options)


def bundled_models(dtype: str) -> dict[str, LLM]:
    """Both bundled models at batch 1, by name."""
    names = ("tiny-base", "tiny-dmax")
    return {name: LLM(name, dtype=dtype, device="cpu", max_batch_size=1) for name in names}


# --- one pass over the problems -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over the problems: what is timed.

    Attributes:
        seconds: of all problems, prefill included.
        completions: token ids, EOS left out.
        forwards: denoising forwards.
        texts: of the completions, where they are known.
    """

    seconds: float
    completions: tuple[TokenIds, ...]
    forwards: int
    texts: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Generated tokens."""
        return sum(map(len, self.completions))

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over seconds."""
        return self.tokens / self.seconds


def encode(llm: LLM, examples: Sequence[Example]) -> list[TokenIds]:
    """The problems as prompts."""
    return [llm.encode(example.prompt) for example in examples]


def solve(llm: LLM, params: DecodingParams, prompts: Sequence[TokenIds]) -> Pass:
    """Decode the prompts."""
    params = replace(params, max_new_tokens=TASK.max_new_tokens)
    began = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - began
    return Pass(
        seconds,
        completions=tuple(output.token_ids for output in outputs),
        forwards=sum(output.num_forwards for output in outputs),
        texts=tuple(output.text for output in outputs),
    )


# --- methods --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contender:
    """A model with a way to decode."""

    label: str
    model: str
    params: DecodingParams


def contenders(options: CpuOptions) -> list[Contender]:
    """SPD at two thresholds, the base model by threshold, and one token a forward."""
    best = DecodingParams("spd", options.best_threshold)
    threshold = DecodingParams("threshold", options.base_threshold)
    one_token = DecodingParams("autoregressive")
    return [
        Contender("SPD", "tiny-dmax", SPD),
        Contender("SPD, best", "tiny-dmax", best),
        Contender("threshold", "tiny-base", threshold),
        Contender("one token", "tiny-base", one_token),
        Contender("one token, block 1", "tiny-base", replace(one_token, block_length=1)),
    ]


def decoding(llms: Mapping[str, LLM], options: CpuOptions) -> Table:
    """Accuracy and speed of the contenders at batch 1."""
    examples = TASK.examples(options.limit, options.seed)
    chosen = contenders(options)
    runs = {}
    for each in chosen:
        llm = llms[each.model]
        runs[each.label] = partial(solve, llm, each.params, encode(llm, examples))
    passes = in_turns(runs, options.repeats)

    rows = [method_row(each, llms[each.model], passes[each.label], examples) for each in chosen]
    speed = {row["method"]: row["tokens_per_second"]["median"] for row in rows}
    cells = [
        {
            "decoding": row["method"],
            "model": row["model"],
            "threshold": figure(row["threshold"], "g"),
            "correct": row["score"],
            "TPF": figure(row["tpf"], ".2f"),
            "ms/forward": figure(row["ms_per_forward"], ".2f"),
            "tokens/s": figure(row["tokens_per_second"], ".0f"),
            "speed-up": figure(speed[row["method"]] / speed["threshold"], ".1f"),
        }
        for row in rows
    ]
    gain = speed["SPD"] / speed["threshold"]
    note = (
        f"SPD on tiny-dmax writes {gain:.1f} times as many tokens a second as threshold decoding "
        "on tiny-base; speed-up is over the latter. TPF: tokens per forward. Tokens/s: generated "
        f"tokens per second, prefill included, {rounds(options)}. One token: the leftmost mask of "
        "a block of 32 as the model was trained, the last block to its end; block 1: cheaper "
        "forwards that the model was not trained for."
    )
    title = f"Ways to decode {len(examples)} word problems, one after another, {options.dtypes[0]}"
    return Table("decoding", title, rows, cells, note)


def rounds(options: CpuOptions) -> str:
    """How a figure comes from the rounds."""
    if options.repeats == 1:
        return "one round"
    return f"median of {options.repeats} rounds (lowest to highest)"


def method_row(
    contender: Contender, llm: LLM, passes: Sequence[Pass], examples: Sequence[Example]
) -> Row:
    """What a contender's passes amount to; they all have the same completions."""
    first = passes[0]
    scores = [TASK.score(text, each) for text, each in zip(first.texts, examples, strict=True)]
    return {
        "method": contender.label,
        "model": contender.model,
        "threshold": contender.params.threshold,
        "block_length": contender.params.block_length or llm.checkpoint.special_ids.block_length,
        "correct": sum(scores),
        "score": f"{sum(scores)}/{len(examples)}",
        "tokens": first.tokens,
        "forwards": first.forwards,
        "tpf": first.tokens / first.forwards,
        "tokens_per_second": spread([each.tokens_per_second for each in passes]),
        "ms_per_forward": spread([each.seconds / each.forwards * 1e3 for each in passes]),
    }


# --- batch sizes ----------------------------------------------------------------------------------


def batching(options: CpuOptions) -> Table:
    """SPD at several batch sizes and in several dtypes."""
    examples = TASK.examples(options.batch_limit, options.seed)
    runs = {}
    for dtype in options.dtypes:
        checkpoint = LLM("tiny-dmax", dtype=dtype, device="cpu").checkpoint
        for size in options.batch_sizes:
            llm = LLM.from_checkpoint(checkpoint, max_batch_size=size)
            runs[dtype, size] = partial(solve, llm, SPD, encode(llm, examples))
    passes = in_turns(runs, options.repeats)

    rows = []
    cells = []
    for (dtype, size), done in passes.items():
        speed = spread([each.tokens_per_second for each in done])
        alone = statistics.median(each.tokens_per_second for each in passes[dtype, 1])
        row: Row = {"dtype": dtype, "batch": size, "tokens_per_second": speed}
        rows.append(row | {"seconds": spread([each.seconds for each in done])})
        cells.append(
            {
                "dtype": dtype,
                "batch": str(size),
                "tokens/s": figure(speed, ".0f"),
                "speed-up": figure(speed["median"] / alone, ".1f"),
            }
        )
    title = f"Batch sizes: {len(examples)} word problems by tiny-dmax with SPD"
    note = (
        f"Tokens/s: generated tokens per second, prefill included, {rounds(options)}; speed-up is "
        "over batch 1."
    )
    return Table("batching", title, rows, cells, note)
