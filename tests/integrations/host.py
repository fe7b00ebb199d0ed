"""A host engine in a page: it plans, encodes and counts as vLLM does, without vLLM or a cache.

Every forward encodes whole sequences anew: what was computed for good with hard tokens, then the
tokens of the forward, under a mask that shows a block those before it. The models are in float64,
so the last bits decide nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from small import small_network
from torch import Tensor

from dmax.attention import block_causal, dense_mask
from dmax.decoding import get_strategy
from dmax.engine.engine import Engine
from dmax.engine.request import Request
from dmax.integrations.vllm.forwards import Forwards
from dmax.integrations.vllm.progress import Emitted, Progress
from dmax.outputs import GenerationOutput
from dmax.params import DecodingParams, EngineOptions
from dmax.special_ids import SpecialIds

MASK = 46
EOS = 47


def small_engine(num_slots: int) -> Engine:
    """Our engine over a small model in float64, with blocks of 8."""
    model = small_network("llada2_moe", "sdpa", vocab_size=48, eos=EOS, head_dim=8)
    ids = SpecialIds(MASK, (EOS,), EOS, block_length=8)
    return Engine(model.double().eval(), ids, EngineOptions(max_batch_size=num_slots))


def decode_alone(engine: Engine, prompt: tuple[int, ...], params: DecodingParams) -> Any:
    """The output of our engine for a request that has it for itself."""
    events = list(engine.run([Request(0, prompt, params)]))
    output = events[-1].output
    assert isinstance(output, GenerationOutput)
    return output


@dataclass
class Guest:
    """A request in the host.

    Attributes:
        tokens: prompt and emitted tokens.
        num_prompt: how many of them are the prompt.
        computed: the worker's count of tokens that stand in the cache for good.
        is_read: the prompt was read, and its block is open.
        forwards: what the scheduler counts.
    """

    tokens: list[int]
    num_prompt: int
    params: DecodingParams
    forwards: Forwards
    computed: int = 0
    is_read: bool = False
    is_over: bool = False

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt :]


class Host:
    """Runs requests through `Progress`.

    Args:
        engine: whose model and ids are used.
        num_slots: requests at once.
        is_async: every forward takes one block of a request, be it open or to be committed.
    """

    def __init__(self, engine: Engine, num_slots: int, *, is_async: bool = False) -> None:
        self.model = engine.model
        self.ids = engine.special_ids
        self.length = self.ids.block_length
        self.is_async = is_async
        embed = self.model.get_input_embeddings()
        self.progress = Progress(self.ids, num_slots, embed, torch.device("cpu"))
        self.guests: dict[int, Guest] = {}

    def add(
        self,
        slot: int,
        prompt: tuple[int, ...],
        params: DecodingParams,
        logprobs: int | None = None,
    ) -> Guest:
        guest = Guest(list(prompt), len(prompt), params, Forwards(self.length))
        self.guests[slot] = guest
        self.progress.add(slot, guest.tokens)
        self.progress.admit(slot, get_strategy(params), params, logprobs)
        return guest

    def preempt(self, slot: int) -> None:
        """Take the slot of a request and give it back: its prompt is read again."""
        guest = self.guests[slot]
        self.progress.remove(slot)
        guest.computed = 0
        guest.is_read = False
        self.progress.add(slot, guest.tokens)
        self.progress.admit(slot, get_strategy(guest.params), guest.params)

    def run(self) -> None:
        while any(not guest.is_over for guest in self.guests.values()):
            self.step()

    @torch.inference_mode()
    def step(self) -> None:
        """One forward over all requests, prompts and open blocks alike."""
        slots = [slot for slot, guest in self.guests.items() if not guest.is_over]
        widths = [self._width(self.guests[slot]) for slot in slots]
        lengths = [
            width or len(self.guests[slot].tokens) - self.guests[slot].computed
            for slot, width in zip(slots, widths, strict=True)
        ]
        batch = SimpleNamespace(
            num_reqs=len(slots),
            num_draft_tokens=sum(widths),
            idx_mapping_np=np.array(slots, dtype=np.intp),
            query_start_loc_np=np.cumsum([0, *lengths], dtype=np.int32),
            cu_num_logits_np=np.cumsum([0, *widths], dtype=np.int32),
        )
        embeds = torch.zeros(sum(lengths), self.model.config.hidden_size, dtype=torch.float64)
        for group in self.progress.decoding(batch):
            group.write_inputs(embeds)
        logits = self._logits(slots, widths, embeds.split(lengths))
        for slot, width in zip(slots, widths, strict=True):
            if not width:
                self._read(self.guests[slot], slot)
        for group in self.progress.decoding(batch):
            emitted = group.advance(logits)
            for index, slot in enumerate(group.slots):
                self._take(slot, emitted, index, int(group.widths[index]))

    def _width(self, guest: Guest) -> int:
        if not guest.is_read:
            return 0
        return self.length if self.is_async else guest.forwards.next_width

    def _read(self, guest: Guest, slot: int) -> None:
        tail = self.progress.open_first(slot)
        guest.computed = len(guest.tokens) - tail
        guest.is_read = True
        guest.forwards.count(0, has_emitted=False)

    def _take(self, slot: int, emitted: Emitted, index: int, width: int) -> None:
        guest = self.guests[slot]
        num_tokens = int(emitted.num_tokens[index])
        guest.computed += width - int(emitted.num_repeated[index])
        guest.forwards.count(width, has_emitted=num_tokens > 0)
        guest.tokens += emitted.tokens[index, :num_tokens].tolist()
        has_ended = bool(set(self.ids.eos_token_ids).intersection(guest.generated))
        is_long = len(guest.generated) >= guest.params.max_new_tokens
        guest.is_over = has_ended or is_long or bool(emitted.is_broken[index])

    def _logits(self, slots: list[int], widths: list[int], embeds: tuple[Tensor, ...]) -> Tensor:
        """Logits [tokens of decoding requests, V]."""
        parts = [torch.zeros(0, self.model.config.vocab_size, dtype=torch.float64)]
        for slot, width, inputs in zip(slots, widths, embeds, strict=True):
            if not width:
                continue
            guest = self.guests[slot]
            before = self.progress.embed(torch.tensor(guest.tokens[: guest.computed]).long())
            whole = torch.cat((before, inputs))[None]
            position = torch.arange(whole.shape[1])
            mask = dense_mask(block_causal(self.length), position, position)[None, None]
            output = self.model(
                inputs_embeds=whole, attention_mask=mask, position_ids=position[None]
            )
            parts.append(output.logits[0, -width:])
        return torch.cat(parts)
