"""Captured steps: what is captured, when, on which stream, and what a capture must not touch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any
from weakref import WeakSet

import pytest
import torch
from parts import (
    L,
    confident,
    dense_decoder,
    engine_of,
    random_prompts,
    recorder,
    request,
    run,
    scripted,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmax.checkpoint import Checkpoint
from dmax.decoding import get_strategy
from dmax.decoding.threshold import ThresholdDecoding
from dmax.engine.batch import Batch
from dmax.engine.engine import MAX_IDLE
from dmax.engine.graphs import SPAN, CudaCapture, GraphedSteps, Replay
from dmax.engine.request import Request
from dmax.engine.runner import ModelRunner
from dmax.engine.warm_up import warm_up
from dmax.kernels import using
from dmax.params import DecodingParams

Golden = tuple[str, Any, dict[str, Any]]

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")


def random_table() -> Tensor:
    return torch.randn(64, 12, generator=torch.Generator().manual_seed(0))


def test_captured_steps_decode_the_same(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint, _ = golden
    captured = list[Replay]()
    monkeypatch.setattr("dmax.engine.graphs.CudaCapture", lambda: recorder(captured))
    prompts = random_prompts(3, 17, 16, 40, 1)
    for strategy, threshold in (("threshold", 0.9), ("threshold", 0.3), ("d2f", 0.9)):
        params = DecodingParams(strategy=strategy, threshold=threshold, max_new_tokens=48)
        requests = [Request(index, ids, params) for index, ids in enumerate(prompts)]
        eager = run(engine_of(checkpoint), *requests)
        assert run(engine_of(checkpoint, cuda_graphs=True), *requests) == eager
        few = engine_of(checkpoint, cuda_graphs=True, max_batch_size=3)
        assert run(few, *requests[::-1]) == eager
    assert captured


@pytest.mark.parametrize("strategy", ["spd", "lopa", "credit", "iter_smooth"])
def test_steps_are_captured_with_what_is_remembered_and_fed_back(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = list[Replay]()
    monkeypatch.setattr("dmax.engine.graphs.CudaCapture", lambda: recorder(captured))
    settings = {"strategy": strategy, "threshold": 0.3, "max_new_tokens": 3 * L}
    requests = [request((1,) * n, n, **settings) for n in (1, 9, 20)]
    eager = run(scripted(random_table(), react=3.0), *requests)
    assert run(scripted(random_table(), react=3.0, cuda_graphs=True), *requests) == eager
    assert captured


# --- the memory that graphs share -----------------------------------------------------------------


class Made(TorchDispatchMode):
    """Keeps every tensor that lies in memory of its own, not in that of an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {memory_of(each) for each in tensors_in((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        self.tensors += [each for each in tensors_in(result) if memory_of(each) not in given]
        return result


def tensors_in(tree: Any) -> list[Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, Tensor)]


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class PoisoningRecorder:
    """The worst that graphs of one pool may do to each other.

    A pool is safe only for graphs that run in the order of their capture. So each of them may write
    wherever another has put anything, and does so as soon as it runs.
    """

    def __init__(self, poison: bool) -> None:
        self.poison = poison
        self.made: list[list[Tensor]] = []  # by every graph, in the order of capture
        self.num_overwritten = 0

    def __call__(self, run: Replay) -> Replay:
        number = len(self.made)
        self.made.append([])

        def replay() -> None:
            others = [*self.made[:number], *self.made[number + 1 :]]
            for tensor in chain.from_iterable(others):
                tensor.fill_(self.poison)
                self.num_overwritten += 1
            with Made() as made:
                run()
            self.made[number] = made.tensors

        replay()  # what is made in the capture is in the pool, too
        return replay


@pytest.mark.parametrize("poison", [True, False])
@pytest.mark.parametrize(
    ("first", "second"),
    [("spd", "threshold"), ("threshold", "spd"), ("lopa", "spd"), ("spd", "lopa")],
)
def test_groups_of_one_round_do_not_touch_each_others_flags(
    first: str, second: str, poison: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = PoisoningRecorder(poison)
    monkeypatch.setattr("dmax.engine.graphs.CudaCapture", lambda: recorder)
    requests = [
        request(
            (1,) * 9, n, max_new_tokens=4 * L, threshold=0.3, strategy=second if n % 2 else first
        )
        for n in range(4)
    ]
    eager = run(scripted(random_table(), react=3.0), *requests)
    engine = scripted(random_table(), react=3.0, cuda_graphs=True)
    for order in (requests, requests, requests[::-1], requests):  # the groups too run in that order
        assert run(engine, *order) == eager
    assert recorder.num_overwritten > 0


@torch.inference_mode()
def test_what_a_step_leaves_outlives_the_steps_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = PoisoningRecorder(poison=True)
    monkeypatch.setattr("dmax.engine.graphs.CudaCapture", lambda: recorder)
    engine = scripted(random_table(), max_batch_size=3, max_length=64)  # the third is the spare one
    for index, strategy in enumerate(("spd", "threshold")):
        engine.add(request((1,) * 9, index, strategy=strategy, max_steps_per_block=8))
    engine.step()
    steps = GraphedSteps(engine.runner)
    groups = [(blocks, batch) for blocks, batch, _ in engine.batches()]
    for order in (groups, groups, groups, groups[::-1], groups):
        left = []
        for blocks, batch in order:
            steps(blocks, batch)
            left.append(blocks.shown().clone())
        assert all(map(torch.equal, left, [blocks.shown() for blocks, _ in order]))
    assert recorder.num_overwritten > 0


# --- captures -------------------------------------------------------------------------------------


class FakeCuda:
    """`torch.cuda` as captures use it: streams, and graphs that only say what they are given.

    Attributes:
        streams: made so far, besides the one that is current at the start.
        captures: options of each capture.
        graphs: of each capture.
        is_capturing: whether a capture goes on.
        generator: what numbers are drawn from.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = self.main = FakeStream("main")
        self.streams: list[FakeStream] = []
        self.captures: list[dict[str, Any]] = []
        self.graphs: list[FakeGraph] = []
        self.is_capturing = False
        self.generator = FakeGenerator()
        for name, replacement in {
            "default_generators": (self.generator,),
            "current_device": lambda: 0,
            "graph_pool_handle": object,
            "Stream": self.new_stream,
            "current_stream": lambda: self.current,
            "stream": self.stream,
            "CUDAGraph": FakeGraph,
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, replacement)

    def new_stream(self) -> FakeStream:
        self.streams.append(FakeStream(f"side {len(self.streams)}"))
        return self.streams[-1]

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before = self.current
        self.current = stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: FakeGraph, **options: Any) -> Iterator[None]:
        self.captures.append(options)
        self.graphs.append(graph)
        before = self.current
        self.current = options["stream"]
        self.is_capturing = True
        self.generator.is_captured = True
        try:
            yield
        except RuntimeError:
            # As PyTorch does: it has not left the stream.
            raise RuntimeError("failed due to a previous error during capture")  # noqa: B904
        finally:
            self.is_capturing = False
        self.generator.is_captured = False
        self.current = before


class FakeGenerator:
    """A generator whose state belongs to a capture from its beginning to a good end."""

    def __init__(self) -> None:
        self.is_captured = False

    def manual_seed(self, seed: int) -> None:
        """`torch.manual_seed` seeds the generator of every GPU that is in use."""

    def clone_state(self) -> FakeGenerator:
        return FakeGenerator()

    def graphsafe_set_state(self, other: FakeGenerator) -> None:
        self.is_captured = other.is_captured


class FakeStream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.waits_for: list[str] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waits_for.append(other.name)


class FakeGraph:
    num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1


def test_captures_share_one_stream_and_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    capture = CudaCapture()
    ran_on = []

    def step() -> None:
        ran_on.append(cuda.current)

    replays = [capture(step) for _ in range(3)]
    (side,) = cuda.streams
    assert ran_on == [side] * 6  # each to warm up, and in its capture
    assert [options["stream"] for options in cuda.captures] == [side] * 3
    assert len({id(options["pool"]) for options in cuda.captures}) == 1
    # What other threads do meanwhile, such as copies, breaks no capture.
    assert {options["capture_error_mode"] for options in cuda.captures} == {"thread_local"}
    assert (side.waits_for, cuda.main.waits_for) == (["main"] * 3, ["side 0"] * 3)
    for replay in replays[1:]:
        replay()
    assert [graph.num_replays for graph in cuda.graphs] == [0, 1, 1]
    assert len(ran_on) == 6  # a replay runs nothing


def test_after_a_failed_capture_others_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cuda = FakeCuda(monkeypatch)
    step = ThresholdDecoding.step

    def step_that_waits(self: Any, view: Any, *args: Any) -> Any:
        if cuda.is_capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nand much more")
        return step(self, view, *args)

    requests = [
        request((1,) * 9, index, strategy=strategy, max_new_tokens=4 * L)
        for index, strategy in enumerate(("threshold", "spd"))
    ]
    eager = run(scripted(random_table()), requests[0])
    monkeypatch.setattr(ThresholdDecoding, "step", step_that_waits)
    engine = scripted(random_table(), cuda_graphs=True, max_length=64)
    for _ in range(3):
        assert run(engine, requests[0]) == eager
    assert cuda.current is cuda.main
    assert not cuda.generator.is_captured  # others may draw numbers
    num_failed = len(cuda.captures)
    engine.capture(requests[1].strategy, 64)
    # A pool that a failed capture recorded to takes no other.
    pools = [id(options["pool"]) for options in cuda.captures]
    assert len(set(pools)) == num_failed + 1 and len(pools) > num_failed + 1
    (message,) = caplog.messages
    assert message.endswith("slower: operation not permitted when stream is capturing")


def test_a_step_that_no_graph_can_hold_runs_eagerly_for_good(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = list[Replay]()

    def refuse(run: Replay) -> Replay:
        tried.append(run)
        if len(tried) == 1:
            raise RuntimeError("not permitted when stream is capturing\nand much more")
        raise RuntimeError(f"out of memory. Tried to allocate {len(tried)} MiB.")

    monkeypatch.setattr("dmax.engine.graphs.CudaCapture", lambda: refuse)
    requests = [request((1,) * n, n, max_new_tokens=3 * L) for n in (1, 9, 20)]
    eager = run(scripted(random_table(), react=3.0), *requests)
    engine = scripted(random_table(), react=3.0, cuda_graphs=True)
    assert run(engine, *requests) == eager
    assert run(engine, *requests) == eager
    shapes = len(tried)  # each came twice
    assert run(engine, *requests) == eager
    assert len(tried) == shapes >= 2
    run(engine, replace(requests[0], params=replace(requests[0].params, top_k=2)))
    run(engine, replace(requests[0], params=replace(requests[0].params, top_k=2)))
    assert len(tried) > shapes
    told = "a step runs without a CUDA graph, which is slower: "
    assert caplog.messages == [
        told + "not permitted when stream is capturing",
        told + "out of memory. Tried to allocate 2 MiB.",
    ]


def test_settings_of_clients_keep_a_bounded_number_of_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive = WeakSet[Replay]()

    def record(run: Replay) -> Replay:
        run()

        def replay() -> None:
            run()

        alive.add(replay)
        return replay

    monkeypatch.setattr("dmax.engine.graphs.CudaCapture", lambda: record)
    engine = scripted(random_table(), cuda_graphs=True)

    def graphs_of(top_ks: range) -> int:
        for top_k in top_ks:
            for threshold in (0.3, 0.4, 0.5):  # numbers may differ within a graph
                run(engine, request((1,) * 9, top_k=top_k, threshold=threshold, ignore_eos=True))
        gc.collect()
        return len(alive)

    of_one = graphs_of(range(1, 2))
    assert of_one > 0
    assert graphs_of(range(2, 3 * MAX_IDLE)) <= of_one * (MAX_IDLE + 1)


@torch.inference_mode()
def test_steps_of_one_shape_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = scripted(confident([1] * 160, 0.6), max_batch_size=4, max_length=160)
    for index in range(3):
        engine.add(request((1,), index, max_new_tokens=2 * L))
    engine.step()
    ((blocks, _, _),) = engine.batches()
    captured = list[Replay]()
    monkeypatch.setattr("dmax.engine.graphs.CudaCapture", lambda: recorder(captured))
    steps = GraphedSteps(engine.runner)

    def take_step(num_rows: int) -> None:
        rows = [(slot, 0, 0, slot, -1) for slot in range(num_rows)]
        steps(blocks, Batch.of(rows, [], L))

    for num_rows in (3, 3, 3, 4, 2, 2):
        take_step(num_rows)
    # Three rows filled up to four, and two. Four in order, read without a copy, came once.
    assert len(captured) == 2
    steps.forget(blocks)
    take_step(2)
    assert len(captured) == 2  # the first time again
    take_step(2)
    assert len(captured) == 3


def test_rows_that_fill_a_batch_up_are_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a request they would draw experts that nobody else needs."""
    monkeypatch.setattr("dmax.engine.graphs.CudaCapture", lambda: recorder([]))
    engine = scripted(confident([1] * 160, 0.6), cuda_graphs=True, max_batch_size=3)
    seen = []
    forward = engine.model.forward

    def watched(**inputs: Any) -> Any:
        seen.append(inputs["past_key_values"].idle.tolist())
        return forward(**inputs)

    monkeypatch.setattr(engine.model, "forward", watched)
    run(engine, *(request((1,), index, max_new_tokens=L - 1) for index in range(3)))
    all_idle = [True] * 4  # as a step is captured
    assert [False, False, False, True] in seen
    assert all(idle in ([False, False, False, True], all_idle) for idle in seen)


# --- before the first request ---------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["spd", "threshold", "mbd"])
def test_a_warm_engine_captures_nothing_more(
    strategy: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    captured = list[Replay]()
    monkeypatch.setattr("dmax.engine.graphs.CudaCapture", lambda: recorder(captured))
    engine = scripted(random_table(), react=3.0, cuda_graphs=True, max_batch_size=3)
    params = DecodingParams(strategy)
    with caplog.at_level("INFO", "dmax.engine"):
        warm_up(engine, params)
    num_open = 4 * get_strategy(params).blocks  # three are filled up to four
    num_sizes = num_open.bit_length()
    # With no block pending, the rows may also lie in order, and then are read without a copy.
    expected = num_sizes * (num_sizes + 2)
    assert len(captured) == expected
    assert caplog.messages[-1].startswith(f"captured {num_sizes * (num_sizes + 1)} of ")
    requests = [
        request((1,) * length, n, strategy=strategy, threshold=0.3, temperature=temperature)
        for n, (length, temperature) in enumerate([(3 * L, 0.0), (9, 0.0), (1, 0.5), (6 * L, 0.0)])
    ]
    for several in ([requests[0]], [requests[1]], requests[1:]):
        run(engine, *several)
    assert len(captured) == expected
    warm_up(engine, params)
    assert len(captured) == expected


def test_a_warm_up_plans_for_what_will_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmax.engine.graphs.CudaCapture", lambda: recorder([]))
    for given, planned in (({}, 64), ({"max_length": 3 * L + 1}, 4 * L), ({"max_length": L}, L)):
        engine = scripted(random_table(), cuda_graphs=True, max_batch_size=2, **given)
        warm_up(engine, DecodingParams("spd"))
        cache = engine.runner.cache
        assert (cache.capacity, len(cache.lengths)) == (planned, 2 + 1)
    engine = scripted(random_table(), max_batch_size=2)  # on a CPU
    warm_up(engine, DecodingParams("spd"))
    assert engine.model.num_calls > 0 and not engine.is_busy()


@pytest.mark.parametrize(("in_place", "num_graphs"), [(False, 2 * 4), (True, 2)])
def test_the_graphs_of_a_long_request(
    in_place: bool, num_graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps with a pending block and without, of each span unless attention reads in place."""
    captured = list[Replay]()
    monkeypatch.setattr("dmax.engine.graphs.CudaCapture", lambda: recorder(captured))
    monkeypatch.setattr(ModelRunner, "reads_in_place", in_place)
    length = 4 * SPAN
    tokens = torch.arange(length) % 8 + 1
    engine = scripted(confident(tokens.tolist(), 0.6), cuda_graphs=True)
    long = request((1,) * (6 * L), max_new_tokens=length - 6 * L, ignore_eos=True)
    assert run(engine, long)[0].token_ids == tuple(tokens[6 * L :].tolist())
    assert len(captured) == num_graphs


def test_attention_reads_in_place_where_our_kernels_run(golden: Golden) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    _, checkpoint, _ = golden
    runner = ModelRunner(checkpoint.model, checkpoint.special_ids, num_slots=1, capacity=128)
    dense = dense_decoder(vocab_size=40)
    other = ModelRunner(dense.model, dense.special_ids, num_slots=1, capacity=128)
    assert not runner.reads_in_place
    with torch.inference_mode(), using("triton"):
        assert runner.reads_in_place
        with torch.autocast("cpu", torch.bfloat16):  # heads of another dtype than the cache
            assert not runner.reads_in_place
        assert not other.reads_in_place


# --- the device -----------------------------------------------------------------------------------


class FakeDevice:
    """`torch.cuda.device`: makes a device the current one."""

    current = torch.device("cuda", 0)

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.before = FakeDevice.current
        FakeDevice.current = self.device

    def __exit__(self, *_: object) -> None:
        FakeDevice.current = self.before


def test_everything_runs_on_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, and graphs are captured there."""
    seen: dict[str, set[torch.device]] = {"forward": set(), "prefill": set(), "capture": set()}

    def new_capture() -> Any:
        seen["capture"].add(FakeDevice.current)
        return recorder([])

    def watch(name: str, function: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            seen[name].add(FakeDevice.current)
            return function(*args, **kwargs)

        return watched

    monkeypatch.setattr(torch.cuda, "device", FakeDevice)
    monkeypatch.setattr("dmax.engine.graphs.CudaCapture", new_capture)
    for name in ("forward", "prefill"):
        function = getattr(ModelRunner, name)
        monkeypatch.setattr(ModelRunner, name, watch(name, function))
    requests = [request((1,) * n, n) for n in (1, 6 * L)]
    eager = run(scripted(random_table()), *requests)
    for kept in seen.values():
        kept.clear()
    second = torch.device("cuda", 1)
    engine = scripted(random_table())
    engine._device = second
    for _ in range(2):
        assert run(engine, *requests) == eager
    assert seen == dict.fromkeys(seen, {second})
    assert FakeDevice.current == torch.device("cuda", 0)  # the caller's, as before


# --- on a GPU -------------------------------------------------------------------------------------


@contextmanager
def on_gpu(checkpoint: Checkpoint) -> Iterator[None]:
    """A model on the GPU for a while, with the experts that it would have there."""
    model: Any = checkpoint.model
    model.to("cuda")
    model.set_experts_implementation("fused_moe")
    try:
        yield
    finally:
        model.to("cpu")
        model.set_experts_implementation("dense_mm")


@on_a_gpu
def test_a_gpu_decodes_two_kinds_of_requests_at_once(
    golden: Golden, caplog: pytest.LogCaptureFixture
) -> None:
    _, checkpoint, _ = golden
    with on_gpu(checkpoint):
        prompts = random_prompts(3, 17, 16, 40)
        requests = [
            Request(index, ids, DecodingParams(("threshold", "spd")[index % 2], max_new_tokens=48))
            for index, ids in enumerate(prompts)
        ]
        eager = run(engine_of(checkpoint, cuda_graphs=False), *requests)
        engine = engine_of(checkpoint, cuda_graphs=True)
        for order in (requests, requests, requests[::-1], requests):
            assert run(engine, *order) == eager
        assert caplog.messages == []  # every step was captured


@on_a_gpu
def test_a_gpu_goes_on_after_a_failed_capture(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, checkpoint, _ = golden
    with on_gpu(checkpoint):
        ids = random_prompts(17)[0]
        waiting = Request(0, ids, DecodingParams("threshold", max_new_tokens=48))
        plain = Request(1, ids, DecodingParams("spd", max_new_tokens=48))
        eager = run(engine_of(checkpoint, cuda_graphs=False), waiting, plain)
        step = ThresholdDecoding.step

        def step_that_waits(self: Any, view: Any, *args: Any) -> Any:
            view.masked.sum().item()
            return step(self, view, *args)

        monkeypatch.setattr(ThresholdDecoding, "step", step_that_waits)
        engine = engine_of(checkpoint, cuda_graphs=True)
        stream = torch.cuda.current_stream()
        for _ in range(3):
            assert run(engine, waiting, plain) == eager
        assert torch.cuda.current_stream() == stream
        assert torch.rand(3, device="cuda").isfinite().all()  # others may draw numbers
        (message,) = caplog.messages  # "spd" is captured
        assert "without a CUDA graph" in message and "captur" in message
