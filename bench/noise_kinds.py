"""The kinds of noise that `bench/noise.py` trains with, and what their wrong tokens are like.

Shapes: B sequences, L' positions in the noisy copy, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dmax.special_ids import SpecialIds
from dmax.training.clean_stream import CleanBatch, CleanStream, NoisyBatch, noisy_positions, take
from dmax.training.noise import mask_tokens, random_tokens
from dmax.training.objectives import OPUT, Loss, Objective, Uniform, uniform_loss
from dmax.training.rollout import draw, pick
from dmax.training.vocabulary import IGNORE

PLAUSIBLE = 0.01  # probability from which the base model finds a wrong token plausible
TOP = 10  # or its rank among all tokens
KIND_NAMES = ("number", "word", "mark", "special")


# --- kinds of tokens ------------------------------------------------------------------------------


def kind_of(text: str, is_special: bool = False) -> str:
    """Number, word or mark, with or without the space before it; special tokens are themselves."""
    if is_special:
        return f"special {text}"
    bare = text.strip()
    kind = "number" if bare.isdigit() else "word" if bare.isalpha() else "mark"
    return f"{kind}, spaced" if text.startswith(" ") else kind


def token_kinds(tokenizer: Any, vocab_size: int) -> tuple[list[str], Tensor]:
    """The names of all kinds, and the kind of every token as an index of them, [V] int64."""
    special = set(tokenizer.all_special_ids)
    found = [kind_of(tokenizer.decode([id]), id in special) for id in range(len(tokenizer))]
    found += ["special unused"] * (vocab_size - len(found))
    names = sorted(set(found))
    return names, torch.tensor([names.index(kind) for kind in found])


def same_kind_tokens(ids: Tensor, kinds: Tensor, generator: torch.Generator) -> Tensor:
    """A random token of its own kind for every token: a number for a number, a word for a word.

    Args:
        ids: [B, L'] int64.
        kinds: [V] int64, as `token_kinds` gives them. MASK is alone in its kind, and so is EOS.
        generator: on the device of `ids`.

    Returns:
        [B, L'] int64.
    """
    kinds = kinds.to(ids.device)
    by_kind = kinds.argsort(stable=True)  # [V], the tokens of kind 0, of kind 1, …
    counts = kinds.bincount()
    first = counts.cumsum(dim=0) - counts
    kind = kinds[ids]
    uniform = draw(ids.shape, generator, ids.device)
    return by_kind[first[kind] + (uniform * counts[kind]).long()]


# --- objectives -----------------------------------------------------------------------------------


@torch.no_grad()
def own_logits(model: Any, batch: NoisyBatch, block_length: int) -> Tensor:
    """What a model predicts in place of the masks, [B, L', V]."""
    stream = CleanStream(model, batch.clean_ids, block_length, batch.positions)
    return stream.denoise(model.get_input_embeddings()(batch.noisy_ids)).logits()


@dataclass(frozen=True, slots=True, eq=False)
class SameKind(Uniform):
    """`Uniform` whose random tokens are of the kind of the token that they replace.

    Attributes:
        kinds: [V] int64, as `token_kinds` gives them.
    """

    kinds: Tensor

    def loss(self, model: Any, clean: CleanBatch, generator: torch.Generator) -> Loss:
        batch, ratios = self.masked(clean, generator)
        ids = clean.clean_ids
        mask = self.mask_token_id
        drawn = mask_tokens(ids, clean.corruptible, ratios, mask, generator) == mask
        random_ids = torch.where(drawn, same_kind_tokens(ids, self.kinds, generator), ids)
        noisy = take(random_ids, noisy_positions(clean, self.block_length))
        return uniform_loss(
            model, batch, noisy, block_length=self.block_length, average=self.loss_average
        )


@dataclass(frozen=True, slots=True)
class AtErrors(OPUT):
    """`OPUT` whose wrong predictions are replaced by random tokens, and right ones stay.

    So as many tokens are wrong as in on-policy training, at the same positions, and only which
    tokens stand there differs.
    """

    def loss(self, model: Any, clean: CleanBatch, generator: torch.Generator) -> Loss:
        batch, _ = self.masked(clean, generator)
        mask = self.mask_token_id
        logits = own_logits(model, batch, self.block_length)
        draws = draw(logits.shape[:-1], generator, logits.device)
        own, _ = pick(logits, mask, self.rollout_temperature, draws)
        own = torch.where(batch.noisy_ids == mask, own, batch.noisy_ids)
        clean_ids = take(clean.clean_ids, noisy_positions(clean, self.block_length))
        noisy = at_errors(own, clean_ids, model.config.vocab_size, mask, generator)
        return uniform_loss(
            model, batch, noisy, block_length=self.block_length, average=self.loss_average
        )


def at_errors(
    own: Tensor, clean_ids: Tensor, vocab_size: int, mask_token_id: int, generator: torch.Generator
) -> Tensor:
    """Own predictions [B, L'] with a uniformly random token wherever they are not the clean one."""
    always = torch.ones(len(own))
    return random_tokens(own, own != clean_ids, always, vocab_size, mask_token_id, generator)


@dataclass(frozen=True, slots=True)
class Noise:
    """A kind of noise in the second stream of training.

    Attributes:
        title: on the page.
        objective: what trains with it.
        settings: of the objective, beside those of the recipe.
    """

    title: str
    objective: type[Objective]
    settings: Mapping[str, str] = field(default_factory=dict)


NOISES = {
    "sampled": Noise("own tokens, sampled", OPUT, {"rollout": "sample"}),
    "random": Noise("random tokens", Uniform),
    "argmax": Noise("own tokens, argmax", OPUT, {"rollout": "argmax"}),
    "same-kind": Noise("random tokens of the same kind", SameKind),
    "at-errors": Noise("random tokens where its own are wrong", AtErrors, {"rollout": "sample"}),
}
OF_TRAINED = ("argmax", "at-errors")  # what trained models are shown, to see what they mend
PAIR = ("sampled", "random")  # what is compared first


# --- what the wrong tokens are like ---------------------------------------------------------------


def noisy_tokens(
    noise: str,
    logits: Tensor,
    clean_ids: Tensor,
    is_masked: Tensor,
    *,
    kinds: Tensor,
    mask_token_id: int,
    generator: torch.Generator,
) -> Tensor:
    """The second stream of one kind of noise, with all of it where the masks are.

    Args:
        noise: a name of `NOISES`.
        logits: [B, L', V] of the model that is trained, for the masked stream.
        clean_ids: [B, L'] int64.
        is_masked: [B, L'] bool.
        kinds: [V] int64, as `token_kinds` gives them.
        mask_token_id: MASK.
        generator: of all that is drawn.

    Returns:
        [B, L'] int64.
    """
    vocab_size = logits.shape[-1]
    if noise == "random":
        always = torch.ones(len(clean_ids))
        return random_tokens(clean_ids, is_masked, always, vocab_size, mask_token_id, generator)
    if noise == "same-kind":
        return torch.where(is_masked, same_kind_tokens(clean_ids, kinds, generator), clean_ids)
    temperature = 0.0 if noise == "argmax" else 1.0
    draws = draw(clean_ids.shape, generator, logits.device) if temperature else None
    own, _ = pick(logits, mask_token_id, temperature, draws)
    own = torch.where(is_masked, own, clean_ids)
    if noise == "at-errors":
        return at_errors(own, clean_ids, vocab_size, mask_token_id, generator)
    return own


def count_tokens(
    noisy_ids: Tensor, clean_ids: Tensor, counted: Tensor, judge_logits: Tensor, kinds: Tensor
) -> Counter[str]:
    """How many tokens of a noisy stream are wrong, and how many of those are plausible.

    Args:
        noisy_ids: [B, L'] int64.
        clean_ids: [B, L'] int64.
        counted: [B, L'] bool, the masked positions with a label.
        judge_logits: [B, L', V] of the base model, for the masked stream: a wrong token is
            plausible if its probability is at least `PLAUSIBLE`.
        kinds: [V] int64, as `token_kinds` gives them.
    """
    probs = judge_logits.float().softmax(dim=-1)
    chosen = probs.gather(-1, noisy_ids[..., None])  # [B, L', 1]
    rank = 1 + (probs > chosen).sum(dim=-1)
    wrong = counted & (noisy_ids != clean_ids)
    shares = {
        "positions": counted,
        "wrong": wrong,
        "plausible": wrong & (chosen[..., 0] >= PLAUSIBLE),
        "top": wrong & (rank <= TOP),
        "same kind": wrong & (kinds[noisy_ids] == kinds[clean_ids]),
    }
    return Counter({name: int(share.sum()) for name, share in shares.items()})


def count_kinds(
    noisy_ids: Tensor, clean_ids: Tensor, counted: Tensor, kinds: Tensor, names: list[str]
) -> Counter[str]:
    """Of how many positions the clean token is of each kind, and how many of them are wrong."""
    wrong = counted & (noisy_ids != clean_ids)
    found: Counter[str] = Counter()
    for index, name in enumerate(names):
        of_kind = kinds[clean_ids] == index
        short = next(kind for kind in KIND_NAMES if name.startswith(kind))
        found[f"{short}, positions"] += int((counted & of_kind).sum())
        found[f"{short}, wrong"] += int((wrong & of_kind).sum())
    return found


def count_mended(
    predicted: Tensor, noisy_ids: Tensor, clean_ids: Tensor, counted: Tensor
) -> Counter[str]:
    """How many wrong tokens one forward mends, and how many right ones it breaks.

    Args:
        predicted: [B, L'] int64, the most probable tokens given the noisy stream.
        noisy_ids: [B, L'] int64.
        clean_ids: [B, L'] int64.
        counted: [B, L'] bool.
    """
    was_right = counted & (noisy_ids == clean_ids)
    was_wrong = counted & (noisy_ids != clean_ids)
    is_right = predicted == clean_ids
    shares = {"mended": was_wrong & is_right, "right": was_right, "broken": was_right & ~is_right}
    return Counter({name: int(share.sum()) for name, share in shares.items()})


@torch.no_grad()
def look_at(
    model: Any,
    judge: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any,
    special_ids: SpecialIds,
    ratio: float,
    noises: Iterable[str] = tuple(NOISES),
) -> dict[str, dict[str, int]]:
    """What each kind of noise looks like for a model, and what the model makes of it.

    Args:
        model: the one that is trained.
        judge: the base model, which says what is plausible.
        batches: what the collator makes of held-out examples, on any device.
        tokenizer: of both models.
        special_ids: of both models.
        ratio: the share of tokens that are masked.
        noises: names of `NOISES`.

    Returns:
        The counts of `count_tokens`, `count_kinds` and `count_mended` by the name of the noise.
    """
    mask = special_ids.mask_token_id
    length = special_ids.block_length
    names, kinds = token_kinds(tokenizer, model.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    settings = asdict(special_ids) | {"loss_average": "labels"}
    drawing = Uniform.from_settings(settings | {"mask_ratio_low": ratio, "mask_ratio_high": ratio})
    found: dict[str, Counter[str]] = {noise: Counter() for noise in noises}
    kinds = kinds.to(model.device)
    for inputs in batches:
        clean = CleanBatch(**{name: value.to(model.device) for name, value in inputs.items()})
        batch, _ = drawing.masked(clean, generator)
        clean_ids = take(clean.clean_ids, noisy_positions(clean, length))
        is_masked = batch.noisy_ids == mask
        counted = is_masked & (batch.labels != IGNORE)
        judge_logits = own_logits(judge, batch, length)
        stream = CleanStream(model, batch.clean_ids, length, batch.positions)
        embed = model.get_input_embeddings()
        logits = stream.denoise(embed(batch.noisy_ids)).logits()
        for noise, counts in found.items():
            noisy_ids = noisy_tokens(
                noise,
                logits,
                clean_ids,
                is_masked,
                kinds=kinds,
                mask_token_id=mask,
                generator=generator,
            )
            predicted, _ = pick(stream.denoise(embed(noisy_ids)).logits(), mask)
            counts.update(count_tokens(noisy_ids, clean_ids, counted, judge_logits, kinds))
            counts.update(count_kinds(noisy_ids, clean_ids, counted, kinds, names))
            counts.update(count_mended(predicted, noisy_ids, clean_ids, counted))
    return {noise: dict(counts) for noise, counts in found.items()}
