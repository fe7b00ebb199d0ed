"""A model whose logits are prescribed, and the shortest way to run the engine on it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from dmax.checkpoint import Checkpoint, new_checkpoint
from dmax.engine.engine import Engine
from dmax.engine.request import Completion, Request
from dmax.params import DecodingParams

V, L, MASK, EOS = 12, 8, 11, 10


class ScriptedModel(nn.Module):
    """Logits that depend on nothing but a position, and on what is fed there if `react` is set."""

    def __init__(self, table: Tensor, react: float = 0.0) -> None:
        super().__init__()
        self.table, self.react = table, react  # [positions, V]
        self.embedding, self.head = nn.Embedding(V, 4), nn.Identity()
        self.config = SimpleNamespace(
            num_hidden_layers=1,
            num_attention_heads=1,
            hidden_size=4,
            vocab_size=V,
            max_position_embeddings=len(table),
        )

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def base_model(self, inputs_embeds: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=inputs_embeds)

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, **_: Any) -> SimpleNamespace:
        logits = self.table[position_ids]
        if self.react:
            logits = (
                logits + self.react * (inputs_embeds.sum(-1, keepdim=True) * torch.arange(V)).sin()
            )
        return SimpleNamespace(logits=self.head(logits), hidden_states=(inputs_embeds,))


def scripted(table: Tensor, react: float = 0.0, **options: Any) -> Engine:
    torch.manual_seed(0)
    model = ScriptedModel(table, react).eval()
    return Engine(model, mask_token_id=MASK, eos_token_ids=[EOS], block_length=L, **options)


def engine_of(checkpoint: Any, **options: Any) -> Engine:
    return Engine(
        checkpoint.model,
        mask_token_id=checkpoint.mask_token_id,
        eos_token_ids=checkpoint.eos_token_ids,
        block_length=checkpoint.block_length,
        **options,
    )


def confident(tokens: list[int], probability: float = 0.99) -> Tensor:
    """A table whose argmax at position i is `tokens[i]` with the given probability."""
    rest = (1 - probability) / (V - 1)
    table = torch.full((len(tokens), V), rest).log()
    table[torch.arange(len(tokens)), torch.tensor(tokens)] = torch.tensor(probability).log()
    return table


def request(prompt: tuple[int, ...], index: int = 0, **params: Any) -> Request:
    return Request(index, prompt, DecodingParams(**{"max_new_tokens": 2 * L, **params}))


def run(engine: Engine, *requests: Request) -> dict[int, Completion]:
    return {
        event.index: event.completion for event in engine.run(requests) if event.kind == "finished"
    }


def dense_decoder(vocab_size: int) -> Checkpoint:
    """A small Llama with random weights and blocks of 32."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        eos_token_id=0,
        mask_token_id=vocab_size - 1,
        block_length=32,
    )
    torch.manual_seed(0)
    return new_checkpoint(config)
