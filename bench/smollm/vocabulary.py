"""Cut the vocabulary of a pretrained model to what a task needs, and give numbers whole tokens.

A step on a CPU should be spent on the network, not on rows that no text of the task reaches. What
is kept is kept exactly: the same texts become the same tokens, and their logits stay what they
were. Numbers are written digit by digit in the published vocabulary. Here each is one token, whose
row starts as a mix of the rows of its digits.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dmax.special_ids import MASK_TOKEN

SPACE = "Ġ"  # how a byte-level tokenizer writes the space before a word
FIRST_DIGIT = 0.6  # share of a number's first digit in its row; unequal, so that 12 is not 21


@dataclass(frozen=True, slots=True)
class Cut:
    """A vocabulary, and what its rows start from.

    Attributes:
        tokenizer: of the new vocabulary, whose mask token is its last.
        kept: [K] int64, ids in the old vocabulary of the first K tokens.
        digits: of every number after them, ids in the old vocabulary of its digits.
    """

    tokenizer: PreTrainedTokenizerFast
    kept: Tensor
    digits: tuple[tuple[int, ...], ...]


def cut_vocabulary(
    tokenizer: Any, texts: Iterable[str], numbers: Sequence[int], chat_template: str
) -> Cut:
    """The vocabulary that some texts need, with a token for each of the numbers.

    All bytes are kept, so that any text can be written. A merge is kept if its result is.

    Args:
        tokenizer: byte-level BPE, of transformers.
        texts: all that a task may say, whole chats with their special tokens.
        numbers: at least 0; each becomes one token together with the space before it.
        chat_template: of the new tokenizer.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    old_ids: dict[str, int] = model["vocab"]
    specials = [tokenizer.bos_token, tokenizer.eos_token]
    used = {token for text in texts for token in tokenizer.tokenize(text)}
    kept = sorted(
        _closed(used | _alphabet(content), model["merges"]) | set(specials), key=old_ids.__getitem__
    )
    whole = [f"{SPACE}{number}" for number in numbers]
    new = copy.deepcopy(content)
    new["model"]["vocab"] = {token: index for index, token in enumerate((*kept, *whole))}
    new["model"]["merges"] = [pair for pair in model["merges"] if "".join(pair) in set(kept)]
    new["model"]["ignore_merges"] = True  # a word of the vocabulary is one token, numbers too
    new["added_tokens"] = [
        {**entry, "id": kept.index(entry["content"])}
        for entry in content["added_tokens"]
        if entry["content"] in specials
    ]
    return Cut(
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(new)),
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            pad_token=tokenizer.eos_token,
            mask_token=MASK_TOKEN,
            chat_template=chat_template,
            clean_up_tokenization_spaces=False,
        ),
        torch.tensor([old_ids[token] for token in kept]),
        tuple(tuple(old_ids[digit] for digit in str(number)) for number in numbers),
    )


def cut_rows(table: Tensor, cut: Cut) -> Tensor:
    """Rows [V', D] of a new vocabulary from those of the old one [V, D].

    Kept tokens keep theirs, numbers mix those of their digits, and MASK is the mean of all.
    """
    old = table.float()
    numbers = [_mixed(old[list(digits)]) for digits in cut.digits]
    rows = torch.cat((old[cut.kept], torch.stack(numbers))) if numbers else old[cut.kept]
    return torch.cat((rows, rows.mean(dim=0, keepdim=True))).to(table.dtype)


def cut_model(model: PreTrainedModel, cut: Cut) -> PreTrainedModel:
    """Give a model the rows of a new vocabulary, in place; all other weights stay.

    Embedding and output layer may be tied or not.
    """
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    rows = [cut_rows(table.weight.detach(), cut) for table in tables]
    model.resize_token_embeddings(len(cut.tokenizer), mean_resizing=False)
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    with torch.no_grad():
        for table, new in zip(tables, rows, strict=True):
            table.weight.copy_(new)
    config: Any = model.config
    config.bos_token_id = cut.tokenizer.bos_token_id
    config.eos_token_id = config.pad_token_id = cut.tokenizer.eos_token_id
    return model


def _mixed(rows: Tensor) -> Tensor:
    """The row of a number from those of its digits [N, D], the first of which counts most."""
    if len(rows) == 1:
        return rows[0]
    shares = torch.full((len(rows), 1), (1 - FIRST_DIGIT) / (len(rows) - 1))
    shares[0] = FIRST_DIGIT
    return (shares * rows).sum(dim=0)


def _alphabet(content: dict[str, Any]) -> set[str]:
    """The single characters of a byte-level vocabulary: one for every byte."""
    return {token for token in content["model"]["vocab"] if len(token) == 1}


def _closed(tokens: Collection[str], merges: Sequence[Sequence[str]]) -> set[str]:
    """Tokens, and all that merges make them from.

    The merge that makes a token comes after those that make its parts, so one pass from the last
    merge to the first finds everything.
    """
    needed = set(tokens)
    for first, second in reversed(merges):
        if first + second in needed:
            needed |= {first, second}
    return needed
