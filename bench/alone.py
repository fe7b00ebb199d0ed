"""What a step is made of, each measured alone: nodes of a graph that do nothing, and every kernel.

A kernel is timed in a CUDA graph of all its launches in one step. Those of the layers follow each
other there, so that none finds its weights in the cache, and each waits for the one before.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dmax.benchmark.gpu import failure
from dmax.benchmark.measure import Spread, milliseconds, spread
from dmax.benchmark.report import MISSING, Row, Table, figure
from dmax.benchmark.steps import never_sure, step_times
from dmax.checkpoint import Checkpoint
from dmax.engine.request import Request
from dmax.kernels import has_triton
from dmax.llm import LLM

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from count_kernels import Count, Node  # noqa: E402
from predict_step import TODAY, Load, microseconds  # noqa: E402

NODES = 500
REPLAYS = 20
STEPS = 3  # of a block, of which the last is recorded

Call = Callable[[], object]


def in_graph(calls: Sequence[Call], device: torch.device) -> Spread:
    """Milliseconds of all calls one after another; on a GPU of a replay of their graph."""

    def run() -> None:
        for call in calls:
            call()

    replay = run
    if device.type == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # compiles what has not run yet
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay
    replay()
    return spread([milliseconds(replay, device) for _ in range(REPLAYS)])


def node_table(device: torch.device) -> Table:
    """What a node costs that does nothing."""
    number = torch.zeros(1, device=device)
    cases: dict[str, Call] = {"operation of PyTorch": lambda: number.add_(1)}
    if device.type == "cuda" and has_triton():
        from empty_kernel import launch  # which imports triton

        cases["Triton kernel"] = partial(launch, number, early=False)
        cases["Triton kernel, launched early"] = partial(launch, number, early=True)
    rows: list[Row] = []
    for case, call in cases.items():
        row: Row = {"case": case}
        try:
            times = in_graph([call] * NODES, device)
            row["us"] = {name: ms * 1e3 / NODES for name, ms in times.items()}
        except RuntimeError as error:
            row |= failure(error)
        rows.append(row)
    cells = [
        {
            "node": row["case"],
            "us": figure(row.get("us"), ".2f"),
            "problem": row.get("error", MISSING),
        }
        for row in rows
    ]
    note = f"In a graph of {NODES} that wait for each other."
    return Table("nodes", "a node that does nothing", rows, cells, note)


class Recorder(Count):
    """The nodes of a step with real tensors, each with what runs it again.

    Args:
        device: where nodes run; what the host computes for itself is left out.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.calls: dict[str, list[Call]] = defaultdict(list)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        with self:
            result = function.decompose(*args, **given)
        if result is not NotImplemented:  # in inference mode composite operations arrive whole
            return result
        before = len(self.nodes)
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if len(self.nodes) > before:
            used = [each for each in tree_leaves((args, given, result)) if isinstance(each, Tensor)]
            if used and all(each.device == self.device for each in used):
                self.calls[self.nodes[-1].name].append(partial(function, *args, **given))
            else:
                self.nodes.pop()
        return result

    def run(self, original: Callable[..., Any], kernel: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of a launch by Triton."""
        self.launch(kernel, *args, **kwargs)
        self.calls[self.nodes[-1].name].append(partial(original, kernel, *args, **kwargs))
        return original(kernel, *args, **kwargs)


def record_step(checkpoint: Checkpoint, context: int, prefill_tokens: int) -> Recorder:
    """A denoising step at batch 1 near the end of a context, run without graphs."""
    block = checkpoint.special_ids.block_length
    llm = LLM.from_checkpoint(checkpoint, max_batch_size=1)
    engine = llm.engine(max_length=context, prefill_tokens=prefill_tokens, cuda_graphs=False)
    size = (2, context - block)
    prompts = torch.randint(block, size, generator=torch.Generator().manual_seed(0)).tolist()
    warm_up, request = (
        Request(index, tuple(prompt), never_sure(block, STEPS))
        for index, prompt in enumerate(prompts)
    )
    num_steps = len(step_times(engine, [warm_up]))  # those of the prefill among them
    engine.add(request)
    for _ in range(num_steps - 1):
        engine.step()
    recorder = Recorder(llm.model.device)
    with recorder_of_triton(recorder), recorder:
        engine.step()
    return recorder


def recorder_of_triton(recorder: Recorder) -> Any:
    """Launches by Triton go through the recorder, where there are any."""
    if not has_triton():
        return patch.object(recorder, "within", 0)
    from triton.runtime.jit import JITFunction

    original = JITFunction.run
    return patch.object(
        JITFunction, "run", lambda *args, **kwargs: recorder.run(original, *args, **kwargs)
    )


def kernel_table(checkpoint: Checkpoint, context: int, prefill_tokens: int) -> Table:
    """Every kernel of a step at batch 1, beside the prediction."""
    model: Any = checkpoint.model
    with torch.inference_mode():
        recorder = record_step(checkpoint, context, prefill_tokens)
        rows = [
            kernel_row(name, calls, recorder.nodes, context, model.device)
            for name, calls in recorder.calls.items()
        ]
    rows.sort(key=lambda row: -row["us"]["median"] if "us" in row else 0.0)
    cells = [
        {
            "kernel": row["case"],
            "nodes": str(row["nodes"]),
            "us": figure(row.get("us"), ".1f"),
            "predicted us": figure(row["predicted_us"], ".1f"),
            "measured / predicted": figure(row.get("ratio"), ".2f"),
            "problem": row.get("error", MISSING),
        }
        for row in rows
    ]
    note = "Of all nodes of that name in a step together, one after another in a graph."
    return Table("kernels", f"each kernel alone, batch 1, {context} positions", rows, cells, note)


def kernel_row(
    name: str,
    calls: Sequence[Call],
    nodes: Sequence[Node],
    context: int,
    device: torch.device,
) -> Row:
    """All nodes of one name; an `error` where they cannot be captured."""
    load = Load(1, context)
    predicted = sum(microseconds(node, load, TODAY) for node in nodes if node.name == name)
    row: Row = {"case": name, "nodes": len(calls), "predicted_us": predicted}
    try:
        times = in_graph(calls, device)
    except RuntimeError as error:
        return row | failure(error)
    row["us"] = {each: ms * 1e3 for each, ms in times.items()}
    row["ratio"] = row["us"]["median"] / predicted
    return row
