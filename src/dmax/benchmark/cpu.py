"""`dmax bench` on a CPU: what parallel decoding, the engine and batching gain, and how far a forward is from its floor.

All contenders of a table decode the same problems in one process, in turns; figures are medians
over the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmax.benchmark import compiled, hub_loop
from dmax.benchmark.measure import Spread, in_turns, milliseconds, open_block, spread, watched
from dmax.benchmark.memory import measure_apart
from dmax.benchmark.passes import Pass, encode, solve
from dmax.benchmark.report import RATIO_COLUMNS, Row, Section, ratio
from dmax.benchmark.shapes import llama_135m
from dmax.checkpoint import Checkpoint
from dmax.environment import DTYPES, lacks_compiler
from dmax.errors import InputError
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.tasks import Example, get_task

CPU = torch.device("cpu")
CONTEXT = 256  # tokens before the open block of the dense backbone
TOGETHER = 16  # sequences in flight, beside one


@dataclass(frozen=True, slots=True)
class CpuOptions:
    """What to measure.

    Attributes:
        limit: problems at batch 1.
        batch_limit: problems at every batch size.
        repeats: rounds, behind one that warms up.
        batch_sizes: of the table of batch sizes; 1 is among them.
        dtypes: of the tables of batch sizes and of the dense backbone; the first is also that of
            the others.
        base_threshold: of `tiny-base`, the lowest that keeps its accuracy.
        best_threshold: of `tiny-dmax`, the fastest that keeps its accuracy; 0.5 is measured too.
        seed: of the problems.
        dense_layers: of the dense backbone.
        compiles: whether the engine is also measured with a compiled model, where there is a C++
            compiler.
    """

    limit: int = 48
    batch_limit: int = 128
    repeats: int = 3
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    base_threshold: float = 0.95
    best_threshold: float = 0.2
    seed: int = 7
    dense_layers: int = 30
    compiles: bool = True

    def __post_init__(self) -> None:
        """Raises `InputError` for an unknown dtype, or without the batch size that others are compared to."""
        if 1 not in self.batch_sizes:
            raise InputError(
                f"the batch sizes must hold 1, got {', '.join(map(str, self.batch_sizes))}"
            )
        if unknown := [name for name in self.dtypes if name not in DTYPES]:
            raise InputError(f"unknown dtype {unknown[0]!r}; choose from {', '.join(DTYPES)}")


QUICK = CpuOptions(
    limit=3, batch_limit=16, repeats=1, batch_sizes=(1, 16), dtypes=("float32",), compiles=False
)


@dataclass(frozen=True, slots=True)
class Contender:
    """A model with a way to decode, at batch 1."""

    label: str
    model: str
    params: DecodingParams


def sections(options: CpuOptions) -> Iterator[Section]:
    """The tables, each measured when it is asked for."""
    options = replace(options, compiles=options.compiles and not lacks_compiler(CPU))
    first = options.dtypes[0]
    llms = {
        name: LLM(name, dtype=first, device="cpu", max_batch_size=1)
        for name in ("tiny-base", "tiny-dmax")
    }
    methods = decoding(llms, options)
    yield methods
    loops = against_hub_loop(llms, options)
    yield loops
    batches = batching(options)
    yield batches
    if options.compiles:
        sizes = [size for size in options.batch_sizes if size in (1, 16)]
        yield compiled.section(
            options.dtypes, sizes, options.batch_limit, options.seed, options.repeats
        )
    dense = dense_backbone(options)
    yield dense
    yield ratios(options, *(section.rows for section in (methods, loops, batches, dense)))


# --- (a) methods ----------------------------------------------------------------------------------


def contenders(options: CpuOptions) -> list[Contender]:
    """SPD at two thresholds, the base model by threshold, and one token a forward."""
    return [
        Contender("SPD", "tiny-dmax", DecodingParams("spd", 0.5)),
        Contender("SPD, best", "tiny-dmax", DecodingParams("spd", options.best_threshold)),
        Contender("threshold", "tiny-base", DecodingParams("threshold", options.base_threshold)),
        Contender("one token", "tiny-base", DecodingParams("autoregressive")),
        Contender(
            "one token, block 1", "tiny-base", DecodingParams("autoregressive", block_length=1)
        ),
    ]


def decoding(llms: dict[str, LLM], options: CpuOptions) -> Section:
    """Accuracy and speed of the contenders at batch 1."""
    task = get_task("word_problems")
    examples = task.examples(options.limit, options.seed)
    chosen = contenders(options)
    passes = in_turns(
        {each.label: partial(solve, llms[each.model], each.params, examples) for each in chosen},
        options.repeats,
    )
    rows = []
    for each in chosen:
        done = passes[each.label]
        tokenizer = llms[each.model].tokenizer
        assert tokenizer is not None, "the bundled models have one"
        texts = [
            str(tokenizer.decode(list(ids), skip_special_tokens=True))
            for ids in done[0].completions
        ]
        correct = sum(
            task.score(text, example) for text, example in zip(texts, examples, strict=True)
        )
        rows.append(
            {
                "method": each.label,
                "model": each.model,
                "threshold": each.params.threshold,
                "block_length": each.params.block_length
                or llms[each.model].checkpoint.special_ids.block_length,
                "correct": correct,
                "score": f"{correct}/{len(examples)}",
                "tokens": done[0].tokens,
                "forwards": done[0].forwards,
                "tpf": done[0].tokens / done[0].forwards,
                "tokens_per_second": spread([one.tokens_per_second for one in done]),
                "ms_per_forward": spread([one.seconds / one.forwards * 1e3 for one in done]),
            }
        )
    columns = {
        "method": "method",
        "model": "model",
        "threshold": "threshold:g",
        "correct": "score:>",
        "TPF": "tpf:.2f",
        "tokens/s": "tokens_per_second:.0f",
        "ms/forward": "ms_per_forward:.2f",
    }
    note = (
        "Batch 1, keys and values cached, prefill included. One token: the leftmost mask of a block of 32 as the model "
        "was trained, the last block to its end; block 1: cheaper forwards that the model was not trained for."
    )
    return Section("decoding", f"methods, {options.dtypes[0]}", columns, rows, note)


# --- (b) the loop of the published checkpoints ----------------------------------------------------

HUB_COLUMNS = {
    "method": "method",
    "model": "model",
    "prompt tokens": "prompt_tokens:.0f",
    "equal completions": "equal_completions:>",
    "hub loop, tokens/s": "hub:.0f",
    "engine": "engine:.0f",
    "ratio": "engine_ratio:.2f",
    "compiled": "compiled:.0f",
    "its ratio": "compiled_ratio:.2f",
    "together": "together:.0f",
    "their ratio": "together_ratio:.2f",
}


def against_hub_loop(llms: dict[str, LLM], options: CpuOptions) -> Section:
    """The engine and the loop without a cache: the same model, the same problems, the same decisions."""
    examples = get_task("word_problems").examples(max(1, options.limit // 2), options.seed)
    few = examples[: max(1, len(examples) // 4)]
    spd = DecodingParams("spd", 0.5)
    contests = (
        ("tiny-base", DecodingParams("threshold", options.base_threshold), examples, 0),
        ("tiny-dmax", spd, examples, 0),
        ("tiny-dmax", spd, few, 3),
    )
    variants: dict[str, dict[str, Any]] = {"engine": {"max_batch_size": 1}}
    if len(examples) >= TOGETHER:
        variants["together"] = {"max_batch_size": TOGETHER}
    if options.compiles:
        variants["compiled"] = {"max_batch_size": 1, "compile_model": True}
    runs: dict[str, Callable[[], Pass]] = {}
    for number, (model, params, solved, shots) in enumerate(contests):
        for name, variant in variants.items():
            llm = LLM.from_checkpoint(llms[model].checkpoint, **variant)
            runs[f"{number} {name}"] = partial(solve, llm, params, solved, shots)
        runs[f"{number} hub"] = partial(solve_by_hub_loop, llms[model], params, solved, shots)
    passes = in_turns(runs, max(1, options.repeats - 1))
    rows = []
    for number, (model, params, solved, shots) in enumerate(contests):
        engine = passes[f"{number} engine"]
        hub = passes[f"{number} hub"]
        equal = sum(a == b for a, b in zip(engine[0].completions, hub[0].completions, strict=True))
        row: Row = {
            "method": params.strategy,
            "model": model,
            "threshold": params.threshold,
            "prompt_tokens": sum(len(encode(llms[model], example, shots)) for example in solved)
            / len(solved),
            "shots": shots,
            "equal": equal,
            "total": len(solved),
            "equal_completions": f"{equal}/{len(solved)}",
            "engine_forwards": engine[0].forwards,
            "hub_forwards": hub[0].forwards,
            "hub": spread([one.tokens_per_second for one in hub]),
        }
        for name in variants:
            done = passes[f"{number} {name}"]
            row |= {
                name: spread([one.tokens_per_second for one in done]),
                f"{name}_ratio": faster(done, hub),
            }
        rows.append(row)
    note = (
        "Tokens/s. Hub loop: one sequence, no cache; the whole prefix, and logits of all its positions, anew in every "
        f"step (hub_loop.py). Engine: batch 1, as it is and compiled; together: up to {TOGETHER} sequences. Last row: "
        "three solved problems before each."
    )
    return Section("hub_loop", f"engine and hub loop, {options.dtypes[0]}", HUB_COLUMNS, rows, note)


def faster(one: Sequence[Pass], other: Sequence[Pass]) -> Spread:
    """How many times as fast, round by round."""
    return spread(
        [a.tokens_per_second / b.tokens_per_second for a, b in zip(one, other, strict=True)]
    )


def solve_by_hub_loop(
    llm: LLM, params: DecodingParams, examples: Sequence[Example], shots: int = 0
) -> Pass:
    """Decode all problems without a cache."""
    limit = get_task("word_problems").max_new_tokens
    threshold = params.threshold
    assert threshold is not None, "the reference has no defaults"
    prompts = [encode(llm, example, shots) for example in examples]
    soft = params.strategy == "spd"
    began = time.perf_counter()
    done = [
        hub_loop.generate(
            llm.checkpoint, prompt, threshold=threshold, soft=soft, max_new_tokens=limit
        )
        for prompt in prompts
    ]
    seconds = time.perf_counter() - began
    return Pass(seconds, tuple(ids for ids, _ in done), sum(forwards for _, forwards in done))


# --- (c) batch sizes ------------------------------------------------------------------------------


def batching(options: CpuOptions) -> Section:
    """SPD at batch sizes and in dtypes: speed, memory, and the loop's own share of a step."""
    examples = get_task("word_problems").examples(options.batch_limit, options.seed)
    params = DecodingParams("spd", 0.5)
    rows = []
    loaded = {
        dtype: LLM("tiny-dmax", dtype=dtype, device="cpu").checkpoint for dtype in options.dtypes
    }
    keys = [(dtype, size) for dtype in options.dtypes for size in options.batch_sizes]
    llms = {key: LLM.from_checkpoint(loaded[key[0]], max_batch_size=key[1]) for key in keys}
    passes = in_turns(
        {str(key): partial(solve, llms[key], params, examples) for key in keys}, options.repeats
    )
    for dtype, size in keys:
        done = passes[str((dtype, size))]
        llm = llms[dtype, size]
        watches = [watch_once(llm, params, examples) for _ in range(options.repeats)]
        shares, picking, calls = zip(*watches, strict=True)
        rows.append(
            {
                "dtype": dtype,
                "batch": size,
                "tokens_per_second": spread([one.tokens_per_second for one in done]),
                "ms_per_forward": spread([one.seconds / calls[0] * 1e3 for one in done]),
                "model_calls": calls[0],
                "loop_overhead": spread(shares),
                "picking": spread(picking),
                **measure_apart("tiny-dmax", dtype, size, options.batch_limit, options.seed),
            }
        )
    columns = {
        "dtype": "dtype",
        "batch": "batch:d",
        "tokens/s": "tokens_per_second:.0f",
        "ms/forward": "ms_per_forward:.2f",
        "loop overhead": "loop_overhead:.1%",
        "of it best tokens": "picking:.1%",
        "peak MiB": "peak_mib:.0f",
        "loaded MiB": "loaded_mib:.0f",
    }
    note = (
        "Loop overhead: share of the wall time outside `base_model.forward` and the head's product (hidden states "
        "times output embeddings, timed by running it once more). Forwards: calls of the model, prefill included. "
        "Memory: resident, in a process of its own for each row (VmHWM; loaded: VmRSS before decoding)."
    )
    return Section(
        "batching", f"batch sizes, tiny-dmax, SPD, {len(examples)} problems", columns, rows, note
    )


def watch_once(
    llm: LLM, params: DecodingParams, examples: Sequence[Example]
) -> tuple[float, float, int]:
    """Shares of a pass spent outside the model and on picking tokens, and calls of the model."""
    with watched(llm.model) as watch:
        done = solve(llm, params, examples)
    return watch.outside(done.seconds), watch.picked(done.seconds), watch.calls


# --- (d) a dense backbone and its floor -----------------------------------------------------------


def dense_backbone(options: CpuOptions) -> Section:
    """A 135M Llama, one open block behind a prefix, against its matrix products alone."""
    repeats = 5 * options.repeats
    rows = []
    for dtype in options.dtypes:
        checkpoint = llama_135m(DTYPES[dtype], num_hidden_layers=options.dense_layers)
        times = dense_times(checkpoint, repeats, options.compiles)
        row: Row = {
            "dtype": dtype,
            "parameters": sum(parameter.numel() for parameter in checkpoint.model.parameters()),
            **times,
            "ratio": times["ms_per_forward"]["median"] / times["floor_ms"]["median"],
        }
        if options.compiles:
            row["compiled_ratio"] = times["compiled_ms"]["median"] / times["floor_ms"]["median"]
        rows.append(row)
    columns = {
        "dtype": "dtype",
        "products alone, ms": "floor_ms:.1f",
        "ms/forward": "ms_per_forward:.1f",
        "ratio": "ratio:.2f",
        "compiled": "compiled_ms:.1f",
        "its ratio": "compiled_ratio:.2f",
    }
    note = (
        "One open block of 32 behind 256 cached tokens, head included, as the engine runs it. Products alone: the same "
        "linear layers on inputs of the same shape, and the head; attention's own two products are left out."
    )
    return Section("dense", "135M dense backbone, random weights", columns, rows, note)


@torch.no_grad()
def dense_times(
    checkpoint: Checkpoint, repeats: int, compiles: bool, context: int = CONTEXT
) -> dict[str, Spread]:
    """Milliseconds of a denoising forward with its head, as it is and compiled, and of its products, all in turns."""
    model: Any = checkpoint.model
    length = checkpoint.special_ids.block_length
    head = model.get_output_embeddings().weight
    products: list[tuple[Tensor, Tensor]] = [
        (torch.randn(length, head.shape[1]).to(head.dtype), head)
    ]
    forward = open_block(checkpoint, context + length)

    def collect(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        products.append((arguments[0].clone(), layer.weight))

    linear = [layer for layer in model.base_model.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(collect) for layer in linear]
    forward()
    for hook in hooks:
        hook.remove()

    def floor() -> None:
        for left, weight in products:
            F.linear(left, weight)

    runs: dict[str, Callable[[], object]] = {"ms_per_forward": forward, "floor_ms": floor}
    if compiles:
        runs["compiled_ms"] = open_block(checkpoint, context + length, compiled=True)
    times = in_turns({name: partial(milliseconds, run, CPU) for name, run in runs.items()}, repeats)
    return {name: spread(each) for name, each in times.items()}


# --- ratios ---------------------------------------------------------------------------------------


def ratios(options: CpuOptions, *tables: Sequence[Row]) -> Section:
    """What the tables amount to, against what was aimed at."""
    methods, loops, batches, dense = tables
    speed = {row["method"]: row["tokens_per_second"]["median"] for row in methods}
    by_size = {(row["dtype"], row["batch"]): row for row in batches}
    rows = []
    for spd in ("SPD", "SPD, best"):
        rows.append(ratio(f"{spd} / threshold", speed[spd] / speed["threshold"], ">= 2.5"))
        rows.append(ratio(f"{spd} / one token", speed[spd] / speed["one token"], ">= 5"))
        rows.append(ratio(f"{spd} / one token, block 1", speed[spd] / speed["one token, block 1"]))
    for row in loops:
        behind = f", {row['shots']} examples before" if row["shots"] else ""
        names = {
            "engine": "engine",
            "compiled": "compiled engine",
            "together": f"engine, {TOGETHER} at once,",
        }
        for key, name in names.items():
            if gain := row.get(f"{key}_ratio"):
                rows.append(
                    ratio(f"{name} / hub loop, {row['method']}{behind}", gain["median"], ">= 3")
                )
    for dtype in options.dtypes:
        alone = by_size[dtype, 1]
        rows.append(
            ratio(f"loop overhead, batch 1, {dtype}", alone["loop_overhead"]["median"], "<= 0.1")
        )
        if (dtype, 16) in by_size:
            sixteen = by_size[dtype, 16]
            gain = sixteen["tokens_per_second"]["median"] / alone["tokens_per_second"]["median"]
            rows.append(
                ratio(
                    f"loop overhead, batch 16, {dtype}",
                    sixteen["loop_overhead"]["median"],
                    "<= 0.03",
                )
            )
            rows.append(ratio(f"batch 16 / batch 1, {dtype}", gain, ">= 6"))
    for row in dense:
        names = {"ratio": "135M forward", "compiled_ratio": "135M forward, compiled,"}
        rows += [
            ratio(f"{name} / its products, {row['dtype']}", row[key], "<= 1.5")
            for key, name in names.items()
            if row.get(key)
        ]
    return Section("ratios", "ratios", RATIO_COLUMNS, rows)
