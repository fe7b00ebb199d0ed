"""Keys and values of prompt blocks that were encoded before: the same system prompt is encoded once.

Under block-causal attention a block's keys and values depend on the tokens up to its end alone, so
they can be shared by all prompts that begin alike. Blocks form a tree: each is known by the block
before it and its own tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmax.cache import BlockCache

ROOT = 0


@dataclass(slots=True)
class Node:
    """An encoded block: its number, how many others build on it, and keys and values [layers, L, G, d]."""

    number: int
    num_children: int
    keys: Tensor
    values: Tensor

    @property
    def num_bytes(self) -> int:
        """Memory it holds."""
        return 2 * self.keys.numel() * self.keys.element_size()


class PrefixCache:
    """Blocks by content, at most `max_bytes` of them; what was used least recently goes first, leaves before stems.

    Whether a prefix comes from here or is encoded anew changes keys and values by rounding at most,
    as the shapes of the two computations differ.
    """

    def __init__(self, block_length: int, max_bytes: int) -> None:
        self.block_length = block_length
        self.max_bytes = max_bytes
        self.num_bytes = self.hits = self.misses = 0
        self._nodes: OrderedDict[tuple[int, tuple[int, ...]], Node] = (
            OrderedDict()
        )  # by parent's number and tokens
        self._next = ROOT + 1

    def restore(self, cache: BlockCache, slot: int, prompt_ids: Sequence[int]) -> int:
        """Copy the known leading blocks of a prompt into an empty slot and commit them; how many tokens that are."""
        known = list(self._walk(prompt_ids))
        num_blocks = len(prompt_ids) // self.block_length
        self.hits = self.hits + len(known)
        self.misses = self.misses + num_blocks - len(known)
        if known:
            cache.write(
                slot, torch.cat([n.keys for n in known], 1), torch.cat([n.values for n in known], 1)
            )
        return len(known) * self.block_length

    def store(self, cache: BlockCache, slot: int, token_ids: Sequence[int]) -> None:
        """Keep the committed blocks of a slot that holds `token_ids`, as far as they are new and fit."""
        known = list(self._walk(token_ids))
        parent = known[-1].number if known else ROOT
        above = known[-1] if known else None
        for start in range(len(known) * self.block_length, cache.lengths[slot], self.block_length):
            end = start + self.block_length
            keys, values = cache.read(slot, start, end)
            key = (parent, tuple(token_ids[start:end]))
            node = Node(self._next, 0, keys, values)
            if not self._make_room(node.num_bytes, above):
                return
            if above is not None:
                above.num_children += 1
            self._nodes[key] = node
            self.num_bytes += node.num_bytes
            self._next = self._next + 1
            parent = node.number
            above = node

    def _walk(self, token_ids: Sequence[int]) -> Iterator[Node]:
        """The known blocks that the tokens begin with; using them makes them recent."""
        parent = ROOT
        for start in range(
            0, len(token_ids) // self.block_length * self.block_length, self.block_length
        ):
            key = (parent, tuple(token_ids[start : start + self.block_length]))
            node = self._nodes.get(key)
            if node is None:
                return
            self._nodes.move_to_end(key)
            yield node
            parent = node.number

    def _make_room(self, num_bytes: int, keep: Node | None) -> bool:
        """Drop leaves, the least recently used first, until `num_bytes` more fit; False if they never will."""
        if self.num_bytes + num_bytes <= self.max_bytes:
            return True
        by_number = {node.number: node for node in self._nodes.values()}
        for key, node in list(self._nodes.items()):
            if node.num_children or node is keep:
                continue
            del self._nodes[key]
            self.num_bytes -= node.num_bytes
            if key[0] != ROOT:
                by_number[key[0]].num_children -= 1
            if self.num_bytes + num_bytes <= self.max_bytes:
                return True
        return False
