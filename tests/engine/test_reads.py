"""What a step asks of the device: one look at it and as many launches, however many rows there are.

A device runs ahead of the host until the host reads a tensor. So reads are what makes it wait.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest
import torch
from parts import COUNT, L, confident, request, run, scripted
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dmax.decoding import get_strategy
from dmax.decoding.block import State, View
from dmax.decoding.spd import SoftParallelDecoding
from dmax.engine.blocks import OpenBlocks, read
from dmax.engine.engine import Engine
from dmax.params import DecodingParams
from dmax.special_ids import SpecialIds

READS = (
    Tensor.cpu,
    Tensor.item,
    Tensor.tolist,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
)


class Reads(TorchFunctionMode):
    """Notes what makes the host wait for a device; on the host itself it costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in READS:
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Launches(TorchDispatchMode):
    """Notes operations that compute or copy; views do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not function.is_view:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU is asked whether all rows are greedy; a GPU, which would be waited for, is not."""
    monkeypatch.setattr(OpenBlocks, "noise", lambda *_: None)


def steps_of(num_rows: int, **params: Any) -> list[tuple[list[str], list[str]]]:
    """Reads and launches of the steps of requests that are alike, after they have all begun."""
    params = {"max_new_tokens": 4 * L, **params}
    engine = scripted(table(), react=1.0, max_batch_size=num_rows, max_length=8 * L)
    for index in range(num_rows):
        engine.add(replace(request((1, 2), index, **params), provisional=index % 2 == 1))
    engine.prepare()
    found = []
    while engine.is_busy():
        with Reads() as reads, Launches() as launches:
            engine.step()
        found.append((reads.names, launches.names))
    return found


def table() -> Tensor:
    """Every position takes a different time to be sure of, so that several blocks are open."""
    generator = torch.Generator().manual_seed(2)
    return 3 * torch.randn(8 * L, 12, generator=generator)


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "spd"},
        {"strategy": "spd", "top_k": 3},
        {"strategy": "threshold", "threshold": 0.5},
        {"strategy": "d2f", "threshold": 0.5},
        {"strategy": "mbd", "options": {"blocks": 3, "opens_at": 0.0}},
        {"strategy": "lopa", "options": {"num_branches": 2}},
    ],
    ids=str,
)
def test_sixteen_rows_cost_as_many_reads_and_launches_as_one(settings: dict[str, Any]) -> None:
    alone = steps_of(1, **settings)
    together = steps_of(16, **settings)
    assert [reads for reads, _ in together] == [["cpu"]] * len(alone)
    assert [launches for _, launches in together] == [launches for _, launches in alone]


def test_a_step_of_several_strategies_reads_once() -> None:
    engine = scripted(table(), react=1.0, max_batch_size=4, max_length=8 * L)
    for index, strategy in enumerate(("spd", "threshold", "d2f", "lopa")):
        engine.add(request((1, 2), index, strategy=strategy, max_new_tokens=4 * L))
    while engine.is_busy():
        with Reads() as reads:
            engine.step()
        assert reads.names == ["cpu"]


# --- opening together -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched(SoftParallelDecoding):
    """Notes how many blocks are opened together; refuses later blocks of requests with this cap."""

    name: ClassVar[str] = "watched"
    opened: ClassVar[list[int]] = []

    refused: int = 0

    def open(self, view: View) -> State:
        is_first = ~view.active.all(dim=1)
        if ((view.max_steps == self.refused) & ~is_first).any():
            raise RuntimeError("out of order")
        self.opened.append(len(view.tokens))
        return super().open(view)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    plugin = EntryPoint("watched", f"{__name__}:Watched", "dmax.strategies")
    monkeypatch.setattr("dmax.decoding.entry_points", lambda group: [plugin])
    found = list[int]()
    monkeypatch.setattr(Watched, "opened", found)
    return found


def watching(num_rows: int, **options: Any) -> Engine:
    engine = scripted(confident(COUNT * 5), max_batch_size=num_rows, max_length=5 * L)
    for index in range(num_rows):
        asked = {"strategy": "watched", "options": options, "max_steps_per_block": 5 + index}
        engine.add(request((1,), index, max_new_tokens=3 * L - 1, **asked))
    return engine


def test_new_blocks_of_one_strategy_are_opened_together(opened: list[int]) -> None:
    engine = watching(16)
    while engine.is_busy():
        engine.step()
    assert opened == [16, 16, 16]


def test_a_strategy_that_refuses_a_block_ends_its_request_in_its_place(opened: list[int]) -> None:
    engine = watching(3, refused=6)  # the second request's
    events = engine.step()
    assert [(event.index, event.kind) for event in events] == [
        (0, "committed"),
        (1, "committed"),
        (1, "finished"),
        (2, "committed"),
    ]
    assert str(events[2].error) == "out of order"
    assert opened == [3, 1, 1]
    rest = [event for _ in range(2) for event in engine.step()]
    assert not engine.is_busy()
    expected = run(scripted(confident(COUNT * 5)), request((1,), 0, max_new_tokens=3 * L - 1))[0]
    for index in (0, 2):
        (output,) = [event.output for event in rest if event.index == index and event.output]
        assert output == expected


# --- the bytes of a row ---------------------------------------------------------------------------


def blocks_of(num_slots: int, block_length: int = L, **settings: Any) -> OpenBlocks:
    params = DecodingParams("spd", **settings)
    strategy = get_strategy(params)
    ids = SpecialIds(11, (10,), 10, block_length)
    blocks = OpenBlocks(strategy, num_slots, ids, nn.Embedding(12, 4), torch.device("cpu"))
    for slot in range(num_slots):
        blocks.admit(slot, strategy, params)
    return blocks


@pytest.mark.parametrize("block_length", [1, 3, 32])
def test_the_host_sees_what_the_device_has(block_length: int) -> None:
    blocks = blocks_of(3, block_length)
    blocks.open_all(torch.tensor([0, 2]), [(), (5,) * (block_length - 1)])
    blocks.confidence.copy_(torch.rand(3, block_length))
    blocks.flags[1] = True
    (records,) = read([blocks])
    for name in ("tokens", "masked", "active", "written", "confidence", "step", "flags"):
        assert records[name].tolist() == getattr(blocks, name).tolist()
    assert blocks.masked.sum(dim=1).tolist() == [block_length, 0, 1]
    assert blocks.tokens[2].tolist() == [5] * (block_length - 1) + [11]


def test_rows_that_the_device_opens_keep_their_settings() -> None:
    blocks = blocks_of(2, threshold=0.25, max_steps_per_block=3)
    blocks.open(0, (1, 2))
    blocks.open(1, (1, 2))
    blocks.step.fill_(2)
    blocks.open(torch.tensor([1]))
    assert blocks.tokens.tolist() == [[1, 2] + [11] * (L - 2), [11] * L]
    assert blocks.step.tolist() == [2, 0]
    assert blocks.max_steps.tolist() == [3, 3]
    assert blocks.numbers["threshold"].tolist() == [[0.25], [0.25]]


def test_more_slots_leave_what_is_open_as_it_is() -> None:
    blocks = blocks_of(2, threshold=0.25)
    blocks.open(1, (1, 2))
    before = {name: getattr(blocks, name).clone() for name in ("tokens", "masked", "max_steps")}
    blocks.grow(5)
    for name, values in before.items():
        now = getattr(blocks, name)
        assert len(now) == 5
        assert torch.equal(now[:2], values)
    blocks.open(1)  # still with the settings of its request
    assert blocks.numbers["threshold"][1].item() == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blends_are_read_in_the_precision_of_the_model(dtype: torch.dtype) -> None:
    ids = torch.randint(10, (3, L, 2))
    probs = torch.rand(3, L, 2, dtype=dtype)
    several = blocks_of(3, top_k=2)
    several.feedback = {"ids": ids, "probs": probs}
    plain = blocks_of(5)
    plain.open(4, (7,))
    first, second = read([several, plain])
    assert first["ids"].tolist() == ids.tolist()
    assert first["probs"].tolist() == probs.tolist()
    assert second["tokens"][4].tolist() == [7] + [11] * (L - 1)
