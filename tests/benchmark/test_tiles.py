"""The tile search at toy size: its candidates, what is wrong with some, and going on."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
KERNELS = Path(__file__).parents[1] / "kernels"
sys.path.append(str(KERNELS))

from interpreted import is_interpreted  # noqa: E402

if not is_interpreted():
    pytest.skip("kernels are not interpreted here", allow_module_level=True)

import tiles as bench  # noqa: E402
from sanitizer import watch  # noqa: E402
from tile_cases import Call, Case, Sizes, cases, changed  # noqa: E402

from dmax.kernels import using  # noqa: E402
from dmax.models import LLaDA2MoeConfig  # noqa: E402

CPU = torch.device("cpu")
TOY = Sizes(
    LLaDA2MoeConfig(
        hidden_size=128, moe_intermediate_size=128, num_experts=8, num_experts_per_tok=2,
        vocab_size=300, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    ),
    distinct=4, formats=("bf16", "int4"), rows=(32,), positions=(32,),
    contexts=(96,), batches=(2,), calls=1,
)  # fmt: skip


def plain(call: Call) -> tuple[Tensor, int]:
    return call(), 0


def by_call(calls: Sequence[Call]) -> dict[str, float]:
    """A millisecond for each."""
    return dict.fromkeys(("median", "low", "high"), float(len(calls)))


@pytest.mark.parametrize("place", range(4), ids=["experts", "int4 experts", "head", "attention"])
def test_candidates_give_what_the_default_gives(place: int) -> None:
    name, group = list(cases(TOY, CPU))[place]
    with using("triton"), watch(), torch.inference_mode():
        (case,) = group()
        row = bench.measure(case, by_call, plain)
    assert case.name.startswith(name)
    assert case.default not in case.tiles.values()
    assert [each["tile"] for each in row["tiles"]] == ["default", *case.tiles]
    assert len(row["tiles"]) >= 5
    # The interpreter has no limits, but its products are of 16 columns or more, as everywhere.
    assert [each for each in row["tiles"] if "problem" in each] == []
    assert all(each["us"]["median"] == 1000 for each in row["tiles"])


def toy(*, tiles: dict[str, Any]) -> Case:
    """A kernel whose tile is what it gives."""

    def calls(tile: float) -> list[Call]:
        if tile < 0:
            raise RuntimeError("out of resource: shared memory\nRequired: 262144")
        return [lambda: torch.tensor([float(tile)])]

    return Case("a toy", 1.0, tiles, calls)


def test_what_is_wrong_with_a_candidate_is_listed() -> None:
    def run(call: Call) -> tuple[Tensor, int]:
        result = call()
        return result, 24 if result == 1.001 else 0

    case = toy(tiles={"does not fit": -1, "wrong": 2.0, "spills": 1.001, "good": 1.002})
    row = bench.measure(case, by_call, run)
    told = {each["tile"]: each.get("problem") for each in row["tiles"]}
    assert told == {
        "default": None,
        "does not fit": "RuntimeError: out of resource: shared memory",
        "wrong": "another result, by 1.0e+00",
        "spills": "spills 24 words of each thread",
        "good": None,
    }
    assert [each["tile"] for each in row["tiles"] if "us" in each] == ["default", "good"]
    cells = bench.table(row).cells
    assert [each["of the default"] for each in cells] == ["1.00", "1.00", "–", "–", "–"]


def test_the_search_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def group(*names: str) -> list[Case]:
        return [Case(name, 1.0, {}, lambda _: [lambda: torch.ones(1)]) for name in names]

    def timer(calls: Sequence[Call]) -> dict[str, float]:
        measured.append(len(calls))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return by_call(calls)

    groups = [("head", lambda: group("a", "b")), ("attention", lambda: group("c"))]
    monkeypatch.setattr(bench, "cases", lambda *_: groups)
    output = tmp_path / "tiles.json"
    with pytest.raises(KeyboardInterrupt):
        bench.search(TOY, CPU, output, (), timer, plain)
    assert [row["case"] for row in json.loads(output.read_text())["cases"]] == ["a"]
    bench.search(TOY, CPU, output, ["attention"], timer, plain)
    record = bench.search(TOY, CPU, output, (), timer, plain)
    assert [row["case"] for row in record["cases"]] == ["a", "c", "b"]
    assert json.loads(output.read_text()) == json.loads(json.dumps(record))
    assert len(measured) == 4


def test_without_a_gpu_it_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tiles.py"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "run this on a machine with an NVIDIA GPU" in capsys.readouterr().err


def test_the_default_is_not_tried_twice() -> None:
    from dmax.kernels.moe_triton import Tile

    tiles = changed(Tile(16, 32, 128), columns=(16, 32, 64), warps=(4,))
    assert tiles == {"columns 16": Tile(16, 16, 128), "columns 64": Tile(16, 64, 128)}
