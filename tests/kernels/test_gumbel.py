"""Noise of counters: known bits, its distribution, and samples that depend on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dmax.confidence import Candidates, GumbelNoise, candidates, gumbel, philox
from dmax.kernels import using
from dmax.kernels.lm_head import lm_head_top_k, lm_head_top_k_torch

V = 11
MASK = 4
L = 8
SHORT = 3  # a block length that divides no tile
LARGEST_CHI_SQUARE = 33.7  # of 9 degrees of freedom: one seed in ten thousand has more

Head = Callable[[Tensor, int, GumbelNoise], Candidates]


def noise_of(
    num_blocks: int, temperature: float = 1.0, seed: int = 0, start: int = 0, step: int = 0
) -> GumbelNoise:
    """The noise of blocks that stand side by side in a sequence."""
    index = torch.arange(num_blocks)
    return GumbelNoise(
        seeds=torch.full_like(index, seed),
        temperatures=torch.full((num_blocks,), temperature),
        starts=start + L * index,
        steps=torch.full_like(index, step),
        block_length=L,
    )


def from_logits(logits: Tensor, k: int, noise: GumbelNoise) -> Candidates:
    return candidates(logits, k, MASK, noise)


def from_hidden_states(logits: Tensor, k: int, noise: GumbelNoise) -> Candidates:
    return lm_head_top_k(logits, torch.eye(logits.shape[-1], device=logits.device), k, MASK, noise)


@pytest.fixture(params=["logits", "hidden states", "triton, logits", "triton, hidden states"])
def head(request: pytest.FixtureRequest) -> Head:
    """Every way to a drawn token, on the device that it takes."""
    device = torch.device("cpu")
    if "triton" in request.param:
        device = request.getfixturevalue("kernels")
    draw = from_logits if request.param.endswith("logits") else from_hidden_states

    def run(logits: Tensor, k: int, noise: GumbelNoise) -> Candidates:
        names = ("seeds", "temperatures", "starts", "steps")
        there = replace(noise, **{name: getattr(noise, name).to(device) for name in names})
        return Candidates(*(each.cpu() for each in draw(logits.to(device), k, there)))

    return run


# --- the bits and their distribution --------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "counter", "words"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0_A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_words_are_the_published_ones(
    seed: int, counter: tuple[int, ...], words: tuple[int, ...]
) -> None:
    """The known answers that come with Random123 for philox4x32 with ten rounds."""
    found = philox(torch.tensor(seed), *map(torch.tensor, counter))
    assert tuple(found.tolist()) == words


def test_noise_is_gumbel_noise_and_finite() -> None:
    words = torch.cat(
        (torch.arange(2**16), torch.arange(0, 2**32, 4099), torch.tensor(2**32 - 1)[None])
    )
    u = (words.double() + 0.5) / 2**32
    exact = -(-(-u).log1p()).log()
    assert gumbel(words).isfinite().all()
    assert gumbel(words).dtype == torch.float32
    # Beyond the bound 1 - u has a few bits left; such noise never decides.
    inside = u < 1 - 2**-10
    torch.testing.assert_close(gumbel(words)[inside].double(), exact[inside], atol=1e-4, rtol=1e-6)
    # Words that could decide have noise of their own.
    assert (gumbel(torch.arange(2**16)).diff() < 0).all()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_tokens_are_samples_of_the_softmax(temperature: float, seed: int) -> None:
    """Pearson's chi-square over positions, for one step and the next."""
    logits = torch.randn(V, generator=torch.Generator().manual_seed(seed % 97))
    p = (logits / temperature).index_fill(0, torch.tensor(MASK), -torch.inf).softmax(0)
    num_blocks = 1024
    for step in (0, 1):
        noise = noise_of(num_blocks, temperature, seed, step=step)
        drawn = from_logits(logits.expand(num_blocks * L, -1), 1, noise).tokens
        seen = drawn.bincount(minlength=V)
        expected = p * num_blocks * L
        assert seen[MASK] == 0
        others = torch.arange(V) != MASK
        chi_square = ((seen - expected)[others] ** 2 / expected[others].clamp(min=0.5)).sum()
        assert chi_square < LARGEST_CHI_SQUARE


def test_every_number_of_the_counter_matters() -> None:
    logits = torch.zeros(4 * L, V)
    base = noise_of(4)
    drawn = from_logits(logits, 1, base).tokens
    assert len({tuple(block) for block in drawn.view(4, L).tolist()}) == 4  # positions
    for changed in (noise_of(4, seed=1), noise_of(4, seed=2**32), noise_of(4, step=1)):
        other = from_logits(logits, 1, changed).tokens
        # Independent draws among ten tokens agree at about 3 of 32 positions.
        assert (other == drawn).sum() < 12
    moved = from_logits(logits, 1, noise_of(4, start=L)).tokens
    assert torch.equal(moved[:-L], drawn[L:])


# --- what a drawn candidate is --------------------------------------------------------------------


def test_the_confidence_of_a_drawn_token_is_its_probability(head: Head) -> None:
    logits = torch.randn(2 * L, V, generator=torch.Generator().manual_seed(0))
    found = head(logits, 4, noise_of(2, temperature=3.0))
    greedy = candidates(logits, V - 1, MASK)
    assert not torch.equal(found.tokens, greedy.tokens)
    torch.testing.assert_close(found.probs, logits.softmax(-1).gather(-1, found.ids))
    for drawn, best in zip(found.ids.tolist(), greedy.ids.tolist(), strict=True):
        best.remove(drawn[0])
        assert drawn[1:] == best[:3]


def test_rows_without_a_temperature_are_greedy(head: Head) -> None:
    logits = torch.randn(2 * L, V, generator=torch.Generator().manual_seed(0))
    temperatures = torch.tensor([0.0, 2.0])
    found = head(logits, 3, replace(noise_of(2), temperatures=temperatures))
    greedy = candidates(logits, 3, MASK)
    is_greedy = (temperatures == 0).repeat_interleave(L)
    assert torch.equal(found.ids[is_greedy], greedy.ids[is_greedy])
    torch.testing.assert_close(found.probs[is_greedy], greedy.probs[is_greedy])
    assert not torch.equal(found.ids[~is_greedy], greedy.ids[~is_greedy])


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_chunks_draw_what_the_whole_does(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    logits = torch.randn(5 * L, V)
    noise = noise_of(5, temperature=2.0)
    whole = from_logits(logits, 2, noise)
    monkeypatch.setattr("dmax.confidence.CACHED", rows * V)
    for chunked in (from_logits, from_hidden_states):
        assert torch.equal(chunked(logits, 2, noise).ids, whole.ids)
    monkeypatch.setattr("dmax.kernels.lm_head.CHUNK_BYTES", 4 * rows * V)
    assert torch.equal(from_hidden_states(logits, 2, noise).ids, whole.ids)


@pytest.mark.parametrize("k", [1, 3])
def test_every_path_draws_the_same_tokens(head: Head, k: int) -> None:
    """157 tokens fill no tile; blocks have seeds, temperatures, places and steps of their own."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(-8, 8, (7 * SHORT, 157), generator=generator) / 4
    noise = GumbelNoise(
        seeds=torch.randint(2**62, (7,), generator=generator),
        temperatures=torch.tensor([0.0, 1e-3, 0.5, 1.0, 0.0, 20.0, 1000.0]),
        starts=torch.randint(2**20, (7,), generator=generator),
        steps=torch.arange(7),
        block_length=SHORT,
    )
    with using("torch"):  # on a CPU's tensors, whatever device the kernels take
        expected = candidates(logits, k, MASK, noise)
    found = head(logits, k, noise)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.probs, expected.probs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to capture a graph on")
def test_a_cuda_graph_draws_with_what_its_tensors_hold_then() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randint(-8, 8, (4 * L, 512), generator=generator) / 4).bfloat16().cuda()
    weight = torch.eye(512, dtype=torch.bfloat16, device="cuda")
    noise = noise_of(4, temperature=0.0)
    names = ("seeds", "temperatures", "starts", "steps")
    noise = replace(noise, **{name: getattr(noise, name).cuda() for name in names})
    lm_head_top_k(logits, weight, 2, MASK, noise)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = lm_head_top_k(logits, weight, 2, MASK, noise)
    graph.replay()
    assert torch.equal(found.ids, candidates(logits, 2, MASK).ids)
    noise.temperatures.copy_(torch.tensor([0.0, 0.7, 1.5, 3.0]))
    for seed in range(3):
        noise.seeds.fill_(seed)
        noise.steps.add_(1)
        graph.replay()
        expected = lm_head_top_k_torch(logits, weight, 2, MASK, noise)
        assert torch.equal(found.ids, expected.ids)
