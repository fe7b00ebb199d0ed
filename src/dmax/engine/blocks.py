"""The open blocks of all sequences that are decoded by the same strategy, as tensors.

S slots, W open blocks that a slot may have, B blocks of a step, L block length, V vocabulary.

What a step changes of a block lies side by side in one row of bytes. So one write opens any number
of blocks, and one copy shows the host what became of them.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmax.blend import Embed, SoftTokens, embed_tokens
from dmax.confidence import GumbelNoise
from dmax.decoding.block import Advance, Decision, State, View
from dmax.decoding.strategy import Strategy
from dmax.params import DecodingParams
from dmax.special_ids import SpecialIds


class OpenBlocks:
    """Open blocks, and what is known of each; slot s has the rows s W to s W + W - 1.

    Settings that are numbers have a value for every row, so that sequences which differ only in
    them share a forward.

    Attributes:
        record: [rows, bytes] uint8, whose columns are the tensors below.
        tokens: [rows, L] int64.
        masked, active, written: [rows, L] bool, as in `View` and `Advance`.
        confidence: [rows, L] float32, of the tokens proposed last.
        step, max_steps: [rows] int64, as in `View`.
        flags: [rows, 6] bool, what `dmax.engine.step.decide` found last.
        ignores_eos: [rows] bool.
        seeds, temperatures: [rows] int64 and float32, as in `GumbelNoise`.
        numbers: [rows, 1] float32 by name, the settings.
        state, feedback: what strategies remember and feed back; made when they first do.

    Args:
        strategy: what decodes them; its numbers are those of no sequence in particular.
        num_slots: S.
        special_ids: MASK, EOS and L.
        embed: the model's input embeddings.
        device: of all tensors.
    """

    def __init__(
        self,
        strategy: Strategy,
        num_slots: int,
        special_ids: SpecialIds,
        embed: Embed,
        device: torch.device,
    ) -> None:
        self.strategy = strategy
        self.mask_token_id = special_ids.mask_token_id
        self.block_length = special_ids.block_length
        self.embed = embed
        self.state: State = {}
        self.feedback: State = {}
        self._layout = _layout(self.block_length)
        # A block of which no token is known, as it opens.
        self._fresh = np.zeros(1, self._layout)
        self._fresh["tokens"] = self.mask_token_id
        self._fresh["masked"] = self._fresh["active"] = True
        self._unknown = _bytes(self._fresh).to(device)  # the same, where opening copies nothing
        num_rows = num_slots * strategy.blocks
        with device:
            self._eos_token_ids = torch.tensor(special_ids.eos_token_ids)
            self.max_steps = torch.zeros(num_rows, dtype=torch.long)
            self.ignores_eos = torch.zeros(num_rows, dtype=torch.bool)
            self.seeds = torch.zeros(num_rows, dtype=torch.long)
            self.temperatures = torch.zeros(num_rows)
            self.numbers = {name: torch.zeros(num_rows, 1) for name in strategy.numbers()}
            self._take(torch.zeros(num_rows, self._layout.itemsize, dtype=torch.uint8))

    def rows_of(self, slot: int) -> range:
        """The rows of a slot."""
        width = self.strategy.blocks
        return range(slot * width, (slot + 1) * width)

    def grow(self, num_slots: int) -> None:
        """Have rows for this many slots, no fewer than before; what is open stays as it is."""
        num_rows = num_slots * self.strategy.blocks
        self._take(_with_rows(self.record, num_rows))
        self.max_steps = _with_rows(self.max_steps, num_rows)
        self.ignores_eos = _with_rows(self.ignores_eos, num_rows)
        self.seeds = _with_rows(self.seeds, num_rows)
        self.temperatures = _with_rows(self.temperatures, num_rows)
        for kept in (self.numbers, self.state, self.feedback):
            kept.update({name: _with_rows(values, num_rows) for name, values in kept.items()})

    def _take(self, record: Tensor) -> None:
        """Have these rows, and a name for each of their fields."""
        fields = _columns(record, self._layout)
        self.record = record
        self.tokens = fields["tokens"]
        self.masked = fields["masked"]
        self.active = fields["active"]
        self.written = fields["written"]
        self.confidence = fields["confidence"]
        self.step = fields["step"][:, 0]
        self.flags = fields["flags"]

    def admit(self, slot: int, strategy: Strategy, params: DecodingParams) -> None:
        """Give the rows of a slot the settings of the request that has it now."""
        own = self.rows_of(slot)
        rows = slice(own.start, own.stop)
        for name, value in strategy.numbers().items():
            column = self.numbers[name]
            column[rows] = float(min(value, torch.finfo(column.dtype).max))
        steps = self.block_length * strategy.blocks + strategy.extra_steps
        most_steps = torch.iinfo(self.max_steps.dtype).max
        self.max_steps[rows] = min(params.max_steps_per_block or steps, most_steps)
        self.ignores_eos[rows] = params.ignore_eos
        self.seeds[rows] = secrets.randbits(63) if params.seed is None else params.seed
        self.temperatures[rows] = params.temperature

    def open(self, row: int | Tensor, known: Sequence[int] = ()) -> None:
        """Open one block, or blocks that begin alike in [B] rows; see `open_all`."""
        self.open_all(torch.as_tensor(row).view(-1), [known])

    def open_all(self, rows: Tensor, known: Sequence[Sequence[int]]) -> None:
        """Open blocks in rows [B] of any device, by one write and without a wait.

        They begin with `known` tokens, the end of the prompt; then they are masked.
        """
        rows = rows.to(self.record.device, non_blocking=True)
        self.record[rows] = self._opening(known) if any(known) else self._unknown
        if type(self.strategy).open is not Strategy.open:  # most have nothing to remember
            self._keep(self.state, rows, self.strategy.open(self.view(rows)))

    def _opening(self, known: Sequence[Sequence[int]]) -> Tensor:
        """[B, bytes] uint8, blocks as they open that begin with known tokens."""
        fresh = self._fresh.repeat(len(known))
        for record, tokens in zip(fresh, known, strict=True):
            decided = slice(len(tokens))
            record["tokens"][decided] = tokens
            record["masked"][decided] = record["active"][decided] = False
        return _bytes(fresh).to(self.record.device, non_blocking=True)

    # --- before a forward ---

    def inputs(self, rows: Tensor, num_branches: int = 1) -> Tensor:
        """Input embeddings of the next forward over the blocks in `rows` [B].

        Returns:
            [B * num_branches, L, D]: token embeddings, or what was decided last to be fed back.
        """
        if num_branches > 1:
            branches = self.strategy.branches(self.view(rows), self.state_of(rows))
            return self.embed(branches.flatten(0, 1))
        if "embeds" in self.feedback:
            is_first = (self.step[rows] == 0)[:, None, None]
            hard = self.embed(self.tokens[rows])
            return torch.where(is_first, hard, self.feedback["embeds"][rows])
        soft = None
        if self.feedback:
            renormalize = self.strategy.renormalize
            soft = SoftTokens(
                self.active, **self.feedback, renormalize=renormalize, masked=self.masked
            )
        return embed_tokens(self.embed, self.tokens, soft, self.mask_token_id, rows)

    # --- after a forward ---

    def view(
        self, rows: Tensor, before: Tensor | None = None, noise: GumbelNoise | None = None
    ) -> View:
        """What the strategy may read of the blocks in `rows` [B].

        Args:
            rows: [B] int64.
            before: [B] int64, rows of the open blocks before them, -1 where there is none.
            noise: what tokens are drawn with; None: all rows are greedy.
        """
        must_progress = None
        if before is not None and self.strategy.blocks > 1:
            is_sure = self._share_sure(before.clamp(min=0)) >= self.strategy_of(rows).forces_at
            must_progress = (before < 0) | is_sure[:, 0]
        return View(
            tokens=self.tokens[rows],
            masked=self.masked[rows],
            active=self.active[rows],
            step=self.step[rows],
            max_steps=self.max_steps[rows],
            mask_token_id=self.mask_token_id,
            embed=self.embed,
            noise=noise,
            must_progress=must_progress,
        )

    def noise(self, rows: Tensor, starts: Tensor) -> GumbelNoise | None:
        """The noise of the next step of rows [B]; None if it is known that all are greedy.

        Args:
            rows: [B] int64.
            starts: [B] int64, where the blocks begin in their sequences.
        """
        temperatures = self.temperatures[rows]
        if temperatures.device.type in ("cpu", "mps") and not temperatures.any():
            return None
        steps = self.step[rows]
        return GumbelNoise(self.seeds[rows], temperatures, starts, steps, self.block_length)

    def strategy_of(self, rows: Tensor) -> Strategy:
        """The strategy with the numbers [B, 1] of these rows."""
        return self.strategy.with_numbers(_of_rows(self.numbers, rows))

    def state_of(self, rows: Tensor) -> State:
        """What the strategy remembers of these rows."""
        return _of_rows(self.state, rows)

    def store(self, rows: Tensor, advance: Advance, decision: Decision, state: State) -> None:
        """Keep what a step made of the blocks in `rows` [B]."""
        self.tokens[rows] = advance.tokens
        self.masked[rows] = advance.masked
        self.written[rows] = advance.written
        self.step[rows] += 1
        if decision.confidence is not None:
            self.confidence[rows] = decision.confidence.float()
        self._keep(self.state, rows, state)
        if decision.embeds is not None:
            self._keep(self.feedback, rows, {"embeds": decision.embeds})
        if decision.soft is not None:
            ids, probs, _ = decision.soft
            self._keep(self.feedback, rows, {"ids": ids, "probs": probs})

    def _blends(self) -> list[Tensor]:
        """Ids and probabilities [rows, L, k] that are fed back, if they are of several tokens."""
        ids = self.feedback.get("ids")
        return [] if ids is None or ids.shape[-1] == 1 else [ids, self.feedback["probs"]]

    def shown(self) -> Tensor:
        """[rows, bytes] uint8, all that events tell of these blocks."""
        blends = [each.flatten(1).view(torch.uint8) for each in self._blends()]
        return torch.cat((self.record, *blends), dim=1) if blends else self.record

    def records(self, shown: NDArray[np.uint8]) -> NDArray[Any]:
        """What `shown` gave, on the host: [rows] of the fields, and `ids` and `probs` of blends."""
        blends = self._blends()
        if not blends:
            return shown.view(self._layout)
        more = [
            (name, str(blend.dtype).removeprefix("torch."), blend.shape[1:])
            for name, blend in zip(("ids", "probs"), blends, strict=True)
        ]
        return shown.view(np.dtype([*self._layout.descr, *more]))

    def may_open_next(self, rows: Tensor) -> Tensor:
        """[B] bool, enough of the block is sure and it holds no EOS: the next one may open."""
        if self.strategy.blocks == 1:
            return torch.zeros_like(rows, dtype=torch.bool)
        decoded = self.active[rows] & ~self.masked[rows]
        is_eos = torch.isin(self.tokens[rows], self._eos_token_ids) & decoded
        has_ended = is_eos.any(dim=1) & ~self.ignores_eos[rows]
        is_sure = self._share_sure(rows) >= self.strategy_of(rows).opens_at
        return is_sure[:, 0] & ~has_ended

    def _share_sure(self, rows: Tensor) -> Tensor:
        """Share [B, 1] of each block's active positions that are decoded and sure."""
        is_sure = self.confidence[rows] >= self.strategy_of(rows).sure_from
        sure = self.active[rows] & ~self.masked[rows] & is_sure
        num_active = self.active[rows].sum(dim=1, keepdim=True)
        share = sure.sum(dim=1, keepdim=True) / num_active.clamp(min=1)
        return torch.where(num_active > 0, share, 1.0)

    def _keep(self, kept: State, rows: Tensor, values: State) -> None:
        """Write values of these rows into tensors for all rows."""
        for name, value in values.items():
            if name not in kept:
                kept[name] = value.new_zeros((len(self.tokens), *value.shape[1:]))
            kept[name][rows] = value.to(kept[name].dtype)


def read(all_blocks: Collection[OpenBlocks]) -> Iterator[NDArray[Any]]:
    """The records of open blocks as they stand: the only wait for the device in a step."""
    shown = [blocks.shown().flatten() for blocks in all_blocks]
    parts = torch.cat(shown).cpu().split(list(map(len, shown)))
    for blocks, part in zip(all_blocks, parts, strict=True):
        yield blocks.records(part.numpy())


def _layout(block_length: int) -> np.dtype[Any]:
    """The fields of an open block, side by side."""
    positions = (block_length,)
    return np.dtype(
        [
            ("tokens", np.int64, positions),
            ("step", np.int64),
            ("confidence", np.float32, positions),
            ("masked", np.bool_, positions),
            ("active", np.bool_, positions),
            ("written", np.bool_, positions),
            ("flags", np.bool_, (6,)),
        ],
        align=True,
    )


def _bytes(records: NDArray[Any]) -> Tensor:
    """Records [N] as a tensor [N, bytes] uint8."""
    return torch.from_numpy(records.view(np.uint8)).view(len(records), -1)


def _columns(record: Tensor, layout: np.dtype[Any]) -> State:
    """The fields of rows [N, bytes] by name, [N, n] each."""
    found = {}
    for name, (field, start, *_) in (layout.fields or {}).items():
        dtype = torch.from_numpy(np.zeros(0, field.base)).dtype
        found[name] = record[:, start : start + field.itemsize].view(dtype)
    return found


def _with_rows(values: Tensor, num_rows: int) -> Tensor:
    """The same rows, and zeros after them up to `num_rows`."""
    num_new = num_rows - len(values)
    return torch.cat((values, values.new_zeros((num_new, *values.shape[1:]))))


def _of_rows(tensors: State, rows: Tensor) -> State:
    return {name: values[rows] for name, values in tensors.items()}
