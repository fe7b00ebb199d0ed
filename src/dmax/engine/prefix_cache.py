"""Keys and values of prompt blocks that were encoded before: a system prompt is encoded once.

Under block-causal attention a block's keys and values depend only on the tokens up to its end. So
all prompts that begin alike can share them.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import sha256
from itertools import takewhile

import torch
from torch import Tensor

from dmax.cache import BlockCache


class PrefixCache:
    """Encoded blocks, at most `max_bytes` of them; those used least recently go first.

    A block is known by a digest of all tokens up to its end. It counts as used after the blocks
    that follow it, so those always go before it. Whether a prefix comes from here or is encoded
    anew changes keys and values by rounding only, as the shapes of the two computations differ.
    """

    def __init__(self, block_length: int, max_bytes: int) -> None:
        self.block_length = block_length
        self.max_bytes = max_bytes
        # What the cache keeps of every block (`BlockCache.read`), the oldest first.
        self._blocks: OrderedDict[bytes, tuple[Tensor, ...]] = OrderedDict()

    def restore(self, cache: BlockCache, slot: int, prompt_ids: tuple[int, ...]) -> None:
        """Commit the known blocks of a prompt to an empty slot."""
        known = self._use(self._digests(prompt_ids))
        if known:
            kept = [torch.cat(parts, dim=1) for parts in zip(*known, strict=True)]
            cache.write(slot, *kept)

    def store(self, cache: BlockCache, slot: int, token_ids: tuple[int, ...]) -> None:
        """Keep the committed blocks of a slot that holds `token_ids`, as far as they fit."""
        digests = self._digests(token_ids[: cache.lengths[slot]])
        for index in range(len(self._use(digests)), len(digests)):
            start = index * self.block_length
            kept = cache.read(slot, start, start + self.block_length)
            most = self.max_bytes // sum(part.nbytes for part in kept)
            if index >= most:
                break
            if len(self._blocks) == most:
                self._blocks.popitem(last=False)
            self._blocks[digests[index]] = kept
        self._use(digests)

    def _digests(self, token_ids: tuple[int, ...]) -> list[bytes]:
        """For every whole block a digest of all tokens up to its end."""
        digests = []
        prefix = sha256()
        for end in range(self.block_length, len(token_ids) + 1, self.block_length):
            prefix.update(repr(token_ids[end - self.block_length : end]).encode())
            digests.append(prefix.digest())
        return digests

    def _use(self, digests: list[bytes]) -> list[tuple[Tensor, ...]]:
        """The known blocks from the first one on, which are now the ones used last."""
        known = list(takewhile(self._blocks.__contains__, digests))
        for digest in reversed(known):
            self._blocks.move_to_end(digest)
        return [self._blocks[digest] for digest in known]
