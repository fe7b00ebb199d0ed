"""A model whose logits are prescribed, and the shortest way to run the engine on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from dmax.checkpoint import Checkpoint, new_checkpoint
from dmax.engine.engine import Engine
from dmax.engine.graphs import Replay
from dmax.engine.request import Request
from dmax.outputs import GenerationOutput, StreamEvent
from dmax.params import DecodingParams, EngineOptions
from dmax.special_ids import SpecialIds

V = 12
L = 8
MASK = 11
EOS = 10
COUNT = [1, 2, 3, 4, 5, 6, 7, 8]


class ScriptedModel(nn.Module):
    """Logits of a position from a table [positions, V]; with `react` also of what is fed there.

    Attributes:
        num_calls: forwards so far.
    """

    def __init__(self, table: Tensor, react: float = 0.0) -> None:
        super().__init__()
        self.table = table
        self.react = react
        self.num_calls = 0
        self.embedding = nn.Embedding(V, 4)
        self.head = nn.Identity()
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

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> SimpleNamespace:
        self.num_calls += 1
        if position_ids is None:  # of rows that are in place
            position_ids = past_key_values.bases[:, None] + torch.arange(L)
        logits = self.table[position_ids]
        if self.react:
            fed = inputs_embeds.sum(-1, keepdim=True)
            logits = logits + self.react * (fed * torch.arange(V)).sin()
        return SimpleNamespace(logits=self.head(logits), hidden_states=(inputs_embeds,))


def scripted(
    table: Tensor,
    react: float = 0.0,
    *,
    clock: Callable[[], float] = time.monotonic,
    **options: Any,
) -> Engine:
    torch.manual_seed(0)
    model = ScriptedModel(table, react).eval()
    return Engine(model, SpecialIds(MASK, (EOS,), EOS, L), EngineOptions(**options), clock=clock)


def recorder(captured: list[Replay]) -> Callable[[Replay], Replay]:
    """In place of `CudaCapture`: what only repeats the step.

    Batches are filled up, spans rounded and inputs fixed as on a GPU.
    """

    def record(run: Replay) -> Replay:
        run()  # as the warm-up does
        captured.append(run)
        return run

    return record


def engine_of(checkpoint: Checkpoint, **options: Any) -> Engine:
    return Engine(checkpoint.model, checkpoint.special_ids, EngineOptions(**options))


def confident(tokens: list[int], probability: float = 0.99) -> Tensor:
    """A table whose argmax at position i is `tokens[i]` with the given probability."""
    rest = (1 - probability) / (V - 1)
    table = torch.full((len(tokens), V), rest).log()
    table[torch.arange(len(tokens)), torch.tensor(tokens)] = torch.tensor(probability).log()
    return table


def request(prompt: tuple[int, ...], index: int = 0, **params: Any) -> Request:
    """A request of two blocks, decoded by SPD, unless it says otherwise."""
    chosen = {"strategy": "spd", "max_new_tokens": 2 * L} | params
    return Request(index, prompt, DecodingParams(**chosen))


def result(event: StreamEvent) -> GenerationOutput:
    """The output of a "finished" event; raises the error of a request that failed."""
    if event.error is not None:
        raise event.error
    assert event.output is not None
    return event.output


def results(events: Iterable[StreamEvent]) -> dict[int, GenerationOutput]:
    """Outputs by request; raises the error of one that failed."""
    return {event.index: result(event) for event in events if event.kind == "finished"}


def run(engine: Engine, *requests: Request) -> dict[int, GenerationOutput]:
    """Outputs by request; raises the error of one that failed."""
    return results(engine.run(requests))


def drain(engine: Engine) -> dict[int, GenerationOutput]:
    """The same for requests that were added: steps until nothing is left."""
    events = list[StreamEvent]()
    while engine.is_busy():
        events += engine.step()
    return results(events)


def random_prompts(*lengths: int, shared: int = 0) -> list[tuple[int, ...]]:
    """Prompts for the published models, which begin with the same `shared` tokens."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(300, (shared,), generator=generator).tolist()
    ends = [torch.randint(300, (length,), generator=generator).tolist() for length in lengths]
    return [tuple(start + end) for end in ends]


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
