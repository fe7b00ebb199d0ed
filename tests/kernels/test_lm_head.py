"""LM head and top-k in one: the twin against decoding from logits, the kernel against the twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dmax.confidence import LARGEST, Candidates, GumbelNoise, take_best
from dmax.decoding.block import Output, View, predict
from dmax.errors import InputError
from dmax.kernels import lm_head
from dmax.kernels.lm_head import lm_head_top_k, lm_head_top_k_torch

INF = float("inf")
Head = Callable[..., Candidates]

# Inputs that overflow on purpose make NumPy, which interprets the kernel, warn.
overflows = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def grid(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Quarters in [-2, 2): in float32 their dot products are exact in any order, and often tie."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, shape, generator=generator).to(dtype) / 4


def product(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [N, N] and weights [V, N] whose product is `logits` [N, V].

    Infinities come by overflow.
    """
    huge = torch.finfo(logits.dtype).max * 0.9
    hidden = 2 * torch.eye(len(logits), dtype=logits.dtype)
    weight = (logits / 2).clamp(-huge, huge).T.contiguous()
    return hidden, weight


def reference(hidden: Tensor, weight: Tensor, k: int, mask_token_id: int) -> Candidates:
    """The same from stored logits and a stable sort, by `Output` and `predict`."""
    output = Output((hidden @ weight.T)[:, None], mask_token_id)  # [N, 1, V]
    broken = output.broken
    ids = output.logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    everywhere = ids[..., 0] >= 0
    view = View(
        tokens=ids[..., 0],
        masked=everywhere,
        active=everywhere,
        step=broken.long(),
        max_steps=torch.ones_like(broken.long()),
        mask_token_id=mask_token_id,
    )
    prediction = predict(view, output, k)
    assert torch.equal(prediction.tokens, ids[..., 0])
    assert torch.equal(prediction.probs, output.probs.gather(-1, ids))
    return Candidates(ids[:, 0], prediction.probs[:, 0], broken)


def assert_equal(actual: Candidates, expected: Candidates, tolerance: float = 0.0) -> None:
    assert torch.equal(actual.broken, expected.broken)
    assert torch.equal(actual.ids, expected.ids)
    bounds = {"rtol": tolerance, "atol": tolerance / 100, "equal_nan": True}
    torch.testing.assert_close(actual.probs, expected.probs, **bounds)


def merge_tiles(best: Tensor, ids: Tensor, score: Tensor, peak: Tensor, mass: Tensor) -> Candidates:
    """The twin of the merging kernel: the candidates of the whole vocabulary from its T tiles.

    Tiles stand in the order of the vocabulary. Of equal scores the first has the lowest id.

    Args:
        best: [N, T, k] logits of each tile; the first is that of the drawn token, if there is
            noise, and the others descend.
        ids: [N, T, k] int32, their tokens.
        score: [N, T] the first logit with its noise.
        peak: [N, T] the highest logit of each tile, MASK's included.
        mass: [N, T] the sum of exp(logit - peak) over each tile.
    """
    position = torch.arange(len(best), device=best.device)
    tile = score.argmax(dim=-1)
    logits = [best[position, tile, 0]]
    tokens = [ids[position, tile, 0]]
    others = best.flatten(1).clone()  # [N, T k]
    ids = ids.flatten(1)
    for _ in range(best.shape[2] - 1):
        others.masked_fill_(ids == tokens[-1][:, None], float("-inf"))
        logits.append(others.amax(dim=-1))
        is_best = others == logits[-1][:, None]
        tokens.append(ids.masked_fill(~is_best, torch.iinfo(ids.dtype).max).amin(dim=-1))
    highest = peak.amax(dim=-1, keepdim=True)  # [N, 1]
    total = (mass * (peak - highest).exp()).sum(dim=-1, keepdim=True)
    probs = (torch.stack(logits, dim=-1) - highest).exp() / total
    return Candidates(torch.stack(tokens, dim=-1).long(), probs, total[:, 0].isnan())


def on(device: torch.device, noise: GumbelNoise) -> GumbelNoise:
    """The same noise on a device."""
    names = ("seeds", "temperatures", "starts", "steps")
    return replace(noise, **{name: getattr(noise, name).to(device) for name in names})


@pytest.fixture
def triton_head(triton_device: torch.device) -> Head:
    """The Triton path in tiles so small that every test has several, on the device it runs on."""
    from dmax.kernels import lm_head_triton

    def run(
        hidden: Tensor, weight: Tensor, k: int, mask_token_id: int, noise: GumbelNoise | None = None
    ) -> Candidates:
        tile = lm_head_triton.Tile(vocabulary=16, size=16, warps=4, stages=2)
        hidden = hidden.to(triton_device)
        weight = weight.to(triton_device)
        best = lm_head_triton.top_k_of_tiles(
            hidden, weight, k, mask_token_id, LARGEST, noise and on(triton_device, noise), tile
        )
        merged = Candidates(*(tensor.cpu() for tensor in lm_head_triton.merge(best)))
        assert_equal(merged, Candidates(*map(Tensor.cpu, merge_tiles(*best))), tolerance=1e-6)
        return merged

    return run


@pytest.fixture(params=["torch", "triton"])
def either(request: pytest.FixtureRequest) -> Head:
    return (
        lm_head_top_k_torch if request.param == "torch" else request.getfixturevalue("triton_head")
    )


# ---- the twin -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_twin_gives_the_numbers_of_decoding(dtype: torch.dtype, k: int) -> None:
    hidden = torch.randn(9, 12, dtype=torch.float64).to(dtype)
    weight = torch.randn(70, 12).to(dtype)
    assert_equal(lm_head_top_k(hidden, weight, k, 69), reference(hidden, weight, k, 69))
    hidden = grid(9, 12, dtype=dtype)
    weight = grid(70, 12, dtype=dtype, seed=1)
    assert_equal(lm_head_top_k(hidden, weight, k, 3), reference(hidden, weight, k, 3))


def test_rows_in_chunks_are_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = grid(7, 12, dtype=torch.float32)
    weight = grid(50, 12, dtype=torch.float32, seed=1)
    whole = lm_head_top_k_torch(hidden, weight, 3, 0)
    for rows in (0, 1, 3):  # a row that is larger than the bound is a chunk of its own
        monkeypatch.setattr(lm_head, "CHUNK_BYTES", rows * 4 * 50)
        assert_equal(lm_head_top_k_torch(hidden, weight, 3, 0), whole)


def test_no_more_candidates_than_tokens_other_than_mask() -> None:
    hidden = grid(4, 8, dtype=torch.float32)
    weight = grid(3, 8, dtype=torch.float32, seed=1)
    result = lm_head_top_k(hidden, weight, 4, 1)
    assert result.ids.shape == result.probs.shape == (4, 2)
    assert (result.ids.sort(dim=-1).values == torch.tensor([0, 2])).all()


def test_no_candidates_are_an_error() -> None:
    with pytest.raises(InputError, match="top-0"):
        lm_head_top_k(torch.zeros(1, 4), torch.zeros(8, 4), 0, 0)


def test_best_are_taken_in_order_and_ties_from_the_left() -> None:
    where = take_best(torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0]]), 4)
    assert where.tolist() == [[1, 3, 2, 4]]


# ---- twin and kernel, worked out by hand --------------------------------------------------------

SIXTHS = [1 / 6] * 3
BY_HAND = {  # six tokens, MASK is 2, three candidates
    "all equal": ([0.0] * 6, [0, 1, 3], SIXTHS),
    "all -inf": ([-INF] * 6, [0, 1, 3], SIXTHS),
    "all +inf": ([INF] * 6, [0, 1, 3], SIXTHS),
    "+inf wins": ([5.0, 1.0, 5.0, 0.0, INF, 0.0], [4, 0, 1], [1.0, 0.0, 0.0]),
    "two +inf share": ([9.0, INF, 0.0, 0.0, INF, 8.0], [1, 4, 0], [0.5, 0.5, 0.0]),
    "-inf comes last": ([-INF, -INF, -INF, 0.0, 0.0, -INF], [3, 4, 0], [0.5, 0.5, 0.0]),
    "MASK is the best": ([0.1, 0.05, 0.5, 0.2, 0.1, 0.05], [3, 0, 4], [0.2, 0.1, 0.1]),
    "MASK is certain": ([3.0, 2.0, INF, 2.0, 4.0, 1.0], [4, 0, 1], [0.0, 0.0, 0.0]),
}


@overflows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hostile_logits_by_hand(either: Head, dtype: torch.dtype) -> None:
    logits = torch.tensor([row for row, _, _ in BY_HAND.values()])
    logits[6] = logits[6].log()  # given as probabilities
    result = either(*product(logits.to(dtype)), 3, 2)
    assert dict(zip(BY_HAND, result.ids.tolist(), strict=True)) == {
        name: ids for name, (_, ids, _) in BY_HAND.items()
    }
    expected = torch.tensor([probs for _, _, probs in BY_HAND.values()])
    torch.testing.assert_close(
        result.probs, expected, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 2e-2
    )
    assert not result.broken.any()


@overflows
def test_nan_marks_its_row_and_no_other(either: Head) -> None:
    hidden = grid(5, 12, dtype=torch.float32)
    weight = grid(40, 12, dtype=torch.float32, seed=1)
    hidden[:, 3] = 0
    clean = either(hidden, weight, 2, 0)
    weight[:, 3] = 1
    weight[33, 3] = 0
    hidden[1, 3] = INF  # 0 · inf at token 33, +inf elsewhere
    hidden[4] = torch.nan
    result = either(hidden, weight, 2, 0)
    assert result.broken.tolist() == [False, True, False, False, True]
    assert torch.equal(result.ids[[0, 2, 3]], clean.ids[[0, 2, 3]])
    assert torch.equal(result.probs[[0, 2, 3]], clean.probs[[0, 2, 3]])
    # They are looked up before the error is seen.
    assert (result.ids >= 0).all() and (result.ids < 40).all()


@overflows
def test_an_infinite_hidden_state_is_not_a_nan(either: Head) -> None:
    """It makes all logits +inf here, which share.

    40 rows do not fill the last tile; where there is no row, 0 · inf means nothing.
    """
    hidden = torch.zeros(2, 12)
    weight = torch.ones(40, 12)
    hidden[1] = INF
    result = either(hidden, weight, 2, 0)
    assert result.broken.tolist() == [False, False]
    assert result.ids.tolist() == [[1, 2], [1, 2]]
    torch.testing.assert_close(result.probs, torch.full((2, 2), 1 / 40))


# ---- the kernel against the twin ----------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_equals_the_twin(triton_head: Head, dtype: torch.dtype, k: int) -> None:
    """Exact dot products are rounded alike: same tokens, with ties. 70 and 24 fill no tile."""
    hidden = grid(9, 24, dtype=dtype)
    weight = grid(70, 24, dtype=dtype, seed=1)
    for mask_token_id in (0, 37, 69):
        twin = lm_head_top_k_torch(hidden, weight, k, mask_token_id)
        assert_equal(triton_head(hidden, weight, k, mask_token_id), twin, tolerance=1e-5)


def test_low_precision_logits_are_compared_after_rounding(triton_head: Head) -> None:
    """2049 and 2048 are one number in float16, so the lower id has it."""
    hidden = torch.ones(1, 16, dtype=torch.float16)
    weight = torch.zeros(40, 16, dtype=torch.float16)
    weight[7, 0] = 2048
    weight[30, :2] = torch.tensor([2048, 1])
    assert triton_head(hidden, weight, 2, 0).ids.tolist() == [[7, 30]]
    assert triton_head(hidden.float(), weight.float(), 2, 0).ids.tolist() == [[30, 7]]


@pytest.mark.parametrize("num_tokens", [1, 16, 33, 130])
def test_any_number_of_positions(triton_head: Head, num_tokens: int) -> None:
    hidden = torch.randn(num_tokens, 16)
    weight = torch.randn(40, 16)
    twin = lm_head_top_k_torch(hidden, weight, 2, 5)
    assert_equal(triton_head(hidden, weight, 2, 5), twin, tolerance=1e-5)


def test_every_token_but_mask_may_be_a_candidate(triton_head: Head) -> None:
    """A tile that holds only MASK, and tiles with fewer tokens than candidates."""
    hidden = grid(3, 16, dtype=torch.float32)
    weight = grid(17, 16, dtype=torch.float32, seed=1)
    twin = lm_head_top_k_torch(hidden, weight, 8, 16)
    assert_equal(triton_head(hidden, weight, 8, 16), twin, tolerance=1e-5)
    small = weight[:3]
    twin = lm_head_top_k_torch(hidden, small, 2, 1)
    assert_equal(triton_head(hidden, small, 2, 1), twin, tolerance=1e-5)


def test_hidden_states_may_be_a_slice(triton_head: Head) -> None:
    hidden = torch.randn(12, 32)[::2, :16]
    weight = torch.randn(40, 16)
    twin = lm_head_top_k_torch(hidden, weight, 2, 5)
    assert_equal(triton_head(hidden, weight, 2, 5), twin, tolerance=1e-5)


def test_what_the_kernel_cannot_do_goes_to_the_twin(
    monkeypatch: pytest.MonkeyPatch, kernels: torch.device
) -> None:
    from dmax.kernels import lm_head_triton

    calls = []
    run = lm_head_triton.top_k_of_tiles

    def spy(hidden: Tensor, weight: Tensor, k: int, *rest: Any) -> tuple[Tensor, ...]:
        calls.append((weight.dtype, k))
        return run(hidden, weight, k, *rest)

    monkeypatch.setattr(lm_head_triton, "top_k_of_tiles", spy)
    hidden = torch.randn(2, 16, device=kernels)
    weight = torch.randn(40, 16, device=kernels)
    lm_head_top_k(hidden, weight, 2, 5)
    lm_head_top_k(hidden.double(), weight.double(), 2, 5)
    lm_head_top_k(hidden, weight, 9, 5)
    assert calls == [(torch.float32, 2)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to capture a graph on")
def test_a_cuda_graph_can_hold_it() -> None:
    weight = grid(20_000, 512, dtype=torch.bfloat16, seed=1).cuda()
    hidden = grid(32, 512, dtype=torch.bfloat16).cuda()
    lm_head_top_k(hidden, weight, 3, 19_999)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = lm_head_top_k(hidden, weight, 3, 19_999)
    hidden.copy_(grid(32, 512, dtype=torch.bfloat16, seed=2))
    graph.replay()
    logits = (hidden.float() @ weight.float().T).bfloat16().float()  # exact, then rounded once
    expected = reference(torch.eye(32, device="cuda"), logits.T, 3, 19_999)
    assert_equal(result, expected, tolerance=1e-5)
