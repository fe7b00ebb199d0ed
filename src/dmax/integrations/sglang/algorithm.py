"""The diffusion algorithm `DMax` of SGLang: the strategies and the step of dmax's own engine.

SGLang runs one block of each request in a round, and calls `prepare_inputs` before the forward and
`step` after it. Between them stand the two halves of the heart's step, for all requests at once.
What SGLang carries from round to round for a request is a `Block`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar
from weakref import ReferenceType, WeakValueDictionary, ref

import torch
from sglang.srt.dllm.algorithm.base import DllmAlgorithm
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from torch import Tensor

from dmax.errors import InputError, one_line
from dmax.integrations.sglang import graphs
from dmax.integrations.sglang.checkpoint import ARCHITECTURE
from dmax.integrations.sglang.requests import Asked, read_request, report
from dmax.integrations.slots import Slots
from dmax.outputs import Cost
from dmax.params import MOST


@dataclass(slots=True)
class Block:
    """A block on its way through the rounds of SGLang.

    Attributes:
        num_known: positions that were known when it was opened; None: it is not opened yet.
        is_final: its tokens will not change; the next forward over it writes its keys and values.
        is_reported: that forward has been, and its request knows what it has cost.
    """

    num_known: int | None = None
    is_final: bool = False
    is_reported: bool = False


class DMax(DllmAlgorithm):
    """Decodes blocks with the strategies of dmax; one open block a request.

    Args:
        config: SGLang's `DllmConfig`, with what `checkpoint.read_checkpoint` has added.
    """

    supported_architectures = (ARCHITECTURE,)
    capture_input_preparation = True

    requests: ClassVar[WeakValueDictionary[str, Any]] = WeakValueDictionary()
    """The requests of this process by their ids, for as long as SGLang knows them."""
    server: ClassVar[Any] = None
    """The `DllmConfig` of this process."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        DMax.server = config
        self.special_ids = config.special_ids
        self.eos_id = config.special_ids.eos_token_ids[0]
        # Requests that were ended in the last round may still have their places.
        self.num_slots = 2 * config.max_running_requests
        self._holders: dict[int, ReferenceType[Any]] = {}
        self._made: Slots | None = None

    # --- what SGLang asks at the start, and for each request ---

    @classmethod
    def configure_server_args(cls, server_args: Any) -> None:
        """Requests that name no temperature are greedy, as with `dmax.LLM`."""
        from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

        preferred = resolving_view(server_args).preferred_sampling_params or {}
        if isinstance(preferred, str):  # as callers of Python give it
            preferred = json.loads(preferred)
        greedy = {"temperature": 0.0, **preferred}
        declare_resolution(server_args, cls.__name__, preferred_sampling_params=greedy)

    @classmethod
    def validate_request(cls, request: Any) -> str | None:
        """What a request asks for that cannot be, as the text of its error; None: all can be."""
        config = cls.server
        try:
            request.dmax = read_request(request, config.decoding, config.special_ids)
        except InputError as error:
            return one_line(error)
        cls.requests[request.rid] = request
        return None

    @staticmethod
    def prepare_graph_inputs(model: Any, input_ids: Tensor, state: Tensor) -> Tensor:
        """What a forward under a CUDA graph reads; see `graphs`. Not yet run on a GPU."""
        return graphs.static_inputs(model.get_input_embeddings()(input_ids), state)

    def max_steps(self, block_size: int) -> int:
        """No limit of SGLang's; the strategy of each block has its own."""
        return MOST

    # --- a round ---

    def init_step_state(self, forward_batch: Any) -> list[Block]:
        """New blocks; SGLang drops those of requests whose block is in progress."""
        return [Block() for _ in range(forward_batch.batch_size)]

    @torch.inference_mode()
    def prepare_inputs(self, model_runner: Any, forward_batch: Any, states: list[Block]) -> None:
        """Open new blocks, and have the forward read what the open ones feed back."""
        device = forward_batch.input_ids.device
        if self._made is None:
            embed = model_runner.model.get_input_embeddings()
            self._made = Slots(self.special_ids, self.num_slots, embed, device)
        requests = self._asking(forward_batch)
        self._open(forward_batch, states, requests)

        size = model_runner.model_config.hidden_size
        embeds = [torch.empty(0, size, dtype=model_runner.dtype, device=device)]
        places = [torch.empty(0, dtype=torch.long)]
        offsets = torch.arange(self.block_size)
        for members, slots in self._groups(states, requests):
            rows = torch.tensor(slots, device=device)
            read = self._slots.blocks(slots[0]).inputs(rows)  # [B, L, D]
            embeds.append(read.flatten(0, 1))
            first = torch.tensor(members)[:, None] * self.block_size  # [B, 1]
            places.append((first + offsets).flatten())
        graphs.give(model_runner, forward_batch, torch.cat(embeds), torch.cat(places).to(device))

    @torch.inference_mode()
    def step(self, forward_batch: Any, full_logits: Tensor, states: list[Block]) -> list[bool]:
        """Decide about the open blocks, and say which blocks are finished.

        Args:
            forward_batch: SGLang's `ForwardBatch`; its `input_ids` [B * L] become the new tokens.
            full_logits: [B * L, V].
            states: B blocks.
        """
        requests = self._asking(forward_batch)
        for block, request in zip(states, requests, strict=True):
            self._count(block, request)
        finished = [block.is_final for block in states]  # the forward has read its final tokens

        tokens = forward_batch.input_ids.view(len(states), self.block_size)
        logits = full_logits.view(*tokens.shape, -1)
        starts = forward_batch.positions.view(tokens.shape)[:, 0].long()
        decided = []
        flags = []
        for members, slots in self._groups(states, requests):
            rows = torch.tensor(slots, device=tokens.device)
            flags.append(self._slots.decide(slots, rows, logits[members], starts[members]))
            tokens[members] = self._slots.blocks(slots[0]).tokens[rows].to(tokens.dtype)
            decided += members
        if not decided:
            return finished
        found = torch.cat(flags, dim=1).T.tolist()  # the only wait for the device
        for index, own in zip(decided, found, strict=True):
            block = states[index]
            block.is_final, _, _, is_invalid, is_broken, _ = own
            if is_broken or is_invalid:
                finished[index] = block.is_final = block.is_reported = True
                _end(requests[index], is_broken)
                # What is still masked must not reach the text of the response.
                tokens[index].masked_fill_(tokens[index] == self.mask_id, self.eos_id)
        return finished

    # --- its parts ---

    @property
    def _slots(self) -> Slots:
        """The open blocks of all requests; there are none before the first forward."""
        assert self._made is not None, "inputs are prepared before a step"
        return self._made

    def _asking(self, forward_batch: Any) -> list[Any]:
        """The requests of a forward, in its order."""
        return [self.requests[request_id] for request_id in forward_batch.rids]

    def _groups(
        self, states: Sequence[Block], requests: Sequence[Any]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """The open blocks that are decoded by one strategy: their indices, and their slots."""
        members = [index for index, block in enumerate(states) if not block.is_final]
        slots = [requests[index].dmax.slot for index in members]
        for _, indices in self._slots.groups(slots):
            yield [members[at] for at in indices], [slots[at] for at in indices]

    def _open(self, forward_batch: Any, states: Sequence[Block], requests: Sequence[Any]) -> None:
        """Open the blocks that come for the first time, with what is known of them."""
        new = [index for index, block in enumerate(states) if block.num_known is None]
        if not new:
            return
        tokens = forward_batch.input_ids.view(len(states), self.block_size).tolist()
        num_known = self._block_start_list(forward_batch)
        for index in new:
            block = states[index]
            block.num_known = num_known[index]
            block.is_final = block.num_known == self.block_size
            if not block.is_final:
                slot = self._slot_of(requests[index])
                self._slots.open(slot, tokens[index][: block.num_known])

    def _slot_of(self, request: Any) -> int:
        """The slot of a request; its first block takes one that nobody has any more."""
        asked: Asked = request.dmax
        if asked.slot is None:
            free = (slot for slot in range(self.num_slots) if self._is_free(slot))
            asked.slot = next(free)
            self._holders[asked.slot] = ref(request)
            self._slots.admit(asked.slot, asked.strategy, asked.params)
        return asked.slot

    def _is_free(self, slot: int) -> bool:
        """Whether the request of a slot is finished, or SGLang has dropped it."""
        request = self._holders[slot]() if slot in self._holders else None
        return request is None or request.finished()

    def _count(self, block: Block, request: Any) -> None:
        """Count a forward over a block; its request learns the cost when the block is finished."""
        asked: Asked = request.dmax
        if block.is_reported:  # another block of its batch is not, and SGLang waits for that one
            return
        is_prompt = block.num_known == self.block_size
        asked.cost += Cost(
            num_forwards=int(not block.is_final),
            num_prefill_forwards=int(is_prompt),
            num_commit_forwards=int(block.is_final and not is_prompt),
        )
        if block.is_final:
            block.is_reported = True
            report(request, asked.cost, self.block_size - block.num_known)


def _end(request: Any, is_broken: bool) -> None:
    """End a request with an error, and nothing else."""
    message = f"strategy `{request.dmax.strategy.name}` proposed the mask token"
    if is_broken:
        message = (
            "the model gave NaN logits; check the checkpoint, or serve it with --dtype float32"
        )
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    request.to_finish = FINISH_ABORT(message, status, "InternalServerError")
