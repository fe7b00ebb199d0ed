"""Predicts the time of a denoising step of LLaDA-2.0-mini on an H100 or H200, with none there.

    python tools/predict_step.py            # tables, and bench/results/prediction.json
    python tools/predict_step.py --check    # whether these are of today's code

The nodes of a step come from `count_kernels.py`, so they follow the code. Each takes the time to
start it and to read its bytes. `PLANNED` has what starts and bytes cost by a review of commit
ac8ffd2, which expected 5.24 ms of that code. `MEASURED` has what measurements on an H100 have
changed since (bench/results/gpu_nvidia-h100_*.json): 5.06 ms; `TODAY` is for the kernels that came
after. Nothing else may change a constant.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from count_kernels import LAYERS, LENGTH, Node, Setting, layer_and_rest
from machine_code import MULTIPROCESSORS

from dmax.kernels.quant import Format

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "bench/results/prediction.json"
EXPERTS = 256
DISTINCT = 69.5  # experts that a block hits in a layer (arXiv 2605.30876)
BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (1024, 16_384)
TPF = 6


@dataclass(frozen=True, slots=True)
class Constants:
    """What things cost on a GPU.

    Attributes:
        copy: TB/s of a copy within its memory.
        starts: microseconds from the end of a node to the first bytes of the next, by its name.
        kernel: the same of Triton kernels that `starts` does not name.
        operation: the same of operations of PyTorch that it does not name.
        early: microseconds that a launch saves which overlaps with the node before.
        rates: TB/s at which nodes read weights, keys and values, by name; others read as a copy.
        cache: TB/s of all else that a node reads and writes, which stays in the L2 cache.
        products: 10^12 operations a second of large products.
        turn: microseconds in which a multiprocessor goes on by a tile of keys of attention, with
            128 queries. It adds to the time of reading.
        ceilings: TB/s at which the arithmetic of the experts' loops alone would go. It adds to the
            time of reading.
        host: microseconds between two steps.
    """

    copy: float
    starts: Mapping[str, float]
    kernel: float
    operation: float
    early: float
    rates: Mapping[str, float]
    cache: float
    products: float
    host: float
    turn: float = 0.0
    ceilings: Mapping[str, float] = field(default_factory=dict)


# The review's table, "where 5.2 ms go". A start includes 1.3 us between dependent nodes.
PLANNED = Constants(
    copy=3.0,
    starts={
        "_norm_kernel": 2.8,
        "mm": 3.1,  # 7.3 with the 12.6 MB of QKV, 5.8 with the 8.4 MB of O
        "mm, divided": 3.8,  # 4.5 with the 2.1 MB of a shared expert's matrix
        "mm to float32": 4.95,  # 5.3 with the 1 MB of a router
        "_prepare_kernel": 3.3,
        "_attend_kernel": 4.8,  # 6.3 with keys, values and partial sums of 1,024 positions
        "_merge_kernel": 2.5,  # 3.3 with these partial sums
        "_select_kernel": 4.5,
        "_gate_up_kernel": 1.3,
        "_down_kernel": 1.3,
        "_tile_kernel": 1.3,
        "sum": 2.6,
    },
    kernel=3.3,
    operation=2.2,
    early=0.7,  # 0.15 to 0.35 ms over all launches by Triton
    rates={"_gate_up_kernel": 2.7, "_down_kernel": 2.5, "_tile_kernel": 2.75},
    cache=5.5,
    products=600,
    host=130,
)
# Steps in four formats (5.06, 4.01, 4.08 and 4.69 ms): experts arrive as fast as a copy, and the
# arithmetic of their loops comes on top, by the ceiling of the machine code (issue slots and ALU).
# Conversions of fp8 take at most half as long as NVIDIA's table has it, so they do not count.
MEASURED = replace(PLANNED, copy=3.02, rates={"_tile_kernel": 2.75})
# Kernels of today's code that took another time alone on an H100 than the review gave such kernels
# (bench/results/gpu_nvidia-h100_engine_2026-11-26.json): 10.7, 2.7 and 2.1 us each. Attention is a
# chain: of 7 shares of 1,024 positions, one had three tiles of keys. A turn comes from steps of
# 4,096 and 16,384 positions (gpu_nvidia-h100_contexts_2026-11-26.json, commit bfe898d): 21.4 us
# more in each layer, of which 8.3 are bytes, and 6 turns more of programs with 128 queries, one
# after another on each multiprocessor. The start is what is left of the 10.7 us.
TODAY = replace(
    MEASURED,
    turn=2.2,
    starts={
        **MEASURED.starts,
        "_attend_kernel": 3.0,
        "_logits_kernel": 2.3,
        "_prepare_kernel": 2.0,
    },
)
GPUS = {"H100": 3.02, "H200": 4.3}
"""TB/s of a copy: measured, and as others measured it."""
EIGHT_BITS = ("int8", "fp8")
AIMS = {
    ("H100", "bf16"): ("4.15", "1,395"),
    ("H200", "bf16"): ("–", "1,800"),
    **{("H100", form): ("2.73", "2,200") for form in EIGHT_BITS},
    **{("H200", form): ("–", "2,900") for form in EIGHT_BITS},
}
EXPERT_KERNELS = ("_gate_up_kernel", "_down_kernel")
ARITHMETIC = ("issue", "alu", "fma")
# Commit ac8ffd2 at batch 1 and 1,024 positions: nodes of a layer, then all others.
REVIEWED_LAYER = (
    (2, Node("_norm_kernel")),
    (1, Node("mm", weights=12_582_912)),
    (1, Node("_prepare_kernel")),
    (1, Node("_attend_kernel", cache=2048, activations=4_500_000)),
    (1, Node("_merge_kernel", activations=4_500_000)),
    (1, Node("mm", weights=8_388_608)),
    (1, Node("mm to float32", 2, weights=1_048_576)),
    (1, Node("_select_kernel")),
    (1, Node("_to_copy")),
    (1, Node("_route_kernel")),
    (1, Node("_gate_up_kernel", experts=1_073_741_824, num_experts=EXPERTS)),
    (1, Node("_down_kernel", experts=536_870_912, num_experts=EXPERTS)),
    (1, Node("sum")),
    (3, Node("mm, divided", 2, weights=2_097_152)),
    (1, Node("silu")),
    (1, Node("mul")),
    (2, Node("add")),
)
REVIEWED_REST = (
    *((number, node) for number, node in REVIEWED_LAYER[:6]),
    (2, Node("mm", weights=20_971_520)),
    (1, Node("mm", weights=20_971_520)),
    (3, Node("silu")),
    (1, Node("_tile_kernel", weights=643_825_664)),
    (13 + 95, Node("add")),  # the head's merging; decision, mask and rotary
)
# By the review's ceilings: gate-up and down, by two thirds and one.
REVIEWED_CEILINGS = {"bf16": 35.8, "int8": 7.2, "fp8": 7.2, "int4": 1.18}
REVIEWED_BYTES = {"bf16": 2.0, "int8": 1.004, "fp8": 1.004, "int4": 0.5156}  # of a weight
STEPS_MEASURED = {"bf16": 5.06, "int8": 4.01, "fp8": 4.08, "int4": 4.69}


@dataclass(frozen=True, slots=True)
class Part:
    """The nodes of one name in a step: how many, and milliseconds of all of them."""

    nodes: int
    ms: float


@dataclass(frozen=True, slots=True)
class Load:
    """What the nodes of a step work on.

    Attributes:
        rows: blocks of the forward.
        context: positions that each of them reads.
        form: of the experts.
    """

    rows: int
    context: int
    form: str = "bf16"

    @property
    def distinct(self) -> float:
        """Experts that are hit in a layer, if every block draws its own."""
        return EXPERTS * (1 - (1 - DISTINCT / EXPERTS) ** self.rows)


def start_of(node: Node, constants: Constants) -> float:
    """Microseconds from the end of the node before to this one's first bytes."""
    other = constants.kernel if node.name.endswith("_kernel") else constants.operation
    start = constants.starts.get(node.name, other)
    return start - constants.early if node.is_early else start


def microseconds(node: Node, load: Load, constants: Constants) -> float:
    """The time that a node takes in the step's graph."""
    rate = constants.rates.get(node.name, constants.copy)
    tokens = load.rows * LENGTH
    shared = node.num_experts - EXPERTS  # of the stack, read whatever is chosen
    of_experts = 0.0
    if node.experts:
        of_experts = node.experts * (load.distinct + shared) / node.num_experts
    read = node.weights + of_experts + node.cache * load.context * load.rows
    time = max(read / rate, node.weights * tokens / constants.products) / 1e6
    if node.experts and load.form in constants.ceilings:
        time += of_experts / constants.ceilings[load.form] / 1e6
    shares = min(node.most_shares, max(load.context // node.keys_of_share, 1))
    in_cache = node.activations + node.share * shares
    time += in_cache / constants.cache / 1e6
    return start_of(node, constants) + time + chain(node, load.context, shares, constants)


def chain(node: Node, context: int, shares: int, constants: Constants) -> float:
    """Microseconds of the turns that a multiprocessor takes after each other, if there are any."""
    if not node.programs:
        return 0.0
    shares = max(shares, 1)  # a single one has no results to be merged
    turns = -(-(context // node.keys + 1) // shares)  # the block itself is a tile, too
    programs = -(-node.programs * shares // MULTIPROCESSORS)  # of the busiest multiprocessor
    return programs * turns * constants.turn * node.queries / 128


def step_ms(nodes: Mapping[Node, int], load: Load, constants: Constants) -> float:
    """Milliseconds of a step."""
    times = (number * microseconds(node, load, constants) for node, number in nodes.items())
    return (sum(times) + constants.host) / 1e3


def launched_early(nodes: Mapping[Node, int]) -> Counter[Node]:
    """The nodes if every Triton kernel starts before the one in front of it has ended."""
    return Counter(
        {
            replace(node, is_early=node.name.endswith("_kernel")): number
            for node, number in nodes.items()
        }
    )


def by_cause(nodes: Mapping[Node, int], load: Load, constants: Constants) -> dict[str, float]:
    """Milliseconds of a step by what takes them."""
    ms = step_ms(nodes, load, constants)
    arithmetic = ms - step_ms(nodes, load, replace(constants, ceilings={}))
    starts = sum(number * start_of(node, constants) for node, number in nodes.items()) / 1e3
    host = constants.host / 1e3
    return {
        "reading": ms - arithmetic - starts - host,
        "arithmetic of the experts": arithmetic,
        "starts": starts,
        "host": host,
    }


def by_name(nodes: Mapping[Node, int], load: Load, constants: Constants) -> dict[str, Part]:
    """What the nodes of each name take together, the longest first."""
    parts: dict[str, Part] = {}
    for node, number in nodes.items():
        before = parts.get(node.name, Part(0, 0.0))
        ms = before.ms + number * microseconds(node, load, constants) / 1e3
        parts[node.name] = Part(before.nodes + number, ms)
    return dict(sorted(parts.items(), key=lambda item: -item[1].ms))


def nodes_of(setting: Setting) -> Counter[Node]:
    """Nodes of a step of today's code over the whole model."""
    layer, rest = layer_and_rest(setting)
    return Counter({node: LAYERS * number for node, number in layer.items()}) + rest


def reviewed(form: str, constants: Constants) -> float:
    """Milliseconds of a step of commit ac8ffd2 at batch 1 and 1,024 positions."""
    nodes: Counter[Node] = Counter()
    for times, part in ((LAYERS, REVIEWED_LAYER), (1, REVIEWED_REST)):
        for number, node in part:
            size = int(node.experts * REVIEWED_BYTES[form] / 2)
            nodes[replace(node, experts=size)] += times * number
    return step_ms(nodes, Load(1, 1024, form), constants)


def ceilings() -> dict[str, float]:
    """TB/s at which the arithmetic of the experts' loops could go, from today's machine code."""
    command = [sys.executable, str(ROOT / "tools/compile_kernels.py"), "90", "experts, 32 tokens"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    times: defaultdict[str, float] = defaultdict(float)
    for line in done.stdout.splitlines():
        told = json.loads(line)
        if told["kernel"] in EXPERT_KERNELS:
            rate = min(loop["ceilings"][pipe] for loop in told["loops"] for pipe in ARITHMETIC)
            share = 2 / 3 if told["kernel"] == EXPERT_KERNELS[0] else 1 / 3
            times[told["case"].partition(" ")[0]] += share / rate
    return {form: round(1 / time, 2) for form, time in times.items()}


def speed(step_ms: float, first_ms: float, batch: int) -> float:
    """Tokens a second at TPF 6, with the first step of each block, which also commits another."""
    steps = LENGTH / TPF
    return batch * LENGTH / (first_ms + (steps - 1) * step_ms) * 1e3


def rows_of(setting: Setting, known: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row of the prediction for each GPU."""
    form = setting.form or "bf16"
    first = replace(setting, commits=True)
    nodes = nodes_of(setting)
    first_nodes = nodes_of(first)
    load = Load(setting.batch, setting.span, form)
    first_load = Load(2 * setting.batch, setting.span, form)
    found = []
    for gpu, copy in GPUS.items():
        constants = replace(TODAY, copy=copy, ceilings=known)
        ms = step_ms(nodes, load, constants)
        first_ms = step_ms(first_nodes, first_load, constants)
        parts = by_name(nodes, load, constants)
        early_ms = step_ms(launched_early(nodes), load, constants)
        early_first_ms = step_ms(launched_early(first_nodes), first_load, constants)
        found.append(
            {
                "gpu": gpu,
                "experts": form,
                "batch": setting.batch,
                "context": setting.span,
                "kernels": sum(number * node.kernels for node, number in nodes.items()),
                "step_ms": round(ms, 3),
                "first_step_ms": round(first_ms, 3),
                "tokens_per_second": round(speed(ms, first_ms, setting.batch)),
                "early": {
                    "step_ms": round(early_ms, 3),
                    "tokens_per_second": round(speed(early_ms, early_first_ms, setting.batch)),
                },
                "causes": {
                    cause: round(each, 3)
                    for cause, each in by_cause(nodes, load, constants).items()
                },
                "parts": {name: [part.nodes, round(part.ms, 3)] for name, part in parts.items()},
            }
        )
    return found


def settings() -> Iterator[Setting]:
    for form in (None, *get_args(Format)):
        for batch in BATCHES:
            for context in CONTEXTS:
                yield Setting(batch, span=context, form=form)


def record(rows: Sequence[Mapping[str, Any]], known: Mapping[str, float]) -> dict[str, Any]:
    """What is written."""
    return {
        "command": "python tools/predict_step.py",
        "constants": asdict(TODAY) | {"copy": GPUS, "ceilings": known},
        "rows": rows,
    }


def written(told: Mapping[str, Any]) -> str:
    """The record as JSON, with a line for each row."""
    rows = ",\n".join(json.dumps(row) for row in told["rows"])
    head = json.dumps({key: value for key, value in told.items() if key != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n]}}\n'


def page(rows: Sequence[Mapping[str, Any]], known: Mapping[str, float]) -> str:
    """The prediction as Markdown."""
    lines = [
        "# Predicted steps",
        "",
        "`python tools/predict_step.py` writes this page and [prediction.json](prediction.json),",
        "which also has every kernel. What was measured stands below. The tool says where its",
        "constants come from. Tokens/s: at TPF 6, with the first step of every block, which also",
        "commits the block before.",
        "",
        *(f"- {line}" for line in reproduced()),
        "",
        "| GPU | experts | batch | positions | kernels | ms per step | first step, ms | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['gpu']} | {row['experts']} | {row['batch']} | {row['context']:,} | "
            f"{row['kernels']} | {row['step_ms']:.2f} | {row['first_step_ms']:.2f} | "
            f"{row['tokens_per_second']:,} |"
        )
    at_batch_1 = [row for row in rows if row["batch"] == 1 and row["context"] == CONTEXTS[0]]
    lines += ["", "## Aims", "", *aims(at_batch_1)]
    for row in at_batch_1:
        if row["gpu"] == "H100":
            lines += ["", f"## H100, {row['experts']}, batch 1, {row['context']:,} positions", ""]
            lines += ["| kernel | nodes | ms |", "|---|---|---|"]
            lines += [
                f"| `{name}` | {nodes} | {ms:.3f} |" for name, (nodes, ms) in row["parts"].items()
            ]
    ceiling = ", ".join(f"{form} {rate}" for form, rate in known.items())
    lines += ["", f"Ceilings of the experts' arithmetic, TB/s: {ceiling}."]
    return "\n".join(lines) + "\n"


def aims(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was aimed at, at batch 1 and 1,024 positions, and where the time goes."""
    yield "Early: if every Triton kernel starts before the one in front of it has ended, which is"
    yield "an estimate. What takes the time of a step, in ms: reading bytes, the arithmetic of the"
    yield "experts' loops that reading does not hide, starts of nodes, the host."
    yield ""
    yield (
        "| GPU | experts | ms | early | aim | tokens/s | early | aim | "
        "reading | arithmetic | starts | host |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    missed = []
    for row in rows:
        ms, tokens = AIMS.get((row["gpu"], row["experts"]), ("–", "–"))
        causes = " | ".join(f"{each:.2f}" for each in row["causes"].values())
        early = row["early"]
        yield (
            f"| {row['gpu']} | {row['experts']} | {row['step_ms']:.2f} | {early['step_ms']:.2f} | "
            f"{ms} | {row['tokens_per_second']:,} | {early['tokens_per_second']:,} | {tokens} | "
            f"{causes} |"
        )
        if tokens != "–" and row["tokens_per_second"] < int(tokens.replace(",", "")):
            missed.append(what_would(row, int(tokens.replace(",", ""))))
    if missed:
        yield ""
        yield "What is short of an aim, and what would close it. The review counts on more: 0.1 ms"
        yield "if the host builds rows while the GPU works, 0.17 ms if products of attention take"
        yield "norms and residuals with them."
        yield ""
        yield from missed


def what_would(row: Mapping[str, Any], tokens: int) -> str:
    """A line on a row that misses its tokens per second."""
    steps = LENGTH / TPF
    block_ms = row["first_step_ms"] + (steps - 1) * row["step_ms"]
    aim_ms = LENGTH / tokens * 1e3
    early_ms = row["step_ms"] - row["early"]["step_ms"]
    return (
        f"- {row['gpu']}, {row['experts']}: a block takes {block_ms:.1f} ms and may take "
        f"{aim_ms:.1f}, {(block_ms - aim_ms) / steps:.2f} less for each of its {steps:.1f} steps. "
        f"Hiding all arithmetic would give {row['causes']['arithmetic of the experts']:.2f}, "
        f"early starts {early_ms:.2f}."
    )


def reproduced() -> Iterator[str]:
    """What the constants say of code whose time is known."""
    planned = reviewed("bf16", PLANNED)
    yield f"commit ac8ffd2 by the review's constants: {planned:.2f} ms, which it gave as 5.24"
    constants = replace(MEASURED, ceilings=REVIEWED_CEILINGS)
    for form, ms in STEPS_MEASURED.items():
        yield f"the same, {form}, mended: {reviewed(form, constants):.2f} ms, measured {ms}"
    yield "commit aad5b1a, bf16: measured 4.34 ms, with early starts 4.20 (first steps 6.49, 6.35)"


def is_recorded() -> bool:
    """Whether the record has what today's code gives, at batch 1 in bfloat16."""
    told = json.loads(RECORD.read_text(encoding="utf-8"))
    rows = rows_of(Setting(), told["constants"]["ceilings"])
    return all(json.loads(json.dumps(row)) in told["rows"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="compare the record with the code; write nothing"
    )
    if parser.parse_args().check:
        print("\n".join(reproduced()))
        if not is_recorded():
            parser.error(f"{RECORD.name} is of other code; run python tools/predict_step.py")
        return
    known = ceilings()
    rows = [row for setting in settings() for row in rows_of(setting, known)]
    rows.sort(key=lambda row: row["gpu"])
    RECORD.write_text(written(record(rows, known)), encoding="utf-8")
    RECORD.with_suffix(".md").write_text(page(rows, known), encoding="utf-8")
    print(page(rows, known), end="")


if __name__ == "__main__":
    main()
