"""DMax-MMD: a finished DMax model learns to write tokens that fit together (arXiv 2610.06648).

A model that decodes many positions at once draws each of them by itself, and cross-entropy looks at
one position at a time. This objective draws whole blocks so, and rewards those that look like the
clean block to a frozen copy of the model: minus the squared maximum mean discrepancy (MMD) of their
features, raised by a policy gradient. What no source settles is marked as a guess.

There are two views of a sequence. In the masked one, tokens are sampled at the labelled masks. In
the predicted one, the model's best tokens stand in place of all masks, and all labelled positions
are sampled. The published code shows one view in a step. Here a step has both, of the same masks,
and halves the sum of their losses, which is the same in expectation (a guess).

Shapes: B sequences of L' positions in K blocks of W, N = B * K; G groups of M samples, C = G * M of
them; R scored rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from dmax.baselines.frozen import frozen_features
from dmax.errors import InputError
from dmax.training.clean_stream import CleanBatch, CleanStream, NoisyBatch
from dmax.training.objectives import SEQUENCES, Loss, Objective, halves, mean, rollout_error
from dmax.training.rollout import draw
from dmax.training.vocabulary import CHUNK, IGNORE, States, in_chunks

Features = Callable[[Tensor], Tensor]
"""Of token ids [B, L'], blocks [N, W, D] float32."""


class View(NamedTuple):
    """A noisy copy of the sequences, and where tokens are sampled in it.

    Attributes:
        ids: [B, L'] int64.
        states: what the model says of them.
        scored: [B, L'] bool, the positions S of equation 1, all of them labelled.
    """

    ids: Tensor
    states: States
    scored: Tensor


def mmd_loss(
    model: Any,
    extractor: Any,
    batch: NoisyBatch,
    *,
    block_length: int,
    mask_token_id: int,
    num_groups: int,
    num_samples: int,
    bandwidth: float,
    generator: torch.Generator | None = None,
    average: str = SEQUENCES,
) -> Loss:
    """Policy gradient on minus the squared MMD between sampled blocks and clean ones.

    Args:
        model: as `oput_loss` takes it.
        extractor: of the features, made by `frozen_features`.
        batch: clean, masked and label ids.
        block_length: positions that are decoded together.
        mask_token_id: MASK, which is never sampled.
        num_groups: G, the groups of samples that each have a reward; 1 has no baseline.
        num_samples: M, the samples of a group; 1 has no repulsion.
        bandwidth: sigma of the kernel (`similarity`).
        generator: random source of the samples.
        average: as `mean` takes it, over the blocks that are sampled in.

    Returns:
        The loss. Its value is about 0 and says little; `mmd_masked` and `mmd_predicted`, the
        squared MMD, should fall towards 0. The other parts are rewards, the `median_bandwidth` of
        the predicted view, and the `rollout_error` of what stands in place of the masks.
    """
    embed = model.get_input_embeddings()
    is_masked = batch.noisy_ids == mask_token_id
    is_labelled = batch.labels != IGNORE
    clean = CleanStream(model, batch.clean_ids, block_length, batch.positions)

    masked = clean.denoise(embed(batch.noisy_ids))
    filled = fill_masks(masked, batch.noisy_ids, is_masked)
    predicted = clean.denoise(embed(filled))

    loss_of = partial(
        view_loss,
        labels=batch.labels,
        features=block_features(extractor, batch, block_length),
        block_length=block_length,
        mask_token_id=mask_token_id,
        num_groups=num_groups,
        num_samples=num_samples,
        bandwidth=bandwidth,
        generator=generator,
        average=average,
    )
    return halves(
        loss_of("masked", View(batch.noisy_ids, masked, is_masked & is_labelled)),
        loss_of("predicted", View(filled, predicted, is_labelled)),
        rollout_error=rollout_error(filled, batch.labels, is_masked),
    )


def view_loss(
    name: str,
    view: View,
    *,
    labels: Tensor,
    features: Features,
    block_length: int,
    mask_token_id: int,
    num_groups: int,
    num_samples: int,
    bandwidth: float,
    generator: torch.Generator | None = None,
    average: str = SEQUENCES,
) -> Loss:
    """The loss of one view, logged under its name.

        y[g,b,i] ~ q_i, i in S, independent of each other, from one forward                     (1)
        z[g,b] = view with S replaced by y[g,b],   z_ref = view with S replaced by clean tokens (2)
        L = mean over blocks n with S_n of -(1/G) Σ_g A[n,g] Σ_b Σ_{i in S_n} log q_i(y[g,b,i]) (8)

    What is not in S stays as it is in samples and reference, masks included. The sum over b is no
    mean: so it is the gradient of 2 E[κ(z, ref)] - E[κ(z, z')]. A block sees itself and clean ones,
    so no sample in another block changes its reward.
    """
    ids, states, scored = view
    groups = (num_groups, num_samples)
    with torch.no_grad():
        tokens = sample(states, scored, num_groups * num_samples, mask_token_id, generator)
        reference = features(torch.where(scored, labels, ids))
        sampled = torch.stack(
            [features(torch.where(scored, each, ids)) for each in tokens.unbind(dim=-1)]
        ).unflatten(0, groups)  # [G, M, N, W, D]
        weights = scored.view(-1, block_length).to(reference.dtype)  # [N, W]
        reward = rewards(sampled, reference, weights, bandwidth)  # [G, N]
        highest = similarity(reference, reference, weights=weights, bandwidth=bandwidth)  # [N]

    log_probs = log_likelihoods(states, tokens, scored, mask_token_id)  # [B, L', C]
    of_blocks = log_probs.view(len(weights), block_length, *groups).sum(dim=(1, 3))  # [N, G]
    losses = -(advantages(reward).T * of_blocks).mean(dim=1)  # [N]
    is_sampled = weights.any(dim=1).to(losses.dtype)
    loss = mean(
        losses.view(len(ids), -1), labels, name, average, weights=is_sampled.view(len(ids), -1)
    )
    count = is_sampled.sum().clamp(min=1)
    parts = {
        f"reward_{name}": reward.mean(dim=0).sum() / count,
        f"mmd_{name}": (highest - reward.mean(dim=0)).sum() / count,
        "median_bandwidth": median_bandwidth(sampled[0, 0], reference, weights),
    }
    return Loss(loss.total, loss.parts | parts, loss.per_sequence)


# --- what is sampled, and how probable it was ----------------------------------------------------


def fill_masks(states: States, ids: Tensor, is_masked: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """The token ids [B, L'] with the model's best one in place of every mask.

    As in the published code of this method, the best one may be MASK.
    """
    rows = states.values[is_masked]  # [R, D or V]

    # Gradients stay on: before 2.10 torch's autocast keeps the first copy of a weight that it makes
    # in a step, and one made without them would leave the output layer untrained.
    def best(part: slice) -> tuple[Tensor]:
        return (states.head(rows[part]).argmax(dim=-1),)

    (filled,) = in_chunks(best, len(rows), states.vocab_size, chunk)
    return ids.masked_scatter(is_masked, filled)


@torch.no_grad()
def sample(
    states: States,
    scored: Tensor,
    count: int,
    mask_token_id: int,
    generator: torch.Generator | None = None,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """Tokens [B, L', C] int64: `count` for each scored position, never MASK; 0 elsewhere (1).

    One uniform number decides a token, whichever rows are sampled together.
    """
    rows = states.values[scored]  # [R, D or V]
    dtype = torch.float32 if rows.device.type == "mps" else torch.float64
    draws = draw(torch.Size((len(rows), count)), generator, rows.device).to(dtype)

    def drawn(part: slice) -> tuple[Tensor]:
        log_probs = log_softmax_without(states.head(rows[part]), mask_token_id)
        mass = log_probs.to(dtype).exp().cumsum(dim=-1)  # [r, V]
        return (torch.searchsorted(mass, draws[part] * mass[:, -1:], right=True),)

    (sampled,) = in_chunks(drawn, len(rows), states.vocab_size, chunk)
    empty = scored.new_zeros((*scored.shape, count), dtype=torch.int64)
    return empty.masked_scatter(scored[..., None], sampled)


def log_likelihoods(
    states: States, tokens: Tensor, scored: Tensor, mask_token_id: int, *, chunk: int = CHUNK
) -> Tensor:
    """Log-probabilities under q_i of tokens [B, L', C], with gradient; 0 where they are not scored.

    The logits of all positions are never there at a time. Backward computes each chunk anew.
    """
    rows = states.values[scored]  # [R, D or V]
    chosen = tokens[scored]  # [R, C]

    def of_rows(part: slice) -> tuple[Tensor]:
        log_probs = log_softmax_without(states.head(rows[part]), mask_token_id)
        return (log_probs.gather(-1, chosen[part]),)

    (found,) = in_chunks(of_rows, len(rows), states.vocab_size, chunk)
    return found.new_zeros(tokens.shape).masked_scatter(scored[..., None], found)


def log_softmax_without(logits: Tensor, mask_token_id: int) -> Tensor:
    """Log-softmax [..., V] over all tokens but MASK, at temperature 1 and in float32 at least.

    The logits stay as they are: in float32 they are no copy of the model's.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    mask = torch.tensor([mask_token_id], device=logits.device)
    return exact.index_fill(-1, mask, -torch.inf).log_softmax(dim=-1)


# --- what the frozen model says of it ------------------------------------------------------------


def block_features(extractor: Any, batch: NoisyBatch, block_length: int) -> Features:
    """φ (3): the features of noisy copies in the context of the clean sequences, block by block.

    The clean half runs once, beside the first copy. Copies run one after the other, so that memory
    does not grow with their number.
    """
    clean = CleanStream(extractor, batch.clean_ids, block_length, batch.positions)
    embed = extractor.get_input_embeddings()

    @torch.no_grad()
    def features(ids: Tensor) -> Tensor:
        values = clean.denoise(embed(ids)).values  # [B, L', D]
        exact = values.to(torch.promote_types(values.dtype, torch.float32))
        return exact.reshape(-1, block_length, exact.shape[-1])

    return features


def rewards(features: Tensor, reference: Tensor, weights: Tensor, bandwidth: float) -> Tensor:
    """Minus the squared MMD of every group and block, without the reference's own term.

        r[n,g] = (2/M) Σ_b κ_n(z[g,b], z_ref) - 1/(M(M-1)) Σ_{b≠b'} κ_n(z[g,b], z[g,b'])         (6)

    Args:
        features: [G, M, N, W, D] of the samples.
        reference: [N, W, D].
        weights: [N, W], 1 at the positions of S and 0 elsewhere.
        bandwidth: sigma.

    Returns:
        [G, N], 0 where a block has no position in S.
    """
    samples = features.unbind(dim=1)
    alike = partial(similarity, weights=weights, bandwidth=bandwidth)
    attraction = [alike(each, reference) for each in samples]
    reward = 2 * torch.stack(attraction).mean(dim=0)
    repulsion = [alike(one, other) for one, other in combinations(samples, 2)]
    if repulsion:
        reward = reward - torch.stack(repulsion).mean(dim=0)
    return reward


def similarity(one: Tensor, other: Tensor, *, weights: Tensor, bandwidth: float) -> Tensor:
    """κ of blocks [..., N, W, D]: the mean kernel of all pairs of their positions in S, [..., N].

        k(u, v) = exp(-‖u - v‖² / (2 D σ²))                                                      (4)
        κ_n(z, z') = |S_n|^-2 Σ_{i,j in S_n} k(φ_i(z), φ_j(z'))                                  (5)

    The division by D is the published code's; a sigma without it is larger by √D.
    """
    shares = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1)  # [N, W]
    kernel = (squared_distances(one, other) / (-2 * bandwidth**2)).exp()
    with torch.autocast(one.device.type, enabled=False):
        return torch.einsum("ni,...nij,nj->...n", shares, kernel, shares)


def squared_distances(one: Tensor, other: Tensor) -> Tensor:
    """‖u - v‖² / D of all pairs of positions in blocks [..., W, D], as [..., W, W].

    Autocast would round the products to bfloat16, and with them small distances to nothing.
    """
    with torch.autocast(one.device.type, enabled=False):
        products = one @ other.transpose(-1, -2)
    lengths = one.square().sum(dim=-1)[..., :, None] + other.square().sum(dim=-1)[..., None, :]
    return (lengths - 2 * products).clamp(min=0) / one.shape[-1]  # below 0 by rounding only


def median_bandwidth(samples: Tensor, reference: Tensor, weights: Tensor) -> Tensor:
    """The sigma with σ² = m / 2, m the median of ‖u - v‖² / D, a scalar; NaN without any pair.

    The rule is a guess: no source says how to choose sigma for another model. Pairs are those of
    samples and reference, [N, W, D] each, at positions of weight 1 in the same block.
    """
    is_pair = weights[:, :, None] * weights[:, None, :] > 0  # [N, W, W]
    distances = squared_distances(samples, reference).masked_fill(~is_pair, torch.nan)
    return (distances.nanmedian() / 2).sqrt()


def advantages(rewards: Tensor) -> Tensor:
    """A = r minus the mean of the other groups (7), [G, N]; the reward itself for one group."""
    count = len(rewards)
    if count == 1:
        return rewards
    return (rewards - rewards.mean(dim=0)) * (count / (count - 1))


@dataclass(frozen=True, slots=True)
class MMD(Objective):
    """DMax-MMD, `mmd_loss`: for models that `oput` has trained.

    Attributes:
        mmd_groups: G, groups of samples.
        mmd_samples: M, samples of a group.
        mmd_bandwidth: sigma of the kernel. No source has a rule for it: see `median_bandwidth`.
        mmd_layer: the last layer of the extractor, counted from 0; None: half-way up. That is 10 of
            20 for LLaDA-2.0-mini, as in the published code, and a guess for other models.
        compute_dtype: of the extractor's weights; None: that of the model's.
        extractor: the first layers of the model as `start` found it.
    """

    decoding = "spd"

    mmd_groups: int
    mmd_samples: int
    mmd_bandwidth: float
    mmd_layer: int | None
    compute_dtype: torch.dtype | None = None
    extractor: Any = None

    def start(self, network: Any, device: torch.device) -> Self:
        """The objective with a frozen copy of the network's first layers."""
        layer = self.mmd_layer
        if layer is None:
            layer = network.config.num_hidden_layers // 2
        extractor = frozen_features(network, layer, device, self.compute_dtype)
        return replace(self, extractor=extractor)

    def loss(self, model: Any, clean: CleanBatch, generator: torch.Generator) -> Loss:
        """Mask tokens; the model itself draws the samples."""
        if self.extractor is None:
            raise InputError(
                "MMD compares samples by a copy of the model that training begins with",
                hint="make it by `objective.start(model, device)` first",
            )
        batch, _ = self.masked(clean, generator)
        return mmd_loss(
            model,
            self.extractor,
            batch,
            block_length=self.block_length,
            mask_token_id=self.mask_token_id,
            num_groups=self.mmd_groups,
            num_samples=self.mmd_samples,
            bandwidth=self.mmd_bandwidth,
            generator=generator,
            average=self.loss_average,
        )
