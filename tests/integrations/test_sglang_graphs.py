"""The inputs of a forward inside SGLang: a static function gives what the eager way gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from dmax.blend import SoftTokens, embed_tokens
from dmax.integrations.sglang import graphs

MASK = 11


def soft_block(embed: nn.Embedding, tokens: torch.Tensor) -> torch.Tensor:
    ids = torch.randint(0, MASK, (1, 8, 3))
    probs = torch.rand(1, 8, 3) / 3
    where = torch.tensor([[False, True] * 4])
    ids[..., 0] = tokens
    return embed_tokens(embed, tokens, SoftTokens(where, ids, probs), MASK).detach()


def a_runner(has_graph: bool) -> Any:
    graph = SimpleNamespace(
        dllm_input_preparation=object(),
        can_run_graph=lambda batch: has_graph and batch.replace_embeds is None,
    )
    return SimpleNamespace(decode_cuda_graph_runner=graph)


def a_batch(input_ids: torch.Tensor) -> Any:
    mode = SimpleNamespace(is_cuda_graph=lambda: True)
    return SimpleNamespace(input_ids=input_ids, forward_mode=mode, replace_embeds=object())


def test_static_inputs_equal_eager_ones_in_every_bit() -> None:
    torch.manual_seed(0)
    embed = nn.Embedding(12, 16).requires_grad_(False)
    tokens = torch.randint(0, 12, (3, 8))
    soft = soft_block(embed, tokens[1:2])[0]  # [8, 16], of the second of three blocks
    positions = torch.arange(8, 16)

    eager = a_batch(tokens.flatten())
    graphs.give(a_runner(has_graph=False), eager, soft, positions)
    read = embed(eager.input_ids)
    read[eager.replace_positions] = eager.replace_embeds  # as SGLang does

    static = a_batch(tokens.flatten())
    graphs.give(a_runner(has_graph=True), static, soft, positions)
    assert static.replace_embeds is None
    state = static.dllm_input_preparation_state
    assert torch.equal(graphs.static_inputs(embed(static.input_ids), state), read)


def test_a_round_without_open_blocks_reads_ids() -> None:
    embed = nn.Embedding(12, 16).requires_grad_(False)
    nothing = torch.empty(0, 16), torch.empty(0, dtype=torch.long)
    batch = a_batch(torch.arange(8))
    graphs.give(a_runner(has_graph=True), batch, *nothing)
    state = batch.dllm_input_preparation_state
    assert torch.equal(graphs.static_inputs(embed(batch.input_ids), state), embed(batch.input_ids))
    graphs.give(a_runner(has_graph=False), batch, *nothing)
    assert batch.replace_embeds is None


def test_a_runner_without_graphs_reads_eagerly() -> None:
    batch = a_batch(torch.arange(8))
    embeds = torch.ones(8, 16)
    graphs.give(SimpleNamespace(decode_cuda_graph_runner=None), batch, embeds, torch.arange(8))
    assert batch.replace_embeds is embeds


def test_a_graph_runner_uses_what_an_algorithm_prepares() -> None:
    class Runner:
        """As SGLang's: the function is there before the flag is set."""

        def __init__(self, preparation: object, says: bool) -> None:
            self.dllm_input_preparation = preparation
            self.dllm_uses_input_embeds = says

    graphs.open_runner(SimpleNamespace(DecodeCudaGraphRunner=Runner))
    assert Runner(None, False).dllm_uses_input_embeds is False
    assert Runner(None, True).dllm_uses_input_embeds is True
    assert Runner(object(), False).dllm_uses_input_embeds is True
