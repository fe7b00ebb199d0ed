"""Requests with a temperature: drawn inside the step, by their own seed and nothing else."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from packaging.version import Version
from parts import V, engine_of, random_prompts, recorder, request, run, scripted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dmax.decoding.block import Output
from dmax.engine import step as engine_step
from dmax.engine.blocks import OpenBlocks
from dmax.engine.graphs import Replay
from dmax.engine.request import Request
from dmax.engine.step import decide
from dmax.kernels import using
from dmax.params import DecodingParams

Golden = tuple[str, Any, dict[str, Any]]
TEMPERATURES = (0.0, 0.8, 1.5, 0.0, 3.0)


def asked(strategy: str, **options: Any) -> list[Request]:
    """Greedy and sampled requests of many lengths, which have nothing but their strategy alike."""
    prompts = random_prompts(3, 17, 16, 40, 1)
    return [
        Request(
            index,
            prompt,
            DecodingParams(
                strategy,
                threshold=0.3 + index / 10,
                temperature=temperature,
                seed=index,
                max_new_tokens=16,
                **options,
            ),
        )
        for index, (prompt, temperature) in enumerate(zip(prompts, TEMPERATURES, strict=True))
    ]


@pytest.mark.parametrize("strategy", ["spd", "d2f", "lopa", "credit"])
def test_neighbours_slots_chunks_and_graphs_change_no_sample(
    golden: Golden, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, checkpoint, _ = golden
    captured = list[Replay]()
    monkeypatch.setattr("dmax.engine.graphs.CudaCapture", lambda: recorder(captured))
    requests = asked(strategy)
    alone = {}
    for each in requests:
        alone |= run(engine_of(checkpoint, max_batch_size=1), each)
    length = checkpoint.special_ids.block_length
    assert run(engine_of(checkpoint), *requests) == alone
    assert run(engine_of(checkpoint, max_batch_size=2), *requests[::-1]) == alone
    chunks = run(engine_of(checkpoint, prefill_tokens=length), *requests)
    assert {index: each.token_ids for index, each in chunks.items()} == {
        index: each.token_ids for index, each in alone.items()
    }
    assert run(engine_of(checkpoint, cuda_graphs=True), *requests) == alone
    assert captured


def test_greedy_and_sampled_requests_share_a_forward_and_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured = list[Replay]()
    monkeypatch.setattr("dmax.engine.graphs.CudaCapture", lambda: recorder(captured))
    table = torch.randn(64, V, generator=torch.Generator().manual_seed(0))
    whole: dict[str, Any] = {"strategy": "threshold", "threshold": 1.0, "ignore_eos": True}

    def forwards_and_graphs(*temperatures: float) -> tuple[int, int]:
        captured.clear()
        engine = scripted(table, react=3.0, cuda_graphs=True)
        requests = [
            request((1, 2), index, temperature=temperature, **whole)
            for index, temperature in enumerate(temperatures)
        ]
        run(engine, *requests)
        return engine.model.num_calls, len(captured)

    greedy = forwards_and_graphs(0.0, 0.0)
    assert greedy[1] > 0
    assert forwards_and_graphs(0.0, 1.0) == greedy
    assert forwards_and_graphs(1.0, 2.0) == greedy


def test_a_request_without_a_seed_gets_one_of_its_own() -> None:
    table = torch.zeros(64, V)
    requests = [request((1, 2), index, temperature=1.0, ignore_eos=True) for index in range(2)]
    first = run(scripted(table), *requests)
    again = run(scripted(table), *requests)
    assert len({each[0].token_ids for each in (first, again)} | {first[1].token_ids}) == 3


class Logits(TorchDispatchMode):
    """Counts products with the head's weights [V, D]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.num_made = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        is_product = function.overloadpacket in (torch.ops.aten.linear, torch.ops.aten.mm)
        pointers = [each.data_ptr() for each in args if isinstance(each, Tensor)]
        self.num_made += is_product and self.weight.data_ptr() in pointers
        return result


@pytest.fixture
def interpreted() -> None:
    """Kernels of tensors on a CPU."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available() or Version(triton.__version__) < Version("3.7"):
        pytest.skip("this takes Triton's interpreter, from 3.7 on")


@pytest.mark.usefixtures("interpreted")
def test_the_fused_head_draws_the_same_tokens_and_makes_no_logits(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are fed back, not their probabilities: random weights make much of the last bits."""
    _, checkpoint, _ = golden
    requests = asked("threshold")[:3]
    weight = checkpoint.model.get_output_embeddings().weight
    with Logits(weight) as logits:
        expected = run(engine_of(checkpoint), *requests)
    monkeypatch.setattr("dmax.kernels.lm_head.can_fuse", lambda *_: True)
    with Logits(weight) as fused:
        found = run(engine_of(checkpoint), *requests)
    assert found == expected
    assert logits.num_made > 0
    assert fused.num_made == 0


class BothWays:
    """In place of `decide`: by kernels, and by their twins on a copy of the same blocks.

    Attributes:
        num_sampled: decisions that drew tokens.
        num_later: those of blocks that had been stepped before.
    """

    def __init__(self) -> None:
        self.num_sampled = 0
        self.num_later = 0

    def __call__(
        self, blocks: OpenBlocks, rows: Tensor, output: Output, before: Tensor, starts: Tensor
    ) -> Tensor:
        steps = blocks.step[rows].clone()
        twin = deepcopy(blocks)
        same = Output(output.source, output.mask_token_id, output.candidates)
        with using("torch"):
            expected = decide(twin, rows, same, before, starts)
        with using("triton"):
            flags = decide(blocks, rows, output, before, starts)
        assert torch.equal(flags, expected)
        for name in ("tokens", "masked", "written", "step", "flags"):
            assert torch.equal(getattr(blocks, name), getattr(twin, name)), name
        assert torch.equal(blocks.feedback["ids"][rows], twin.feedback["ids"][rows])
        torch.testing.assert_close(
            blocks.feedback["probs"][rows], twin.feedback["probs"][rows], rtol=1e-5, atol=1e-6
        )
        is_sampled = blocks.temperatures[rows] > 0
        self.num_sampled += int(is_sampled.sum())
        self.num_later += int((is_sampled & (steps > 0)).sum())
        return flags


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("top_k", [1, 3])
def test_kernels_draw_and_decide_what_their_twins_do_on_the_same_states(
    golden: Golden, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step of a trajectory, from the same hidden states and what was decided before.

    Two whole trajectories may part: SPD feeds back probabilities, and random weights make ten
    times as much of a difference in their last bits with every step. Twins in float32 and float64
    part as often.
    """
    _, checkpoint, _ = golden
    both = BothWays()
    monkeypatch.setattr(engine_step, "decide", both)
    run(engine_of(checkpoint), *asked("spd", top_k=top_k, max_steps_per_block=4)[:3])
    assert both.num_sampled > both.num_later > 8
