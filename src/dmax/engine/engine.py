"""The only denoise loop: prefill, denoise the open blocks of all sequences together, commit, next block.

Strategies decide what to write; this file decides nothing about tokens. It keeps the promises: a sequence's blocks
converge on their own, whatever its neighbours do; the prompt is never written; a block ends after at most its step
cap; broken logits raise. S slots, B rows of a step, L block length, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dmax.blend import SoftTokens, embed_tokens
from dmax.decoding import get_strategy
from dmax.decoding.block import DecodingStrategy, State, View, apply, sanitize
from dmax.engine.request import BlockEvent, Completion, Counters, Event, FinishedEvent, Request
from dmax.engine.runner import ModelRunner
from dmax.errors import InputError
from dmax.params import DecodingParams

Commit = Literal["cross_block", "separate"]


@dataclass(slots=True)
class Flight:
    """A request in flight: where its open block stands and what it has generated."""

    request: Request
    lane: Lane
    start: int
    end: int
    generator: torch.Generator | None
    generated: list[int] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    has_previous: bool = False  # the block before the open one still needs its clean keys and values


class Lane:
    """The open blocks of all requests decoded with the same strategy and settings, as tensors with one row per slot."""

    def __init__(self, params: DecodingParams, num_slots: int, block_length: int, device: torch.device) -> None:
        self.params = params
        self.strategy: DecodingStrategy = get_strategy(params)
        extra = getattr(self.strategy, "extra_steps", 0)  # of strategies that go on after the last mask
        self.max_steps = params.max_steps_per_block or block_length + extra
        shape = (num_slots, block_length)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.previous = torch.zeros(shape, dtype=torch.long, device=device)
        self.masked = torch.zeros(shape, dtype=torch.bool, device=device)
        self.active = torch.zeros(shape, dtype=torch.bool, device=device)
        self.step = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.soft: SoftTokens | None = None
        self.embeds: Tensor | None = None
        self.confidence = torch.zeros(shape, device=device)
        self.state: State = {}

    def view(self, rows: Tensor, mask_token_id: int, embed: Any, gumbel: Tensor | None = None) -> View:
        """What the strategy may read of these rows."""
        return View(
            tokens=self.tokens[rows],
            masked=self.masked[rows],
            active=self.active[rows],
            step=self.step[rows],
            mask_token_id=mask_token_id,
            max_steps=self.max_steps,
            embed=embed,
            temperature=self.params.temperature,
            gumbel=gumbel,
        )

    def open(self, slot: int, known: Sequence[int], mask_token_id: int, embed: Any) -> None:
        """Open a block that begins with the `known` tokens (the prompt's tail) and is masked from there on."""
        self.tokens[slot] = mask_token_id
        self.tokens[slot, : len(known)] = torch.tensor(known, dtype=torch.long)
        self.masked[slot] = torch.arange(self.masked.shape[1], device=self.masked.device) >= len(known)
        self.active[slot] = self.masked[slot]
        self.step[slot] = 0
        if self.soft is not None:
            self.soft.where[slot] = False
        row = torch.tensor([slot], device=self.tokens.device)
        self._store_state(row, self.strategy.open(self.view(row, mask_token_id, embed)))

    def inputs(self, rows: Tensor, mask_token_id: int, embed: Any) -> Tensor:
        """Input embeddings [B, L, D] of the rows' next forward: hard tokens, or what the last decision asked for."""
        if self.embeds is not None:
            first = (self.step[rows] == 0)[:, None, None]
            return torch.where(first, embed(self.tokens[rows]), self.embeds[rows])
        return embed_tokens(embed, self.tokens[rows], _rows(self.soft, rows), mask_token_id)

    def advance(self, rows: Tensor, view: View, logits: Tensor) -> Tensor:
        """One step of the strategy; returns flags [4, B] bool: done, broken logits, invalid proposal, forced."""
        output, broken = sanitize(logits, view.mask_token_id)
        state = {name: value[rows] for name, value in self.state.items()}
        decision, state = self.strategy.step(view, output, state)
        result = apply(view, decision, self.max_steps)
        self.tokens[rows], self.masked[rows], self.step[rows] = result.tokens, result.masked, view.step + 1
        self._store_state(rows, state)
        self._store_feed(rows, decision.soft, decision.embeds)
        if decision.confidence is not None:
            self.confidence[rows] = decision.confidence.float()
        return torch.stack((result.done, broken, result.invalid, result.forced, result.capped))

    def _store_state(self, rows: Tensor, state: State) -> None:
        for name, value in state.items():
            if name not in self.state:
                self.state[name] = value.new_zeros((len(self.tokens), *value.shape[1:]))
            self.state[name][rows] = value

    def _store_feed(self, rows: Tensor, soft: SoftTokens | None, embeds: Tensor | None) -> None:
        if embeds is not None:
            if self.embeds is None:
                self.embeds = embeds.new_zeros((len(self.tokens), *embeds.shape[1:]))
            self.embeds[rows] = embeds
        if soft is None:
            if self.soft is not None:
                self.soft.where[rows] = False
            return
        if self.soft is None:
            shape = (len(self.tokens), *soft.ids.shape[1:])
            nowhere = torch.zeros_like(self.masked)
            self.soft = replace(soft, where=nowhere, ids=soft.ids.new_zeros(shape), probs=soft.probs.new_zeros(shape))
        self.soft.where[rows], self.soft.ids[rows], self.soft.probs[rows] = soft.where, soft.ids, soft.probs


def _rows(soft: SoftTokens | None, rows: Tensor) -> SoftTokens | None:
    return soft and replace(soft, where=soft.where[rows], ids=soft.ids[rows], probs=soft.probs[rows])


class Engine:
    """Decodes requests with a block-diffusion model, several at a time, each exactly as it would be alone.

    Args:
        model: a block-causal model in eval mode (see `ModelRunner`).
        mask_token_id, eos_token_ids, block_length: from the checkpoint.
        max_batch_size: sequences in flight; waiting requests join as others leave.
        commit: how a finished block's clean keys and values are written: `cross_block`, by the next block's first
            forward over 2L positions, or `separate`, by a forward of their own.
    """

    def __init__(
        self,
        model: Any,
        *,
        mask_token_id: int,
        eos_token_ids: Sequence[int],
        block_length: int,
        max_batch_size: int = 16,
        commit: Commit = "cross_block",
    ) -> None:
        self.model, self.mask_token_id, self.eos_token_ids = model, mask_token_id, frozenset(eos_token_ids)
        self.block_length, self.max_batch_size, self.commit = block_length, max_batch_size, commit

    def run(self, requests: Sequence[Request], *, provisional: bool = False) -> Iterator[Event]:
        """Decode the requests; events of different requests interleave.

        Args:
            requests: any lengths, any mixture of parameters (the block length is the engine's).
            provisional: also report every step of every open block, at the price of copying it from the device.

        Raises:
            InputError: a request that can never fit (before any compute), or logits that are NaN.
        """
        self.check(requests)
        if not requests:
            return
        num_slots = min(self.max_batch_size, len(requests))
        runner = ModelRunner(self.model, self.block_length, num_slots, max(map(self._end, requests)))
        waiting, free, running, lanes = (
            deque(requests),
            list(range(num_slots)),
            dict[int, Flight](),
            dict[Any, Lane](),
        )
        while waiting or running:
            if waiting and free:
                admitted = {free.pop(0): waiting.popleft() for _ in range(min(len(free), len(waiting)))}
                running |= self._admit(runner, lanes, num_slots, admitted)
            for slot, flags in self._step(runner, running).items():
                yield from self._settle(runner, running[slot], slot, flags, provisional)
                if running[slot].start >= running[slot].end:
                    del running[slot]
                    free.append(slot)

    def check(self, requests: Sequence[Request]) -> None:
        """Raises `InputError` for a request that can never fit."""
        for request in requests:
            self._check(request)

    def _check(self, request: Request) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        vocab_size = self.model.config.vocab_size
        if not request.prompt_ids:
            raise InputError(f"prompt {request.index} is empty", hint="give at least one token")
        if not all(0 <= token < vocab_size for token in request.prompt_ids):
            raise InputError(f"prompt {request.index} holds a token id outside the vocabulary of {vocab_size}")
        if limit is not None and self._end(request) > limit:
            raise InputError(
                f"prompt {request.index} has {len(request.prompt_ids)} tokens; with `max_new_tokens` "
                f"{request.params.max_new_tokens} it needs {self._end(request)} positions, the model has {limit}",
                hint="shorten the prompt or lower `max_new_tokens`",
            )

    def _end(self, request: Request) -> int:
        """First position past the last block: blocks are aligned to absolute multiples of the block length."""
        needed = len(request.prompt_ids) + request.params.max_new_tokens
        return -(-needed // self.block_length) * self.block_length

    def _admit(
        self, runner: ModelRunner, lanes: dict[DecodingParams, Lane], num_slots: int, admitted: dict[int, Request]
    ) -> dict[int, Flight]:
        """Prefill the whole blocks of the prompts in one forward and open each request's first block."""
        joined = {}
        for slot, request in admitted.items():
            key = replace(request.params, seed=None, max_new_tokens=1)
            if key not in lanes:
                lanes[key] = Lane(key, num_slots, self.block_length, runner.device)
            start = len(request.prompt_ids) // self.block_length * self.block_length
            joined[slot] = Flight(request, lanes[key], start, self._end(request), _generator(request.params))
            lanes[key].open(slot, request.prompt_ids[start:], self.mask_token_id, runner.embed)
            runner.cache.rollback(slot)
        slots = [slot for slot, sequence in joined.items() if sequence.start]
        if slots:
            lengths = [joined[slot].start for slot in slots]
            tokens = torch.zeros(len(slots), max(lengths), dtype=torch.long)
            for row, slot in enumerate(slots):
                tokens[row, : lengths[row]] = torch.tensor(joined[slot].request.prompt_ids[: lengths[row]])
                joined[slot].counters.num_prefill_forwards += 1
            runner.prefill(slots, tokens.to(runner.device), lengths)
        return joined

    @torch.no_grad()
    def _step(self, runner: ModelRunner, running: dict[int, Flight]) -> dict[int, list[bool]]:
        """One forward and one decision for every open block; the only wait for the device is for the flags."""
        groups: dict[tuple[int, bool], list[int]] = {}
        for slot in sorted(running):
            groups.setdefault((id(running[slot].lane), running[slot].has_previous), []).append(slot)
        flags, order = [], []
        for (_, has_previous), slots in groups.items():
            lane, rows = running[slots[0]].lane, torch.tensor(slots, device=runner.device)
            inputs = lane.inputs(rows, self.mask_token_id, runner.embed)
            previous = lane.previous[rows] if has_previous else None
            if previous is not None and self.commit == "separate":
                runner.commit(slots, previous)
                previous = None
            logits = runner.denoise(slots, inputs, previous)
            gumbel = _gumbel([running[slot] for slot in slots], logits)
            flags.append(lane.advance(rows, lane.view(rows, self.mask_token_id, runner.embed, gumbel), logits))
            order += slots
        for slot in order:
            sequence = running[slot]
            sequence.counters.num_forwards += 1
            sequence.counters.num_commit_forwards += sequence.has_previous and self.commit == "separate"
            sequence.has_previous = False
        return dict(zip(order, torch.cat(flags, dim=1).T.tolist(), strict=True))

    def _settle(
        self, runner: ModelRunner, sequence: Flight, slot: int, flags: list[bool], provisional: bool
    ) -> Iterator[Event]:
        """After a step: report the block, and if it is done, commit it and open the next or finish the request."""
        done, broken, invalid, forced, capped = flags
        lane, request, counters = sequence.lane, sequence.request, sequence.counters
        if broken:
            raise InputError(
                f"the model gave NaN logits for prompt {request.index}",
                hint="check the checkpoint, or load it with dtype float32",
            )
        if invalid:
            raise InputError(f"strategy `{request.params.strategy}` proposed the mask token for prompt {request.index}")
        counters.num_forced += forced
        counters.num_capped += capped
        if not done:
            if provisional:
                yield self._block_event(sequence, slot, "provisional")
            return
        event = self._block_event(sequence, slot, "committed")
        yield event
        sequence.generated += event.token_ids
        sequence.start += self.block_length
        if self.eos_token_ids.intersection(event.token_ids) or sequence.start >= sequence.end:
            sequence.start = sequence.end
            yield FinishedEvent(request.index, self._complete(sequence))
            return
        lane.previous[slot] = lane.tokens[slot]
        sequence.has_previous = True
        lane.open(slot, (), self.mask_token_id, runner.embed)

    def _block_event(self, sequence: Flight, slot: int, kind: Literal["provisional", "committed"]) -> BlockEvent:
        lane = sequence.lane
        first = max(len(sequence.request.prompt_ids) - sequence.start, 0)
        return BlockEvent(
            index=sequence.request.index,
            kind=kind,
            position=len(sequence.generated),
            token_ids=tuple(lane.tokens[slot, first:].tolist()),
            masked=tuple(lane.masked[slot, first:].tolist()),
            confidence=tuple(lane.confidence[slot, first:].tolist()),
            step=int(lane.step[slot]),
        )

    def _complete(self, sequence: Flight) -> Completion:
        """Cut at the first EOS, EOS left out (A14), then at `max_new_tokens`."""
        ids = sequence.generated
        stop = next((position for position, token in enumerate(ids) if token in self.eos_token_ids), len(ids))
        limit = sequence.request.params.max_new_tokens
        reason: Literal["stop", "length"] = "stop" if stop < len(ids) and stop <= limit else "length"
        return Completion(tuple(ids[: min(stop, limit)]), reason, sequence.counters)


def _generator(params: DecodingParams) -> torch.Generator | None:
    """A random source per request, so that a sampled completion does not depend on its neighbours."""
    if params.temperature == 0:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def _gumbel(sequences: Sequence[Flight], logits: Tensor) -> Tensor | None:
    """Standard Gumbel noise [B, L, V], each row from its request's own generator; None when greedy."""
    if sequences[0].generator is None:
        return None
    rows = [torch.empty(logits.shape[1:]).exponential_(generator=sequence.generator) for sequence in sequences]
    return -torch.stack(rows).log().to(logits.device)
